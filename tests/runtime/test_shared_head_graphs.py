"""Shared key heads in graphs: the same bits as repeated ones, and only where heads were repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from falcon_hf.runtime.shared_head_graphs import share_heads

from .helpers import as_compilers_see_it, drawn


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


def rewritten(function: Any, *given: torch.Tensor) -> tuple[Any, int]:
    graph = as_compilers_see_it(function, *given)
    found = share_heads(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph, found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (8, 1), (4, 2)])
def test_the_bits_are_those_of_repeated_heads(heads, key_heads, rows):
    given = inputs(heads, key_heads, rows)
    graph, found = rewritten(attend, *given)
    assert found == 1
    assert not [node for node in graph.graph.nodes if node.target is torch.ops.aten.expand.default]
    assert torch.equal(graph(*given), attend(*given))
    query, *others = given
    assert not torch.equal(graph(query.roll(1, dims=1), *others), attend(*given))  # the control: heads change places
    if key_heads > 1:
        assert not torch.equal(graph(*given), attend_wrongly(*given))


def test_what_is_not_repeated_head_by_head_stays():
    given = inputs(6, 3)
    graph, found = rewritten(attend_wrongly, *given)
    assert found == 0
    assert torch.equal(graph(*given), attend_wrongly(*given))

    def other_axis(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        widened = [x[:, :, :, None].expand(-1, -1, -1, 3, -1).reshape(1, 9, 11, 16) for x in (key, value)]
        return F.scaled_dot_product_attention(query, *widened, attn_mask=mask)

    query, key, value, _ = inputs(9, 3)
    mask = torch.zeros(1, 1, 4, 11)
    given = [query, key[:, :, :11], value[:, :, :11], mask]
    graph, found = rewritten(other_axis, *given)
    assert found == 0
    assert torch.equal(graph(*given), other_axis(*given))


def test_heads_that_do_not_lie_in_order_stay_repeated():
    def turned(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(query, key.transpose(-1, -2), value.transpose(-1, -2), mask)

    query, key, value, mask = inputs(9, 3, length=16)
    assert rewritten(turned, query, key, value, mask)[1] == 0
