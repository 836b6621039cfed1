"""Products with few rows in graphs, by the kernel: the same numbers, one call for the same rows, only where meant."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from falcon_hf.runtime import few_rows, native_product_graphs
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


@pytest.fixture(autouse=True)
def no_instructions(monkeypatch):
    """As on a CPU without instructions for bfloat16."""
    monkeypatch.setattr(few_rows, "_has_instructions", lambda dtype: False)


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


def test_a_weight_that_comes_later_is_multiplied_alone():
    def late(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        before = F.linear(x, first)
        return F.linear(x, (second * before.mean()).contiguous())  # a weight of the first product's making

    inputs = [drawn(4, 32), drawn(40, 32, seed=1), drawn(24, 32, seed=2)]
    graph = as_compilers_see_it(late, *inputs)
    assert make_products_native(graph.graph) == 2
    graph.graph.lint()
    graph.recompile()
    assert [len(node.args[1]) for node in graph.graph.nodes if node.target is operation()] == [1, 1]
    assert torch.allclose(graph(*inputs), late(*inputs), atol=1e-4)


def test_half_precision_is_left_to_a_cpu_that_has_instructions_for_it_unless_there_are_tiles(monkeypatch):
    monkeypatch.setattr(few_rows, "_has_instructions", lambda dtype: dtype == torch.bfloat16)
    for tiles in (False, True):
        monkeypatch.setattr(few_rows, "takes_tiles", lambda weight, tiles=tiles: tiles and weight.shape[0] == 48)
        assert traced(*weights(4, 32, torch.bfloat16))[1] == 2 * tiles
    assert traced(*weights(4, 32, torch.float32))[1] == 2


def test_the_operation_serves_all_copies_of_the_code_and_any_number_of_rows():
    """A drafter's own copy of the code, as transformers loads it, finds the operation made."""
    spec = importlib.util.spec_from_file_location("falcon_hf.runtime.another_copy", native_product_graphs.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.make_products_native is not make_products_native
    assert copy.operation() is operation()
    for rows in (3, 33):
        x, weight = drawn(rows, 32), drawn(20, 64, seed=1)[:, ::2]  # a weight that does not lie in one piece
        (y,) = operation()(x, [weight])
        exact = F.linear(x.double(), weight.double())
        assert ((y.double() - exact).abs() <= allowed(exact, torch.float32)).all()
