"""Products with few rows in compiled graphs: the same numbers, only where they are meant, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._decomp import core_aten_decompositions
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from falcon_hf import compiled
from falcon_hf.runtime import few_row_graphs
from falcon_hf.runtime.few_row_graphs import FewRowGraphs, turn_products

from .families import tiny_family
from .helpers import assert_same_text, prompt_ids
from .test_batch import VOCAB
from .test_static_cache import CROPPABLE


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_compilers_see_it(function: Any, *inputs: Any) -> Any:
    """The graph in core operations, as it is when code is made of it."""
    bound = (lambda x, weight: function(x, weight)) if len(inputs) == 2 else function
    return make_fx(bound, core_aten_decompositions(), tracing_mode="fake")(*inputs)


def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias).relu()


def traced(*inputs: Any) -> tuple[Any, int]:
    """The graph of [`layer`] with its products turned, ready to run, and how many those are."""
    graph = as_compilers_see_it(layer, *inputs)
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


def test_the_compilers_settings_are_as_they_were(tiny_target, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert config.post_grad_custom_pre_pass is None
    graphs = FewRowGraphs(tiny_target(VOCAB))

    def fail() -> None:
        assert config.post_grad_custom_pre_pass is few_row_graphs._custom_pass()
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError), graphs:
            fail()
        assert config.post_grad_custom_pre_pass is None

    def own(graph: Any) -> None:
        del graph

    with config.patch(post_grad_custom_pre_pass=own), graphs:
        assert config.post_grad_custom_pre_pass is own
    with FewRowGraphs(copy.deepcopy(tiny_target(VOCAB)).to("meta")):
        assert config.post_grad_custom_pre_pass is None


@pytest.mark.slow
@pytest.mark.skipif(not CROPPABLE, reason="this transformers refuses static caches: test_static_cache.py holds that")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tree", [[[0], [1], [0, 0]], [[0], [0, 0]]], ids=["four rows", "three, padded"])
def test_a_compiled_verification_has_them(tiny_drafter, monkeypatch, tree):
    """The real compiler: one graph of many lengths, the texts plain's, sampled too. qwen2 has layers with a bias."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    found: list[int] = []
    own = few_row_graphs.turn_products
    monkeypatch.setattr(few_row_graphs, "turn_products", lambda graph: found.append(own(graph)))
    target = copy.deepcopy(tiny_family("qwen2"))
    drafter = tiny_drafter(target, 2, "linear", tree=tree)
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        for seed, sampled in ((0, False), (1, True), (2, False)):
            assert_same_text(
                target, drafter, prompt_ids(VOCAB, 5 + seed, seed), do_sample=sampled, max_new_tokens=20,
                **compiled(40, drafter),
            )  # fmt: skip
    torch._dynamo.reset()
    linear = sum(type(module) is torch.nn.Linear for module in target.modules())
    assert [count for count in found if count] == [linear]
