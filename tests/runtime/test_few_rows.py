"""Products with few rows: right for every number of rows, and only where and while they are wanted."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_hf.runtime import few_rows, fused_norms
from falcon_hf.runtime.few_rows import FewRowProducts, few_row_linear, is_compiled

from .helpers import drawn
from .test_static_cache import CROPPABLE

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """As on a machine without a compiler: what there is one for is test_native_products.py's."""
    monkeypatch.setattr(few_rows, "takes_natively", lambda x, weight: False)
    for module in (few_rows, fused_norms):
        monkeypatch.setattr(module, "compiled_kernel", lambda: None)


@pytest.fixture
def no_half_kernels(monkeypatch):
    monkeypatch.setattr(few_rows, "multiplies_fast", lambda device, dtype: dtype == torch.float32)
    few_rows._has_instructions.cache_clear()
    yield
    few_rows._has_instructions.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The number of rows of each product that this module made."""
    rows: list[int] = []
    own = few_rows._turned

    def noting(x, weight):
        rows.append(x.shape[0])
        return own(x, weight)

    monkeypatch.setattr(few_rows, "_turned", noting)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", range(1, 36))
def test_products_are_those_of_linear(calls, rows, bias):
    x, weight, added = drawn(rows, 24), drawn(40, 24, seed=1), drawn(40, seed=2) if bias else None
    y = few_row_linear(x, weight, added)
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert calls == ([rows] if 2 <= rows <= 32 else [])
    assert y.shape == (rows, 40)
    assert y.is_contiguous()
    assert torch.allclose(y.double(), exact, atol=1e-5)
    assert not torch.allclose(few_row_linear(x.flip(1), weight, added).double(), exact, atol=1e-5)  # the control


def test_leading_dimensions_stay(calls):
    x, weight = drawn(2, 3, 8), drawn(5, 8, seed=1)
    assert torch.allclose(few_row_linear(x, weight), F.linear(x, weight), atol=1e-5)
    assert calls == [6]


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_not_copied_for_each_row_of_a_batch(dtype):
    """A batch's last columns lie apart; torch's linear would then multiply row by row, by a weight for each row."""
    x, weight = torch.randn(4, 3, 16).to(dtype)[:, -2:], torch.randn(24, 16).to(dtype)
    with Operations() as of_torch:
        expected = F.linear(x[:, None], weight)
    assert "aten::bmm" in of_torch.names, "the control"
    with Operations() as ours:
        torch.testing.assert_close(few_row_linear(x[:, None], weight), expected)
    assert "aten::bmm" not in ours.names


def test_widened_products_are_rounded_once(no_half_kernels):
    x, weight = drawn(7, 24).bfloat16(), drawn(40, 24, seed=1).bfloat16()
    y = few_row_linear(x, weight)
    assert y.dtype == torch.bfloat16
    exact = F.linear(x.double(), weight.double())
    nearest = exact.to(torch.bfloat16)
    assert (y == nearest).float().mean() > 0.98  # the others lie in the middle between two numbers
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8).all()
    twice = sum(F.linear(x[:, part], weight[:, part]) for part in (slice(12), slice(12, 24)))
    assert (twice == nearest).float().mean() < 0.9  # the control: sums in half precision


def test_a_widened_weight_is_widened_in_slices(no_half_kernels, monkeypatch):
    x, weight = drawn(6, 24).bfloat16(), drawn(41, 24, seed=1).bfloat16()
    whole = few_row_linear(x, weight)
    monkeypatch.setattr(few_rows, "_SLICE_BYTES", 4 * 24 * 10)  # ten rows: five slices, the last of one
    assert torch.equal(few_row_linear(x, weight), whole)


def test_few_rows_of_half_precision_and_other_dtypes_stay_torchs(no_half_kernels, calls):
    weight = drawn(40, 24).bfloat16()
    for x in (drawn(4, 24).bfloat16(), drawn(33, 24).bfloat16()):
        assert torch.equal(few_row_linear(x, weight), F.linear(x, weight))
    wide = drawn(4, 24).double()
    assert torch.equal(few_row_linear(wide, weight.double()), F.linear(wide, weight.double()))
    assert calls == []


def test_gradients_pass(calls):
    x, weight = drawn(4, 8).requires_grad_(), drawn(5, 8, seed=1).requires_grad_()
    few_row_linear(x, weight).square().sum().backward()
    mine = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    F.linear(x, weight).square().sum().backward()
    assert calls == [4]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, (x.grad, weight.grad), strict=True))


class Model(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_model_is_as_it_was_after_and_after_an_error(calls):
    model, x = Model(), drawn(4, 8)
    before = model(x)
    few = FewRowProducts(model)
    assert calls == []
    with few:
        inside = model(x)
    assert calls == [4, 4]
    assert torch.allclose(inside, before, atol=1e-5)
    with pytest.raises(RuntimeError), few:
        model(drawn(4, 9))
    calls.clear()
    assert torch.equal(model(x), before)
    assert calls == []
    assert all("forward" not in vars(module) for module in model.modules())


def test_layers_with_a_forward_of_their_own_keep_it(calls):
    model = Model()
    own = model.first.forward
    model.first.forward = lambda x: own(x) + 1
    wanted = model(drawn(4, 8))
    with FewRowProducts(model):
        assert torch.allclose(model(drawn(4, 8)), wanted, atol=1e-5)
    assert calls == [4]  # the second's alone
    assert torch.equal(model(drawn(4, 8)), wanted)


def test_autocast_chooses_the_dtype_as_it_does_elsewhere(calls):
    layer = nn.Linear(16, 24)
    few = FewRowProducts(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = layer(drawn(4, 16))
        with few:
            assert torch.equal(layer(drawn(4, 16)), wanted)
    assert wanted.dtype == torch.bfloat16
    assert calls == []


def test_calls_that_overlap_both_have_them(calls):
    """Two threads' on one target: what the first lent is no forward of the module's own."""
    model, x = Model(), drawn(4, 8)
    before = model(x)
    with FewRowProducts(model):
        later = FewRowProducts(model)
        assert len(later._forwards) == 2
        with later:
            pass
    calls.clear()
    with later:
        assert torch.allclose(model(x), before, atol=1e-5)
    assert calls == [4, 4]
    assert all("forward" not in vars(module) for module in model.modules())


def test_kernels_that_another_call_lent_are_no_forwards_of_their_own(tiny_target):
    model = copy.deepcopy(tiny_target(24))
    first = FewRowProducts(model)
    with first:
        assert len(FewRowProducts(model)._forwards) == len(first._forwards) > 4


def test_a_model_that_accelerate_has_spread_is_not_compiled():
    model = Model()
    add_hook_to_module(model, ModelHook())
    assert not is_compiled(model)
    model.compile(backend="eager")
    assert is_compiled(model)


@pytest.mark.parametrize("how", ["module.compile()", "forward"])
def test_a_compiled_model_keeps_its_graph(calls, how):
    model = Model()
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    with FewRowProducts(model):
        model(drawn(4, 8))
    assert calls == []


def test_generation_verifies_and_drafts_with_them_but_prefills_as_generate_does(calls, tiny_target, tiny_drafter):
    target = copy.deepcopy(tiny_target(24))
    drafter = tiny_drafter(target, 2, "linear")
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    target.generate(PROMPT, assistant_model=drafter, max_new_tokens=1, do_sample=False)
    prefilled = len(calls)
    out = target.generate(PROMPT, assistant_model=drafter, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, plain)
    assert len(calls) - prefilled > 12 * target.config.num_hidden_layers
    assert all("forward" not in vars(module) for module in [*target.modules(), *drafter.modules()])


@pytest.mark.skipif(not CROPPABLE, reason="this transformers refuses static caches: test_static_cache.py holds that")
def test_what_generate_compiles_keeps_the_compilers_products(calls, tiny_target, tiny_drafter, monkeypatch):
    target = copy.deepcopy(tiny_target(24))
    drafter = tiny_drafter(target, 2, "linear")
    monkeypatch.setattr(FewRowProducts, "__enter__", lambda self: entered.append(self.model))
    entered: list[nn.Module] = []
    for compiles in (False, True):
        entered.clear()
        monkeypatch.setattr(target, "_valid_auto_compile_criteria", lambda *_, compiles=compiles: compiles)
        monkeypatch.setattr(target, "get_compiled_call", lambda config: target)
        target.generate(
            PROMPT, assistant_model=drafter, max_new_tokens=6, do_sample=False, cache_implementation="static"
        )
        assert any(model is drafter for model in entered)
        assert any(model is target for model in entered) is not compiles
