"""Calibration: all measurements of ``falcon-hf tune``, in one go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target import family
from ..runtime.tree_shape import chain
from .calibration import Calibration, DrafterRecord
from .choice import predict
from .cost_measurement import (
    DRAFT_WIDTHS,
    VERIFY_NODES,
    check_contexts,
    check_draft_vocabulary,
    time_drafts,
    time_verification,
)
from .errors import TuningError
from .lookup_measurement import count_lookups
from .rank_measurement import feature_layers, greedy_text, measure_ranks
from .static_tree import best_tree
from .whole_calls import drafting, mean_context, time_whole_calls

logger = logging.getLogger(__name__)

# Whole calls of generate() that give the plain speed and what a round costs beside drafting and verification.
_PROBE_PROMPTS = 4


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: ``[1, P]``.
        task: what sort of prompt it is; settings are compared task by task.
    """

    ids: torch.Tensor
    task: str = ""


@dataclass(frozen=True)
class NamedDrafter:
    """A drafter on its target's device, in its dtype.

    Attributes:
        name: as the user gave it.
        drafter: the model; its config is put back after each use.
        provenance: JSON values for the calibration.
    """

    name: str
    drafter: FalconDrafter
    provenance: dict[str, Any]


@dataclass(frozen=True)
class CalibrationPlan:
    """How much to measure.

    Attributes:
        max_new_tokens: of each greedy answer.
        passes: m, the most passes of a tree.
        nodes: N, the most nodes of a tree, the root included.
        width: W, ranks to tell apart.
        contexts: context lengths at which verification is timed.
        repeats: of each timed call.
    """

    max_new_tokens: int = 96
    passes: int = 4
    nodes: int = 64
    width: int = 20
    contexts: tuple[int, ...] = (64, 256)
    repeats: int = 9

    def __post_init__(self) -> None:
        numbers = (self.max_new_tokens - 1, self.passes, self.nodes - 1, self.width, self.repeats, *self.contexts)
        if min(numbers) < 1 or not self.contexts:
            raise TuningError(
                "Calibration needs 2 new tokens, 1 pass, 2 nodes, 1 rank, 1 context of 1 token and 1 repeat at least."
            )


def calibrate(
    target: PreTrainedModel,
    drafters: Sequence[NamedDrafter],
    prompts: Sequence[Prompt],
    plan: CalibrationPlan,
    provenance: dict[str, Any],
    report: Callable[[str], None] = logger.info,
) -> Calibration:
    """Measure acceptance and costs.

    Args:
        target: in evaluation mode.
        drafters: for this target.
        prompts: to answer greedily; a few dozen of the kind that will be asked.
        plan: how much to measure.
        provenance: JSON values that say what was measured where; kept in the file.
        report: told what is being done.

    Raises:
        TuningError: if there is no prompt or drafter, the target takes no trees, a context does not fit it, a draft
            vocabulary is too small, or no prompt gets an answer. All but the last are told before anything is measured.
    """
    if not prompts or not drafters:
        raise TuningError("Calibration needs at least one prompt and one drafter.")
    support = family(target)
    if support is not None and support.drafts == "chain":
        raise TuningError(
            f"{type(target).__name__} verifies chains alone, so there is no tree to tune: set the config's tree to "
            "[[0], [0, 0], ...], as long as bench finds fastest."
        )
    check_contexts(target, plan.contexts)
    for named in drafters:
        check_draft_vocabulary(named.drafter)
    layers = {layer for named in drafters for layer in feature_layers(named.drafter)}
    texts = []
    for number, prompt in enumerate(prompts, start=1):
        report(f"Answering prompt {number} of {len(prompts)}")
        texts.append(greedy_text(target, prompt.ids, plan.max_new_tokens, layers))
    records = []
    longest = max(texts, key=lambda text: text.ids.shape[1])
    for named in drafters:
        report(f"Recording the ranks of {named.name}")
        with drafting(named.drafter, chain(1)):
            ranks = measure_ranks(target, named.drafter, texts, plan.passes, plan.width)
            report(f"Timing the drafts of {named.name}")
            times, append = time_drafts(target, named.drafter, longest, plan.passes, DRAFT_WIDTHS, plan.repeats)
        records.append(DrafterRecord(named.name, named.provenance, ranks.record, ranks.confidence, times, append))
    report("Timing verification")
    sizes = sorted({size for size in VERIFY_NODES if size <= plan.nodes} | {plan.nodes})
    verify_times = time_verification(target, longest.ids, sizes, plan.contexts, plan.repeats)
    report("Timing whole calls")
    answered = [(text, prompt) for text, prompt in zip(texts, prompts, strict=True) if text.answer_length > 1]
    probes = sorted(answered, key=lambda pair: -pair[0].ids.shape[1])[:_PROBE_PROMPTS]
    context = mean_context([text for text, _ in probes])
    bare = Calibration(provenance, tuple(records), verify_times, 0.0, context, 0.0, 0.0, count_lookups(texts))
    (option, *_) = bare.options()
    k = option.model.block_size
    shapes = [
        best_tree(option.model, 8, k) or chain(k),  # of a drafter that never hit, any tree is the best
        best_tree(option.model, min(plan.nodes, 24), min(plan.passes, 2) * k),
    ]
    whole = time_whole_calls(
        target,
        drafters[0].drafter,
        [prompt.ids for _, prompt in probes],
        {shape: predict(option, shape, "given").round_seconds for shape in shapes if shape is not None},
        plan.max_new_tokens,
    )
    return replace(
        bare, plain_seconds=whole.plain_token, walk_seconds=whole.walked_token, round_seconds=whole.round_rest
    )
