"""The drafter that a training starts with: a new one near the identity, or an earlier one (``earlier_drafter.py``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target import input_embeddings
from .dataset import TrainingData
from .draft_vocabulary import choose_draft_vocabulary, control_tokens, coverage
from .earlier_drafter import earlier_drafter
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

    Or, with ``plan.init_from``, that drafter (see [`earlier_drafter`]).

    Raises:
        TrainingError: if the config is impossible; as [`earlier_drafter`].
    """
    say = report or logger.info
    text = target.config.get_text_config()
    if plan.init_from is not None:
        return earlier_drafter(plan, plan.init_from, target, train, control_tokens(target, tokenizer), say)
    vocab_size = int(text.vocab_size)
    size = plan.draft_vocab_size
    if size is None and vocab_size > 16384:
        size = 8192
    overrides = {"tree": plan.tree, "draft_vocab_size": None if size == vocab_size else size, **plan.config}
    feature_size, embedding_size = _typical_sizes(target, train)
    scale = overrides.setdefault("embedding_scale", embedding_scale(feature_size, embedding_size))
    try:
        config = FalconDrafterConfig.from_target(target, block_size=plan.block_size, fusion=plan.fusion, **overrides)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"No such drafter: {error}") from error
    plan.check_feature_layers(config.feature_layers, int(text.num_hidden_layers))
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
        try:
            ids = choose_draft_vocabulary(train, config.draft_vocab_size, vocab_size, control_tokens(target, tokenizer))
        except ValueError as error:
            raise TrainingError(str(error)) from error
        assert drafter.draft_vocab_ids is not None
        drafter.draft_vocab_ids.copy_(torch.from_numpy(ids))
        texts = [(name, part) for name, part in (("training", train), ("held-out", held_out)) if len(part)]
        shares = [f"{coverage(part, ids, vocab_size):.1%} of the {name} text" for name, part in texts]
        say(f"draft vocabulary of {len(ids)} tokens: {', '.join(shares)}")
    return drafter.train()


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
