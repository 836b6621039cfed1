"""Products with few rows in graphs, by the kernel: the same numbers, one call for the same rows, only where meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from falcon_hf.runtime.native_product_graphs import make_products_native, operation

from .graphs import as_compilers_see_it
from .helpers import drawn
from .test_native_products import allowed, pytestmark  # noqa: F401


def layer(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Two products of the same rows, each through a view of its own."""
    batch = x[None]
    return (F.linear(batch, first).relu() + F.linear(batch, second, bias))[0]


def traced(*inputs: torch.Tensor) -> tuple[Any, int]:
    graph = as_compilers_see_it(lambda x, first, second, bias: layer(x, first, second, bias), *inputs)
    found = make_products_native(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph, found


def weights(rows: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = ((rows, size), (48, size), (48, size), (48,))
    return [drawn(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 9, 32, 33])
def test_products_are_those_of_linear(rows, dtype):
    inputs = weights(rows, 32, dtype)
    graph, found = traced(*inputs)
    assert found == (2 if rows <= 32 else 0)
    calls = [node for node in graph.graph.nodes if node.target is operation()]
    assert [len(node.args[1]) for node in calls] == [2] * (rows <= 32)
    exact = layer(*(x.double() for x in inputs))
    tolerance = 1e-3 if dtype == torch.float32 else 0.05 * float(exact.abs().max())
    assert ((graph(*inputs).double() - exact).abs() <= tolerance).all()
    wrong = graph(inputs[0].flip(1), *inputs[1:])  # the control
    assert not ((wrong.double() - exact).abs() <= tolerance).all()
    assert graph(*inputs).shape == (rows, 48)


def test_other_dtypes_and_lengths_are_left_alone():
    assert traced(*weights(4, 32, torch.float64))[1] == 0
    assert traced(*weights(4, 24, torch.float32))[1] == 0


def test_the_operation_is_made_once_for_all_copies_of_the_code():
    own = operation()
    operation.cache_clear()  # as in a drafter's own copy of the code
    assert operation() is own
    x, weight = drawn(3, 32), drawn(20, 64, seed=1)[:, ::2]  # a weight that does not lie in one piece
    (y,) = operation()(x, [weight])
    exact = F.linear(x.double(), weight.double())
    assert ((y.double() - exact).abs() <= allowed(exact, torch.float32)).all()
