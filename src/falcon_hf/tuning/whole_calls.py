"""Whole calls of ``generate()``, plain and with a drafter: what the costs of the parts are checked against.

Plain and drafted calls take turns, twice over, and each figure is a median over calls: a machine shared with others has
slow minutes, and one that hit only the drafted calls once priced every tree a fifth too high.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..measured_calls import padding_token
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.tree_shape import TreeShape
from .cost_measurement import plain_decoding
from .rank_measurement import GreedyText

_TURNS = 2


@dataclass(frozen=True)
class WholeCallTimes:
    """Medians over calls, in seconds.

    Attributes:
        plain_token: a token of plain decoding, the prefill left out.
        walked_token: choosing and committing a token of a round.
        round_rest: what a round took longer than was expected of its parts; below 0 where they were overrated.
    """

    plain_token: float
    walked_token: float
    round_rest: float


def mean_context(texts: Sequence[GreedyText]) -> float:
    """Tokens that were cached, on average, when a token of these answers was decoded, the first ones left out."""
    counts = [text.answer_length - 1 for text in texts]
    middles = [(text.prompt_length + text.ids.shape[1]) / 2 for text in texts]
    return sum(count * middle for count, middle in zip(counts, middles, strict=True)) / sum(counts)


def time_whole_calls(
    target: PreTrainedModel,
    drafter: FalconDrafter,
    prompts: Sequence[torch.Tensor],
    expected: Mapping[TreeShape, float],
    max_new_tokens: int,
) -> WholeCallTimes:
    """Answer prompts plainly and with each tree, in turns.

    Args:
        target: in evaluation mode.
        drafter: for this target.
        prompts: ``[1, P]`` each, with answers of two tokens at least.
        expected: trees, and the seconds that a round's drafting, verification and appending should take.
        max_new_tokens: of each answer.
    """
    plain: list[float] = []
    walks: list[float] = []
    rests: list[float] = []
    options = {"do_sample": False, "max_new_tokens": max_new_tokens}
    for prompt in list(prompts) * _TURNS:
        count, seconds = plain_decoding(target, prompt, options)
        plain.append(seconds / count)
        for shape, round_seconds in expected.items():
            counted = generate_with(target, drafter, shape, prompt, max_new_tokens)
            took = counted.total_seconds - counted.prefill_seconds - counted.walk_seconds
            rests.append(took / counted.rounds - round_seconds)
            walks.append(counted.walk_seconds / counted.new_tokens)
    middle = statistics.median
    return WholeCallTimes(middle(plain), middle(walks), middle(rests))


def generate_with(
    target: PreTrainedModel,
    drafter: FalconDrafter,
    tree: TreeShape | Any,
    prompt: torch.Tensor,
    max_new_tokens: int,
    lookup: dict[str, Any] | None = None,
) -> Any:
    """``generate()`` greedily with a drafter, a tree, a shape or as a config has it, and look-up; the config stays.

    Returns:
        The call's ``GenerationStatistics``.
    """
    with drafting(drafter, tree, lookup):
        ids = prompt.to(target.device)
        target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=drafter,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_token(target),
        )
    return drafter.last_generation


@contextmanager
def drafting(drafter: FalconDrafter, tree: TreeShape | Any, lookup: dict[str, Any] | None = None) -> Iterator[None]:
    """Inside the block: the drafter has this tree and this look-up, none by default, whatever its config said."""
    fixed = {"tree": tree, "lookup": lookup, "verifier": "follow", "auto_off": False}
    if isinstance(tree, TreeShape):
        fixed["tree"] = [list(path) for path in tree.paths]
    own = {name: getattr(drafter.config, name) for name in fixed}
    try:
        for name, value in fixed.items():
            setattr(drafter.config, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(drafter.config, name, value)
