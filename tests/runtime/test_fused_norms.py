"""Fused norms: the same numbers where they are the same norm, and not used where they are not."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from falcon_hf.runtime import fused_norms
from falcon_hf.runtime.few_rows import FewRowProducts
from falcon_hf.runtime.fused_norms import NativeNorm, fused_norm

from .helpers import drawn, prompt_ids
from .test_native_products import SERVED


def norm(kind: type[nn.Module] = LlamaRMSNorm, size: int = 24, epsilon: float = 1e-5) -> nn.Module:
    module = kind(size, eps=epsilon)
    nn.init.uniform_(module.weight, 0.2, 2, generator=torch.Generator().manual_seed(3))
    return module


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 4, 24), (2, 3, 5, 24), (24,), (1, 4, 48), (2, 3, 5, 48), (48,)])
@torch.no_grad()
def test_the_same_numbers(kind, shape):
    module = norm(kind, shape[-1])
    forward = fused_norm(module)
    assert (type(forward) is NativeNorm) is (SERVED and shape[-1] == 48)
    for scale in (1e-4, 1, 1e3):  # the least is where epsilon counts
        x = scale * drawn(*shape)
        exact = module.double()(x.double())
        module.float()
        assert torch.allclose(forward(x).double(), exact, rtol=1e-6, atol=1e-7 * scale)
        other = norm(kind, shape[-1], epsilon=1e-2)
        assert scale > 1e-4 or not torch.allclose(fused_norm(other)(x).double(), exact, rtol=1e-2)  # the control


class OtherRMSNorm(LlamaRMSNorm):
    """Looks the same, and is another."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.clamp(max=4))


class GatedRMSNorm(LlamaRMSNorm):
    """May be given another tensor."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class ScaledRMSNorm(LlamaRMSNorm):
    """Has an attribute more."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.scale = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(hidden_states)


class ShapedRMSNorm(LlamaRMSNorm):
    """Reads groups of eight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.view(-1, 3, 5, 8))


class FactorRMSNorm(LlamaRMSNorm):
    """Each instance has its own factor; the class's does nothing."""

    factor = 1.0

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.factor = 3.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.factor * super().forward(hidden_states)


def test_other_norms_and_other_dtypes_stay_their_own():
    assert fused_norm(norm()) is not None
    for other in (
        norm(GemmaRMSNorm),
        norm(OtherRMSNorm),
        norm(GatedRMSNorm),
        norm(ScaledRMSNorm),
        norm(ShapedRMSNorm),
        norm(FactorRMSNorm),
        nn.RMSNorm(24, eps=1e-5),
        nn.LayerNorm(24),
        nn.Linear(24, 24),
        norm().bfloat16(),
        norm().to("meta"),
    ):
        assert fused_norm(other) is None, type(other)


class LateRMSNorm(LlamaRMSNorm):
    """Rounds once, after the weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(hidden_states.dtype)


needs_kernel = pytest.mark.skipif(not SERVED, reason="the kernel needs Linux, AVX2 and a C++ compiler")


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 16, 48), (2, 3, 5, 64), (576,)])
@torch.no_grad()
def test_half_precision_is_rounded_where_the_family_rounds(shape):
    module = norm(size=shape[-1]).bfloat16()
    forward = fused_norm(module)
    assert type(forward) is NativeNorm
    for scale in (1e-4, 1, 1e3):
        x = (scale * drawn(*shape)).bfloat16()
        ours, theirs = forward(x), module(x)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert (ours == theirs).float().mean() > 0.98  # the sum's order decides the others
        torch.testing.assert_close(ours, theirs)
        late = LateRMSNorm.forward(module, x)
        assert (late == theirs).float().mean() < 0.9  # the control
    late = norm(LateRMSNorm, 48)
    assert fused_norm(late) is not None
    assert fused_norm(late.bfloat16()) is None
    assert fused_norm(norm(GemmaRMSNorm, 48).bfloat16()) is None


@needs_kernel
def test_whatever_else_a_norm_may_be_given_is_made_without_the_kernel():
    module = norm(size=48)
    forward, apart = fused_norm(module), drawn(4, 96)[:, ::2]
    for x in (drawn(4, 48).bfloat16(), drawn(4, 48).double(), drawn(2000, 48), drawn(0, 48), apart):
        torch.testing.assert_close(forward(x), module(x), rtol=1e-6, atol=1e-6)
    assert forward(drawn(4, 48)).requires_grad
    with torch.no_grad():
        for x in (drawn(4, 32), drawn(4, 48).to("meta")):
            with pytest.raises(RuntimeError):  # as torch says
                forward(x)
        module.weight.data = module.weight.data.double()
        assert forward(drawn(4, 48)).dtype == torch.float64


def test_without_the_kernel_float32_is_torchs_own_operation(monkeypatch):
    monkeypatch.setattr(fused_norms, "compiled_kernel", lambda: None)
    assert type(fused_norm(norm(size=48))) is functools.partial
    assert fused_norm(norm(size=48).bfloat16()) is None


def test_another_default_dtype_does_not_hide_a_difference():
    class UntriedRMSNorm(OtherRMSNorm):
        pass

    torch.set_default_dtype(torch.float64)
    try:
        assert fused_norm(norm(UntriedRMSNorm).float()) is None
        assert fused_norm(norm().float()) is not None
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_precision_in_a_float32_norm_is_rounded_as_the_family_does():
    module = norm()
    x = drawn(4, 24).bfloat16()
    assert torch.equal(fused_norm(module)(x), module(x))


def test_a_norm_with_a_forward_of_its_own_keeps_it():
    model = nn.Sequential(norm())
    model[0].forward = functools.partial(torch.mul, 2)
    with FewRowProducts(model):
        assert torch.equal(model(drawn(4, 24)), 2 * drawn(4, 24))


def test_trees_are_verified_with_them_and_plain_decoding_is_not(tiny_target, tiny_drafter, monkeypatch):
    rows: list[int] = []
    own, native = fused_norms.plain_norm, NativeNorm.__call__

    def noting(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows.extend(x.shape[1:2] if x.dim() == 3 else [])  # tried with two dimensions
        return native(module, x) if isinstance(module, NativeNorm) else own(module, x)

    monkeypatch.setattr(fused_norms, "plain_norm", noting)
    monkeypatch.setattr(NativeNorm, "__call__", noting)
    target = copy.deepcopy(tiny_target(24))
    plain = target.generate(prompt_ids(24, 6), max_new_tokens=12, do_sample=False)
    assert rows == []
    drafter = tiny_drafter(target, 2, "linear")
    out = target.generate(prompt_ids(24, 6), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(out, plain)
    assert len(rows) >= 2 * drafter.last_generation.rounds * target.config.num_hidden_layers
    assert all("forward" not in vars(module) for module in target.modules())
