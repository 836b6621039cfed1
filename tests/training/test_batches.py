"""Order, padding and pairs of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from falcon_hf.runtime.target import input_embeddings
from falcon_hf.training.batches import DialogueDataset, LengthGroupedOrder, collate, make_pairs
from falcon_hf.training.features import compute_features

from .conftest import VOCAB


def test_order_is_a_permutation_of_like_lengths():
    lengths = np.random.default_rng(0).integers(4, 500, 1000)
    order = LengthGroupedOrder(lengths, 8, seed=3)
    first = list(order)
    assert sorted(first) == list(range(1000))
    assert len(order) == 1000
    batches = np.array(first[:1000]).reshape(-1, 8)
    spread = np.ptp(lengths[batches], axis=1).mean()
    assert spread < 0.2 * np.ptp(lengths)
    means = lengths[batches].mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # long and short batches are mixed
    assert list(order) == first
    order.set_epoch(1)
    second = list(order)
    assert second != first
    assert sorted(second) == sorted(first)
    assert list(LengthGroupedOrder(lengths, 8, seed=4)) != first


def test_an_incomplete_batch_comes_last():
    order = list(LengthGroupedOrder(np.arange(10, 29), 8, seed=0))
    assert sorted(order) == list(range(19))
    short, long = sorted((order[:8], order[8:16]), key=min)
    assert max(short) < min(long)  # whole batches of like lengths: an incomplete one before them would shift them


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_pairs_are_as_the_drafter_reads_them(tiny_target, tiny_drafter, tiny_text, block_size):
    """Column c: pair c - (k - 1), target f_{c+1}, answer t_{c+2}; nothing of a row depends on its neighbours."""
    k, target = block_size, tiny_target(VOCAB)
    drafter = tiny_drafter(target, k, "linear")
    data = DialogueDataset(tiny_text)
    batch = collate([data[row] for row in (3, 11, 20)])
    mask = torch.arange(batch["input_ids"].shape[1]) < batch["lengths"][:, None]
    batch["features"] = compute_features(target, batch["input_ids"], mask.long())
    pairs = make_pairs(batch, k, 64)
    columns = batch["input_ids"].shape[1] + k - 2
    assert pairs.tokens.shape == (3, columns)
    assert pairs.targets.shape == (3, columns, 64)
    for row in range(3):
        size = int(batch["lengths"][row])
        ids, features = batch["input_ids"][row, :size], batch["features"][row, :size]
        known = drafter.start_pairs(features[None, : size - 1])[0]
        assert torch.equal(pairs.features[row, : size + k - 2], known)
        embedded = drafter.start_pairs(input_embeddings(target, ids[None, 1:]))[0]
        ours = input_embeddings(target, pairs.tokens[row]) * pairs.paired[row, :, None]
        assert torch.equal(ours[: size + k - 2], embedded)
        assert pairs.real[row].sum() == size + k - 2
        assert pairs.paired[row].sum() == size - 1
        for column in range(columns):
            learned = column + 2 < size and bool(batch["loss_mask"][row, column + 2])
            assert bool(pairs.learned[row, column]) == learned
            if column + 2 < size:
                assert torch.equal(pairs.targets[row, column], features[column + 1])
                assert pairs.answers[row, column] == ids[column + 2]
