"""Layers multiplied by the kernel with little Python: right, and everything else is left to the other way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from falcon_hf.runtime import few_rows
from falcon_hf.runtime.few_rows import MOST_ROWS, FewRowProducts
from falcon_hf.runtime.native_kernel import compiled_kernel
from falcon_hf.runtime.native_linear import NativeLinear

from .helpers import drawn
from .test_native_products import SERVED, Subclass, allowed

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])

pytestmark = pytest.mark.skipif(not SERVED, reason="the kernel needs Linux, AVX2 and a C++ compiler")


def native(layer: nn.Linear) -> tuple[NativeLinear, list[torch.Tensor]]:
    """The layer's forward by the kernel, and what it leaves to the other way."""
    left: list[torch.Tensor] = []
    kernel = compiled_kernel()
    assert kernel is not None

    def otherwise(x: torch.Tensor) -> torch.Tensor:
        left.append(x)
        return F.linear(x, layer.weight, layer.bias)

    return NativeLinear(layer, kernel, MOST_ROWS, otherwise), left


def layer_of(size: int, outputs: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(size, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(drawn(outputs, size, seed=1))
    return layer.to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 6, 64), (2, 5, 32), (32, 32), (48,)])
@torch.no_grad()
def test_products_are_those_of_the_layer(shape, dtype, bias):
    layer, x = layer_of(shape[-1], 40, dtype, bias), drawn(*shape).to(dtype)
    forward, left = native(layer)
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    y = forward(x)
    assert (y.dtype, y.shape, left) == (dtype, (*shape[:-1], 40), [])
    error = 2 * allowed(exact, dtype) + (2**-6 if bias and dtype == torch.bfloat16 else 0)  # it is rounded again
    assert ((y.double() - exact).abs() <= error).all()
    assert not ((forward(x.flip(-1)).double() - exact).abs() <= error).all()  # the control


@torch.no_grad()
def test_whatever_else_a_layer_may_be_given_is_made_the_other_way():
    layer = layer_of(32, 40)
    forward, left = native(layer)
    apart = drawn(4, 64)[:, ::2]
    given = [drawn(MOST_ROWS + 1, 32), drawn(0, 32), apart, drawn(4, 32).as_subclass(Subclass)]
    for x in given:
        assert torch.equal(forward(x), F.linear(x, layer.weight))
    assert all(own is x for own, x in zip(left, given, strict=True))
    for x in (drawn(4, 32).bfloat16(), drawn(4, 48)):
        with pytest.raises(RuntimeError):  # as torch says
            forward(x)
    assert forward(drawn(4, 32).to("meta")).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(drawn(4, 32)).dtype == torch.bfloat16
    assert len(left) == 8
    with torch.enable_grad():
        assert forward(drawn(4, 32)).requires_grad
    assert len(left) == 9


@pytest.mark.parametrize("change", [lambda weight: weight.double(), lambda weight: weight[:, :16], torch.t])
@torch.no_grad()
def test_a_weight_that_has_become_another_is_not_read_as_it_was(change):
    layer = layer_of(32, 32)
    forward, left = native(layer)
    layer.weight.data = change(layer.weight.data)
    x = drawn(4, layer.weight.shape[1]).to(layer.weight.dtype)
    assert torch.equal(forward(x), F.linear(x, layer.weight))
    assert len(left) == 1


@torch.no_grad()
def test_a_weight_that_has_become_a_subclass_is_not_read():
    layer = layer_of(32, 40)
    forward, left = native(layer)
    own = layer.weight
    layer.weight = nn.Parameter(own.as_subclass(Subclass))  # as quantising in place does
    assert type(layer.weight) is Subclass
    forward(drawn(4, 32))
    assert len(left) == 1
    layer.weight = own  # the control
    forward(drawn(4, 32))
    assert len(left) == 1


@torch.no_grad()
def test_a_compiler_that_traces_sees_torchs_operations(monkeypatch):
    forward, left = native(layer_of(32, 40))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    forward(drawn(4, 32))
    assert len(left) == 1


@torch.no_grad()
def test_a_pruned_bias_is_added():
    layer = layer_of(32, 40, bias=True)
    prune.l1_unstructured(layer, "bias", amount=0.5)
    x = drawn(4, 32)
    with FewRowProducts(layer):
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
        assert not torch.allclose(layer(x), F.linear(x, layer.weight), atol=1e-5)  # the control


def test_a_model_is_lent_them_for_weights_that_the_kernel_takes():
    model = nn.Sequential(layer_of(32, 40), layer_of(40, 24), layer_of(24, 8).double())  # 40 is no multiple of 16
    few = FewRowProducts(model)
    with few:
        assert [type(vars(module)["forward"]) is NativeLinear for module in model] == [True, False, False]
    assert all("forward" not in vars(module) for module in model)


def test_generation_drafts_and_verifies_with_them_but_prefills_as_generate_does(monkeypatch, tiny_target, tiny_drafter):
    target = copy.deepcopy(tiny_target(24))
    drafter = tiny_drafter(target, 2, "linear")
    calls: list[int] = []

    class Noting(NativeLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x.numel() // x.shape[-1])
            return super().__call__(x)

    monkeypatch.setattr(few_rows, "NativeLinear", Noting)
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert calls == []
    assert torch.equal(target.generate(PROMPT, assistant_model=drafter, max_new_tokens=12, do_sample=False), plain)
    assert len(calls) > 12 * target.config.num_hidden_layers
    calls.clear()
    with FewRowProducts(target):  # plain decoding with these products
        assert torch.equal(target.generate(PROMPT, max_new_tokens=12, do_sample=False), plain)
    assert set(calls) == {1, PROMPT.shape[1]}
