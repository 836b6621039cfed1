"""Shared key heads in graphs: the same bits as repeated ones, and only where heads were repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from falcon_hf.runtime import shared_head_graphs
from falcon_hf.runtime.shared_head_graphs import kernel_shares_heads, share_heads

from .graphs import as_compilers_see_it
from .helpers import drawn


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """``[B, key heads, T, d]`` to ``[B, heads, T, d]``, as transformers has it."""
    rows, heads, length, size = x.shape
    return x[:, :, None].expand(rows, heads, times, length, size).reshape(rows, heads * times, length, size)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    times = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(query, repeated(key, times), repeated(value, times), attn_mask=mask)


def attend_wrongly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Heads in another order: the copies of all heads one after another."""
    tiled = [x.repeat(1, query.shape[1] // key.shape[1], 1, 1) for x in (key, value)]
    return F.scaled_dot_product_attention(query, *tiled, attn_mask=mask)


def inputs(heads: int, key_heads: int, rows: int = 1, nodes: int = 4, length: int = 33) -> list[torch.Tensor]:
    visible = drawn(rows, 1, nodes, length, seed=3) > 0
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    keys = [drawn(rows, key_heads, length, 16, seed=seed) for seed in (1, 2)]
    return [drawn(rows, heads, nodes, 16), *keys, mask]


KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def rewritten(function: Any, *given: torch.Tensor) -> tuple[Any, int]:
    graph = as_compilers_see_it(function, *given)
    assert len(graph.graph.find_nodes(op="call_function", target=KERNEL)) == 1
    found = share_heads(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph, found


@pytest.mark.parametrize("mask_heads", [False, True], ids=["one mask", "a mask a head"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (8, 1), (4, 2)])
def test_the_bits_are_those_of_repeated_heads(heads, key_heads, rows, mask_heads):
    query, key, value, mask = inputs(heads, key_heads, rows)
    if mask_heads:
        mask = mask.expand(rows, heads, *mask.shape[2:]).clone()
        mask[:, 0, :, 1:] = -torch.inf  # head 0 sees less
    given = [query, key, value, mask]
    graph, found = rewritten(attend, *given)
    assert found == kernel_shares_heads()
    assert not found or not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)
    assert torch.equal(graph(*given), attend(*given))
    assert not torch.equal(graph(query.roll(1, dims=1), key, value, mask), attend(*given))  # the control
    if key_heads > 1:
        assert not torch.equal(graph(*given), attend_wrongly(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near(dtype):
    given = [x.to(dtype) for x in inputs(9, 3, nodes=20)]
    graph, found = rewritten(attend, *given)
    assert found == kernel_shares_heads()
    exact = attend(*(x.double() for x in given))
    least = (attend(*given).double() - exact).abs().max()
    assert (graph(*given).double() - exact).abs().max() <= 1.5 * least


def test_what_is_not_repeated_head_by_head_stays():
    """Other orders of heads, other axes, other heads for keys and for values: not one of them is touched."""

    def whole_copies(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        copies = [x[:, None].expand(-1, 3, -1, -1, -1).reshape(1, 9, 33, 16) for x in (key, value)]
        return F.scaled_dot_product_attention(query, *copies, attn_mask=mask)

    def along_the_text(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        widened = [x[:, :, :, None].expand(-1, -1, -1, 3, -1).reshape(1, 9, 11, 16) for x in (key, value)]
        return F.scaled_dot_product_attention(query, *widened, attn_mask=mask)

    def heads_and_places(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> Any:
        mixed = [x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(1, 3, 99, 16) for x in (key, value)]
        return F.scaled_dot_product_attention(query[:, :3], *mixed, attn_mask=mask.repeat(1, 1, 1, 3))

    query, key, value, mask = inputs(9, 3)
    for function, given in (
        (attend_wrongly, (query, key, value, mask)),
        (whole_copies, (query, key, value, mask)),
        (heads_and_places, (query, key, value, mask)),
        (along_the_text, (query, key[:, :, :11], value[:, :, :11], mask[..., :11])),
    ):
        graph, found = rewritten(function, *given)
        assert found == 0
        assert torch.equal(graph(*given), function(*given))


def test_keys_and_values_of_different_heads_stay_repeated():
    def unequal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, repeated(key, 4), repeated(value, 2), attn_mask=mask)

    query, key, _, mask = inputs(8, 2)
    given = (query, key, drawn(1, 4, 33, 16, seed=2), mask)
    graph, found = rewritten(unequal, *given)
    assert found == 0
    assert torch.equal(graph(*given), unequal(*given))


def test_heads_that_do_not_lie_in_order_stay_repeated():
    def turned(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(query, key.transpose(-1, -2), value.transpose(-1, -2), mask)

    query, key, value, mask = inputs(9, 3, length=16)
    assert rewritten(turned, query, key, value, mask)[1] == 0


def test_only_a_kernel_that_knows_shared_heads_gets_them(monkeypatch):
    assert not kernel_shares_heads("2.8.1+cpu")
    assert all(kernel_shares_heads(version) for version in ("2.9.0", "2.10.0a0+git1", "2.13.0+cpu", "3.0"))
    monkeypatch.setattr(shared_head_graphs, "kernel_shares_heads", lambda: False)
    given = inputs(9, 3)
    graph, found = rewritten(attend, *given)
    assert found == 0
    assert torch.equal(graph(*given), attend(*given))
