"""The drafter that ``init_from`` names, made ready to be trained on: for this target, with what it is to gain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafter_loading import DrafterError, load_drafter
from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target import fingerprint
from ..runtime.target_name import target_name
from .dataset import TrainingData
from .draft_vocabulary import choose_draft_vocabulary, coverage
from .errors import TrainingError
from .plan import TrainingPlan


def earlier_drafter(
    plan: TrainingPlan,
    source: str,
    target: PreTrainedModel,
    train: TrainingData,
    control: list[int],
    say: Callable[[str], None],
) -> FalconDrafter:
    """The drafter at ``source``, in float32; with a correction or a larger draft vocabulary where the plan asks.

    Either changes nothing of what it has learned: a new correction is zero, and the draft vocabulary's rows are the
    target's own, so that it grows without a weight. It keeps its tokens, and gains the most frequent of ``train``.

    Raises:
        TrainingError: if it cannot be loaded, was made for another kind of target, cannot gain that, or cannot have the
            plan's tree.
    """
    text = target.config.get_text_config()
    try:
        drafter = load_drafter(source, torch.float32)
    except DrafterError as error:
        raise TrainingError(str(error)) from error
    config = drafter.config
    if (config.vocab_size, config.hidden_size) != (text.vocab_size, text.hidden_size):
        raise TrainingError(
            f"{source} was made for a target of width {config.hidden_size} and {config.vocab_size} tokens; "
            f"this one has {text.hidden_size} and {text.vocab_size}."
        )
    plan.check_feature_layers(config.feature_layers, int(text.num_hidden_layers))
    if "correction_rank" in plan.config:
        drafter = _with_correction(drafter, plan.config["correction_rank"], source)
    if plan.draft_vocab_size is not None:
        drafter = _with_vocabulary(drafter, plan.draft_vocab_size, source, train, control)
        assert drafter.draft_vocab_ids is not None
        share = coverage(train, drafter.draft_vocab_ids.numpy(), drafter.config.vocab_size)
        say(f"draft vocabulary grown to {plan.draft_vocab_size} tokens: {share:.1%} of the training text")
    config = drafter.config
    if plan.tree is not None:
        config.tree = plan.tree
        if not isinstance(plan.tree, dict):
            config.lookup = None  # it needs a dynamic tree
        _check(config)
    # It is this target's from now on: what generate() compares.
    config.target_name_or_path = target_name(getattr(target.config, "_name_or_path", None))
    config.target_model_type = text.model_type
    config.target_fingerprint = fingerprint(target)
    return drafter.train()


def _with_correction(drafter: FalconDrafter, rank: Any, source: str) -> FalconDrafter:
    """The same drafter with a correction of this rank, which changes nothing until it is trained."""
    if drafter.config.correction_rank is not None:
        raise TrainingError(f"{source} has a correction of rank {drafter.config.correction_rank}, which stays.")
    config = copy.deepcopy(drafter.config)
    config.correction_rank = rank
    return _remade(drafter, config)


def _with_vocabulary(
    drafter: FalconDrafter, size: int, source: str, train: TrainingData, control: list[int]
) -> FalconDrafter:
    """The same drafter over more tokens."""
    config = copy.deepcopy(drafter.config)
    held = drafter.draft_vocab_ids
    if held is None or not len(held) < size < config.vocab_size:
        has = f"all {config.vocab_size}" if held is None else len(held)
        raise TrainingError(f"{source} drafts over {has} of {config.vocab_size} tokens, and cannot grow to {size}.")
    config.draft_vocab_size = size
    try:
        ids = choose_draft_vocabulary(train, size, config.vocab_size, [*held.tolist(), *control])
    except ValueError as error:
        raise TrainingError(str(error)) from error
    grown = _remade(drafter, config, without="draft_vocab_ids")
    assert grown.draft_vocab_ids is not None
    grown.draft_vocab_ids.copy_(torch.from_numpy(ids))
    return grown


def _check(config: FalconDrafterConfig) -> None:
    """Refuse what no drafter can be.

    Raises:
        TrainingError: saying what is wrong.
    """
    try:
        config.check()
    except ValueError as error:
        raise TrainingError(f"No such drafter: {error}") from error


def _remade(drafter: FalconDrafter, config: FalconDrafterConfig, without: str | None = None) -> FalconDrafter:
    """A drafter of this config with the other one's weights, as far as it has them."""
    _check(config)
    made = FalconDrafter(config)
    made.load_state_dict({name: value for name, value in drafter.state_dict().items() if name != without}, strict=False)
    return made
