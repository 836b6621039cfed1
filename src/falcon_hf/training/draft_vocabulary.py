"""The reduced draft vocabulary: the tokens the target says most often, and its own control tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .dataset import TrainingData


def choose_draft_vocabulary(data: TrainingData, size: int, vocab_size: int, always: Iterable[int] = ()) -> np.ndarray:
    """The ``size`` most frequent tokens to be learned, in ascending order of id.

    Ties, and places that no token of the data fills, go to the lower id, which in a BPE vocabulary is the older merge.

    Args:
        data: what is trained on; only tokens with a loss count.
        size: how many.
        vocab_size: V.
        always: ids that are in whatever their frequency (end of text; a vocabulary that is to grow).

    Returns:
        ``[size]`` int64.

    Raises:
        ValueError: if ``size`` is not from 1 to V, or less than what is always in.
    """
    kept = sorted({token for token in always if 0 <= token < vocab_size})
    if not max(1, len(kept)) <= size <= vocab_size:
        raise ValueError(f"The draft vocabulary must have from {max(1, len(kept))} to {vocab_size} tokens, got {size}.")
    counts = np.bincount(data.tokens[data.loss_mask], minlength=vocab_size).astype(np.int64)
    counts[kept] = np.iinfo(np.int64).max
    order = np.argsort(-counts, kind="stable")
    return np.sort(order[:size])


def coverage(data: TrainingData, draft_ids: np.ndarray, vocab_size: int) -> float:
    """Share, 0 to 1, of the tokens to be learned that are in the draft vocabulary."""
    inside = np.zeros(vocab_size, dtype=bool)
    inside[draft_ids] = True
    learned = data.tokens[data.loss_mask]
    return float(inside[learned].mean()) if len(learned) else 0.0


def control_tokens(target: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ends of text and turn, which must be draftable however rare the data has them."""
    configured = [target.config.get_text_config().eos_token_id]
    generation = getattr(target, "generation_config", None)
    configured += [getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    tokens: list[int] = []
    for entry in configured:
        tokens += entry if isinstance(entry, list) else [] if entry is None else [entry]
    return tokens
