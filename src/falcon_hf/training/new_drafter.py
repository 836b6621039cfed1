"""The drafter that a training starts with: a new one near the identity, or an earlier one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..drafter_loading import DrafterError, load_drafter
from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target import fingerprint, input_embeddings
from .dataset import TrainingData
from .draft_vocabulary import choose_draft_vocabulary, coverage
from .errors import TrainingError
from .features import compute_features
from .initialisation import embedding_scale, near_identity_start, start_from_target_layers, typical_sizes
from .plan import TrainingPlan

logger = logging.getLogger(__name__)

_SAMPLE_DIALOGUES = 16


def make_drafter(
    plan: TrainingPlan,
    target: PreTrainedModel,
    train: TrainingData,
    held_out: TrainingData,
    tokenizer: Any = None,
    report: Callable[[str], None] | None = None,
) -> FalconDrafter:
    """A new drafter that starts near the identity, over a draft vocabulary of the text's most frequent tokens.

    Or, with ``plan.init_from``, that drafter.

    Raises:
        TrainingError: if the config is impossible, or the drafter was made for another kind of target.
    """
    say = report or logger.info
    text = target.config.get_text_config()
    if plan.init_from is not None:
        try:
            drafter = load_drafter(plan.init_from, torch.float32)
        except DrafterError as error:
            raise TrainingError(str(error)) from error
        config = drafter.config
        if (config.vocab_size, config.hidden_size) != (text.vocab_size, text.hidden_size):
            raise TrainingError(
                f"{plan.init_from} was made for a target of width {config.hidden_size} and {config.vocab_size} tokens; "
                f"this one has {text.hidden_size} and {text.vocab_size}."
            )
        if "correction_rank" in plan.config:
            drafter = _with_correction(drafter, plan.config["correction_rank"], plan.init_from)
            config = drafter.config
        if plan.tree is not None:
            drafter.config.tree = plan.tree
        # It is this target's from now on: what generate() compares.
        config.target_name_or_path = getattr(target.config, "_name_or_path", None) or None
        config.target_model_type = text.model_type
        config.target_fingerprint = fingerprint(target)
        return drafter.train()
    vocab_size = int(text.vocab_size)
    size = plan.draft_vocab_size or (8192 if vocab_size > 16384 else None)
    overrides = {"tree": plan.tree, "draft_vocab_size": None if size == vocab_size else size, **plan.config}
    feature_size, embedding_size = _typical_sizes(target, train)
    scale = overrides.setdefault("embedding_scale", embedding_scale(feature_size, embedding_size))
    try:
        config = FalconDrafterConfig.from_target(target, block_size=plan.block_size, fusion=plan.fusion, **overrides)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"No such drafter: {error}") from error
    layers, last = config.feature_layers, int(text.num_hidden_layers)
    if layers is not None and layers[-1] != last:
        raise TrainingError(
            f"feature_layers must end with {last}, the target's num_hidden_layers, because the drafter estimates that "
            f"hidden state; got {layers}."
        )
    drafter = FalconDrafter(config)
    if plan.target_layers:
        start_from_target_layers(drafter, target)
    near_identity_start(drafter, feature_size, embedding_size)
    if config.feature_layers is not None:
        drafter.standardise(_sample_features(target, train, config.feature_layers))
    say(
        f"drafter of {drafter.num_parameters():,} parameters, k = {config.block_size}, {config.fusion} fusion, "
        f"embeddings times {scale:g} (features are of size {feature_size:.3g}, embeddings {embedding_size:.3g})"
    )
    if config.draft_vocab_size is not None:
        ids = choose_draft_vocabulary(train, config.draft_vocab_size, vocab_size, _control_tokens(target, tokenizer))
        assert drafter.draft_vocab_ids is not None
        drafter.draft_vocab_ids.copy_(torch.from_numpy(ids))
        shares = [f"{coverage(part, ids, vocab_size):.1%}" for part in (train, held_out) if len(part)]
        say(f"draft vocabulary of {len(ids)} tokens: {' of the training text, '.join(shares)} of the held-out text")
    return drafter.train()


def _with_correction(drafter: FalconDrafter, rank: Any, source: str) -> FalconDrafter:
    """The same drafter with a correction of this rank, which changes nothing until it is trained.

    Raises:
        TrainingError: if it has one already, or the rank is impossible.
    """
    if drafter.config.correction_rank is not None:
        raise TrainingError(f"{source} has a correction of rank {drafter.config.correction_rank}, which stays.")
    config = copy.deepcopy(drafter.config)
    config.correction_rank = rank
    try:
        config.check()
    except ValueError as error:
        raise TrainingError(f"No such drafter: {error}") from error
    corrected = FalconDrafter(config)
    corrected.load_state_dict(drafter.state_dict(), strict=False)
    return corrected


def _typical_sizes(target: PreTrainedModel, data: TrainingData) -> tuple[float, float]:
    """Standard deviations of features and embeddings over the first dialogues."""
    with torch.no_grad():
        embeddings = [input_embeddings(target, ids)[0] for ids in _sample(target, data)]
    return typical_sizes([_sample_features(target, data, None)], embeddings)


def _sample(target: PreTrainedModel, data: TrainingData) -> list[torch.Tensor]:
    """The first dialogues, ``[1, n]`` ids each, where the target is."""
    rows = range(min(_SAMPLE_DIALOGUES, len(data)))
    parts = [data.tokens[data.offsets[row] : data.offsets[row + 1]] for row in rows]
    return [torch.from_numpy(part.astype(np.int64))[None].to(target.device) for part in parts]


def _sample_features(target: PreTrainedModel, data: TrainingData, feature_layers: list[int] | None) -> torch.Tensor:
    """``[n, W]`` features of the first dialogues."""
    parts = [compute_features(target, ids, torch.ones_like(ids), feature_layers)[0] for ids in _sample(target, data)]
    return torch.cat(parts)


def _control_tokens(target: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ends of text and turn, which must be draftable however rare the data has them."""
    configured = [target.config.get_text_config().eos_token_id]
    generation = getattr(target, "generation_config", None)
    configured += [getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    tokens: list[int] = []
    for entry in configured:
        tokens += entry if isinstance(entry, list) else [] if entry is None else [entry]
    return tokens
