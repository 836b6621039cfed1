"""Order, padding and pairs of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from falcon_hf.runtime.target import input_embeddings
from falcon_hf.training.batches import DialogueDataset, LengthGroupedOrder, collate, make_pairs
from falcon_hf.training.errors import TrainingError
from falcon_hf.training.features import compute_features
from falcon_hf.training.initialisation import (
    embedding_scale,
    near_identity_start,
    start_from_target_layers,
    typical_sizes,
)

from ..runtime.families import tiny_family
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


def test_near_identity_start_hands_the_feature_on(tiny_target, tiny_drafter):
    drafter = tiny_drafter(tiny_target(VOCAB), 2, "linear", embedding_scale=3.0, initializer_range=0.02)
    near_identity_start(drafter, 2.0, 0.5)
    features, embeddings = torch.randn(1, 50, 64) * 2.0, torch.randn(1, 50, 64) * 0.5
    with torch.no_grad():
        fused, _ = drafter.fusion(features, embeddings)
        alone, _ = drafter.fusion(features, torch.zeros_like(embeddings))
    assert torch.nn.functional.cosine_similarity(fused, features, dim=-1).mean() > 0.8
    assert float((fused - alone).std()) == pytest.approx(0.34 * 2.0, rel=0.15)


def test_layers_can_start_as_the_targets(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "linear", num_hidden_layers=2)
    start_from_target_layers(drafter, target)
    for layer, source in zip(drafter.layers, target.model.layers, strict=True):
        assert torch.equal(layer.attention.k_proj.weight, source.self_attn.k_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight, source.mlp.down_proj.weight)
        assert torch.equal(layer.mlp_norm.weight, source.post_attention_layernorm.weight)
    one = tiny_drafter(target, 2, "linear")
    start_from_target_layers(one, target)
    assert torch.equal(one.layers[0].attention.q_proj.weight, target.model.layers[1].self_attn.q_proj.weight)
    with pytest.raises(TrainingError, match=r"mlp.gate_proj"):
        start_from_target_layers(tiny_drafter(target, 2, "linear", intermediate_size=8), target)
    with pytest.raises(TrainingError, match="no layers"):
        start_from_target_layers(tiny_drafter(target, 2, "linear", num_hidden_layers=3), target)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("qwen2", {}, "has a bias and the drafter's attention.q_proj none: set attention_bias"),
        ("qwen2", {"attention_bias": True}, None),
        ("qwen3", {}, r"have self_attn\.k_norm\.weight, which"),
        ("gemma2", {}, "norm is of another kind"),
    ],
)
def test_a_layer_that_cannot_be_copied_whole_is_refused(tiny_drafter, family, config, words):
    target = tiny_family(family)
    if family == "qwen2":
        torch.nn.init.normal_(target.model.layers[-1].self_attn.q_proj.bias)
    drafter = tiny_drafter(target, 2, "linear", **config)
    if words is not None:
        with pytest.raises(TrainingError, match=words):
            start_from_target_layers(drafter, target)
        return
    start_from_target_layers(drafter, target)
    assert torch.equal(drafter.layers[0].attention.q_proj.bias, target.model.layers[-1].self_attn.q_proj.bias)


def test_sizes_and_scale():
    one, other = typical_sizes([torch.randn(400, 64) * 2.0], [torch.randn(400, 64) * 0.1])
    assert one == pytest.approx(2.0, rel=0.05)
    assert other == pytest.approx(0.1, rel=0.05)
    assert embedding_scale(1.93, 0.136) == 9.9
