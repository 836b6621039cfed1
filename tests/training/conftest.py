"""Text of tiny targets, as training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from falcon_hf.training.dataset import TrainingData

VOCAB = 24


def make_text(
    target: Any, dialogues: int, seed: int = 0, shortest: int = 10, longest: int = 24, sample: bool = False
) -> TrainingData:
    """Greedy (or sampled) text of a target behind random prompts, the answers to be learned."""
    random = torch.Generator().manual_seed(seed)
    tokens, masks, lengths = [], [], []
    for number in range(dialogues):
        prompt = torch.randint(1, target.config.vocab_size, (1, 3 + number % 4), generator=random)
        size = int(torch.randint(shortest, longest + 1, (1,), generator=random))
        text = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=size, do_sample=sample)[0]
        tokens.append(text.numpy().astype(np.int32))
        masks.append(np.arange(len(text)) >= prompt.shape[1])
        lengths.append(len(text))
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return TrainingData(np.concatenate(tokens), np.concatenate(masks), offsets, "tiny")


@pytest.fixture(scope="session")
def tiny_text(tiny_target: Callable[..., Any]) -> TrainingData:
    """40 dialogues of the tiny target with 24 tokens."""
    return make_text(tiny_target(VOCAB), 40)
