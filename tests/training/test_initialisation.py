"""Where a new drafter starts: near the identity, or with the target's last layers."""

from __future__ import annotations

import copy

import pytest
import torch

from falcon_hf.training.errors import TrainingError
from falcon_hf.training.initialisation import (
    embedding_scale,
    near_identity_start,
    start_from_target_layers,
    typical_sizes,
)

from ..runtime.families import tiny_family
from .conftest import VOCAB


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
        ("granite", {}, "GraniteForCausalLM's layers compute something else"),
        ("smollm3", {}, "compute something else"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}, "keep the target's heads"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}, "positions"),
        ("llama", {}, None),
        ("llama", {"input_norm": False, "block_mixing": True}, None),
    ],
)
def test_a_layer_that_cannot_be_copied_whole_is_refused(tiny_drafter, family, config, words):
    target = tiny_family(family)
    last = target.model.layers[-1]
    if family == "qwen2":
        torch.nn.init.normal_(last.self_attn.q_proj.bias)
    drafter, state = tiny_drafter(target, 2, "linear", **config), torch.get_rng_state()
    target(torch.ones(1, 3, dtype=torch.long))  # transformers installs hooks of its own at the first forward
    hooks = set(last._forward_hooks), set(last._forward_pre_hooks)
    if words is not None:
        with pytest.raises(TrainingError, match=words):
            start_from_target_layers(drafter, target)
        return
    start_from_target_layers(drafter, target)
    ours, theirs = drafter.layers[0].attention.q_proj, last.self_attn.q_proj
    assert torch.equal(ours.weight, theirs.weight)
    assert family != "qwen2" or torch.equal(ours.bias, theirs.bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert (set(last._forward_hooks), set(last._forward_pre_hooks)) == hooks


def test_a_target_in_half_precision_is_copied(tiny_target, tiny_drafter):
    """Its layer and a copy differ by rounding, which is not taken for another computation."""
    target = copy.deepcopy(tiny_target(VOCAB)).bfloat16()
    drafter = tiny_drafter(target, 2, "linear", num_hidden_layers=2)
    start_from_target_layers(drafter, target)
    assert drafter.dtype == torch.float32
    assert torch.equal(drafter.layers[1].mlp.up_proj.weight, target.model.layers[1].mlp.up_proj.weight.float())


def test_sizes_and_scale():
    one, other = typical_sizes([torch.randn(400, 64) * 2.0], [torch.randn(400, 64) * 0.1])
    assert one == pytest.approx(2.0, rel=0.05)
    assert other == pytest.approx(0.1, rel=0.05)
    assert embedding_scale(1.93, 0.136) == 9.9
