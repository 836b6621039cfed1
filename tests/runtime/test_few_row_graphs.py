"""Products with few rows in graphs: the same numbers, and only where they are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from falcon_hf.runtime.few_row_graphs import turn_products

from .graphs import as_compilers_see_it
from .helpers import drawn


def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias).relu()


def traced(*inputs: Any) -> tuple[Any, int]:
    """The graph of [`layer`] with its products turned, ready to run, and how many those are."""
    graph = as_compilers_see_it(layer if len(inputs) == 3 else lambda x, weight: layer(x, weight), *inputs)
    found = turn_products(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph, found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 16, 32, 33])
def test_products_are_those_of_linear(rows, bias):
    inputs = [drawn(rows, 24), drawn(40, 24, seed=1), *([drawn(40, seed=2)] if bias else [])]
    graph, found = traced(*inputs)
    assert found == (1 if 2 <= rows <= 32 else 0)
    exact = layer(*(x.double() for x in inputs))
    assert torch.allclose(graph(*inputs).double(), exact, atol=1e-5)
    assert graph(*inputs).shape == (rows, 40)
    wrong = graph(inputs[0].flip(1), *inputs[1:])  # the control
    assert not torch.allclose(wrong.double(), exact, atol=1e-5)
    turned = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default]
    assert [node.args[0].op for node in turned if found] == ["placeholder"] * found  # the weight, as it lies


def test_only_float32_products_with_whole_weights_are_turned():
    assert traced(drawn(4, 24).bfloat16(), drawn(40, 24).bfloat16())[1] == 0
    assert traced(drawn(4, 24).double(), drawn(40, 24).double())[1] == 0
    assert traced(drawn(4, 24), drawn(24, 40).t())[1] == 0  # W^T as it lies is fast already
    graph = as_compilers_see_it(lambda x, y: torch.addmm(x, y, y.t(), beta=2.0), drawn(4, 4), drawn(4, 9))
    assert turn_products(graph.graph) == 0
