"""Attention with shared heads: the same bits as with repeated ones, and only while a tree is verified."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from falcon_hf.runtime.shared_heads import SharedHeads

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def shared(monkeypatch) -> list[int]:
    """Queries of each attention with shared heads."""
    queries: list[int] = []
    whole = F.scaled_dot_product_attention

    def counted(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if options.get("enable_gqa") and options.get("attn_mask") is not None:
            queries.append(query.shape[2])
        return whole(query, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return queries


def drawn(key_heads: int, groups: int, queries: int, keys: int, width: int, dtype: torch.dtype, rows: int = 2) -> Any:
    generator = torch.Generator().manual_seed(key_heads * keys + queries)
    query = torch.randn(rows, key_heads * groups, queries, width, generator=generator).to(dtype)
    key, value = torch.randn(2, rows, key_heads, keys, width, generator=generator).to(dtype)
    mask = torch.rand(rows, 1, queries, keys, generator=generator) < 0.7
    mask[..., 0] = True
    return SimpleNamespace(num_key_value_groups=groups), query, key, value, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key_heads", "groups", "width"), [(3, 3, 64), (1, 8, 80), (2, 4, 256)])
@pytest.mark.parametrize("queries", [2, 4, 40])
def test_the_same_bits(tiny_target, shared, dtype, key_heads, groups, width, queries):
    heads = SharedHeads(tiny_target(24))
    for keys in (queries + 8, 130, 600):
        module, *tensors = drawn(key_heads, groups, queries, keys, width, dtype)
        for scaling in (None, 0.3):
            wanted, _ = sdpa_attention_forward(module, *tensors, scaling=scaling)
            assert torch.equal(heads.forward(module, *tensors, scaling=scaling)[0], wanted)
        query, key, value, mask = tensors
        wrong = heads.forward(module, query.flip(1), key, value, mask, scaling=0.3)[0]
        assert not torch.equal(wrong, wanted)
    assert len(shared) == 9


def test_one_conversion_of_a_mask_for_all_layers_but_not_for_another_mask(tiny_target):
    heads = SharedHeads(tiny_target(24))
    module, query, key, value, mask = drawn(2, 2, 4, 20, 32, torch.float32)
    first, again = heads._additive(mask, torch.float32), heads._additive(mask, torch.float32)
    assert first is again
    other = torch.ones_like(mask)
    assert torch.equal(
        heads.forward(module, query, key, value, other)[0], sdpa_attention_forward(module, query, key, value, other)[0]
    )


@pytest.mark.parametrize("change", ["no mask", "additive mask", "one query", "own heads"])
def test_all_else_is_transformers_own(tiny_target, shared, change):
    groups = 1 if change == "own heads" else 2
    module, query, key, value, mask = drawn(2, groups, 1 if change == "one query" else 4, 20, 32, torch.float32)
    if change == "no mask":
        mask = None
    elif change == "additive mask":
        mask = torch.zeros(mask.shape)
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask)
    assert torch.equal(SharedHeads(tiny_target(24)).forward(module, query, key, value, mask)[0], wanted)
    assert shared == []


def test_other_devices_models_that_pass_through_are_left_alone(tiny_target, shared):
    module, *tensors = drawn(2, 2, 4, 20, 32, torch.float32)
    with SharedHeads(tiny_target(24)):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, *(tensor.to("meta") for tensor in tensors))
        assert shared == []
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors)
    assert shared == [4]


def test_trees_are_verified_with_it_and_nothing_else_is(tiny_target, tiny_drafter, shared):
    target = tiny_target(24)
    assert target.config.num_key_value_heads < target.config.num_attention_heads
    drafter = tiny_drafter(target, 2, "linear")
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert shared == []
    assert torch.equal(target.generate(PROMPT, assistant_model=drafter, max_new_tokens=12, do_sample=False), plain)
    rounds = drafter.last_generation.rounds
    assert len(shared) >= (rounds - 1) * target.config.num_hidden_layers > 0
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_the_registry_is_as_it_was_whatever_happens(tiny_target, monkeypatch):
    heads = SharedHeads(tiny_target(24))

    def fail() -> None:
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] == heads.forward
        raise RuntimeError

    with pytest.raises(RuntimeError), heads:
        fail()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with heads, SharedHeads(tiny_target(24)):  # as by two threads
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] == heads.forward
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    def own(*arguments: Any, **options: Any) -> Any:
        return sdpa_attention_forward(*arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own)
    with heads:
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own


def test_a_compiled_target_keeps_its_graph(tiny_target):
    target = copy.deepcopy(tiny_target(24))
    target.forward = torch.compile(target.forward, backend="eager")
    with SharedHeads(target):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
