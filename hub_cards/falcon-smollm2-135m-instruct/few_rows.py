"""Products of weights with the few rows of a tree, on a CPU, where torch's own cost as much as those of many rows.

A tree has 2 to 32 rows. Where there is a kernel for them (``native_kernel.py``) it is used. Else: BLAS copies the
weight of ``x W^T`` into an order of its own first, which pays from some dozens of rows on; of ``W x^T`` it copies the
rows instead. Half precision without kernels is multiplied row by row; here slices of the weight are widened to float32
while they are in the cache, multiplied, and the sums rounded once.

What that does to all products of one forward is measured in ``native_products.py`` for the kernel; without it, ms:

| rows | 1 | 2 | 4 | 6 | 8 | 16 | 32 |
|---|---|---|---|---|---|---|---|
| float32, torch | 39 | 65 | 78 | 71 | 69 | 84 | 115 |
| float32, here | | 39 | 42 | 67 | 66 | 78 | 118 |
| bfloat16, torch | 17 | 32 | 67 | 96 | 130 | | |
| bfloat16, here | | | | 111 | 109 | 95 | 153 |

The results are the same up to the rounding of the sums: ``tests/runtime/test_few_rows.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .fused_norms import NativeNorm, fused_norm, plain_norm
from .half_precision import multiplies_fast
from .lending import lend, take_back
from .native_kernel import DTYPES, compiled_kernel
from .native_linear import NativeLinear
from .native_products import has_native_tiles, native_product, serves_weight, takes_natively, takes_tiles

MOST_ROWS = 32
_LEAST_WIDENED_ROWS = 5  # widening a weight costs as much as multiplying four rows with it
PADDED_ROWS = {3: 4} | dict.fromkeys(range(9, 16), 16)  # these have slower kernels than the next number
_CPU = torch.device("cpu")
_SLICE_BYTES = 1 << 22  # of a widened weight: stays in a CPU's cache between being written and being read


class FewRowProducts:
    """While entered, a model's linear layers multiply by the kernel or [`few_row_linear`], its norms by [`fused_norm`].

    Modules are left alone where they are quantised, not torch's own, or have been given another forward (hooks,
    compilation), and all of a compiled model's, whose graph would be made anew.

    Args:
        model: whose layers; read once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._forwards: list[tuple[nn.Module, Any]] = []
        if not is_compiled(model):
            self._forwards = [
                (module, forward) for module in model.modules() if (forward := _cheaper_forward(module)) is not None
            ]

    def __enter__(self) -> None:
        lend("forward", self._forwards)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        take_back("forward", self._forwards)


def _cheaper_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if has_other_forward(module):
        return None
    if not _is_plain(module):
        return fused_norm(module)
    forward, weight = functools.partial(_forward, module), module.weight
    if not is_native_faster(weight) or not serves_weight(weight) or "bias" not in module._parameters:  # pruned away
        return forward
    kernel = compiled_kernel()
    return forward if kernel is None else NativeLinear(module, kernel, MOST_ROWS, forward)


def _is_plain(module: nn.Module) -> bool:
    """A layer of torch's own on a CPU, whose weight is a plain tensor, not a quantised or distributed one."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"


def has_other_forward(module: nn.Module) -> bool:
    """Whether the module's forward is not its class's: hooked, compiled, or replaced.

    One of ours is none: another thread's call, which will take it back, has this model too.
    """
    forward = vars(module).get("forward")
    ours = isinstance(forward, (NativeLinear, NativeNorm)) or getattr(forward, "func", None) in (_forward, plain_norm)
    replaced = forward is not None and not ours
    return replaced or getattr(module, "_compiled_call_impl", None) is not None


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a module in it, is compiled or has been given another forward as a whole.

    Accelerate's, which moves what goes into a model on several devices, is none.
    """
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return compiled or (has_other_forward(model) and not hasattr(model, "_hf_hook"))


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return few_row_linear(x, layer.weight, layer.bias)


def few_row_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear``, by other products where x has few rows and they are faster.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``.
        bias: ``[O]``.

    Returns:
        ``[..., O]``.
    """
    x = x.contiguous()  # or matmul would copy the weight for each of x's leading rows, rather than x
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= MOST_ROWS or weight.device.type != "cpu" or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):  # which chooses the dtype of each product
        return F.linear(x, weight, bias)
    if is_native_faster(weight) and takes_natively(x, weight):
        product = native_product
    elif rows == 1:
        return F.linear(x, weight, bias)
    elif weight.dtype == torch.float32 and torch.backends.mkl.is_available():
        product = _turned
    elif rows >= _LEAST_WIDENED_ROWS and not multiplies_fast(weight.device, weight.dtype):
        product = _widened
    else:
        return F.linear(x, weight, bias)
    y = product(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def is_native_faster(weight: torch.Tensor) -> bool:
    """Whether few rows should be multiplied with a CPU's ``weight`` by ``native_products.py``, where they can be."""
    return not _has_instructions(weight.dtype) or takes_tiles(weight)


def native_dtypes() -> tuple[torch.dtype, ...]:
    """Those that the kernel multiplies, and [`is_native_faster`] for weights of common shapes."""
    return tuple(dtype for dtype in DTYPES if not _has_instructions(dtype) or has_native_tiles())


@functools.cache  # asked for each product; what a CPU has does not change
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is a half precision that this CPU multiplies fast: faster by torch than by vectors of AVX2."""
    return dtype != torch.float32 and multiplies_fast(_CPU, dtype)


def _turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``(W x^T)^T`` for ``[R, I]`` rows."""
    rows = x.shape[0]
    if rows in PADDED_ROWS:
        padded = F.pad(x, (0, 0, 0, PADDED_ROWS[rows] - rows))
        return torch.mm(weight, padded.t())[:, :rows].t().contiguous()
    return torch.mm(weight, x.t()).t().contiguous()


def _widened(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in float32, a slice of the weight's rows at a time, rounded to the weight's dtype."""
    wide = x.float()
    slices = weight.split(max(1, _SLICE_BYTES // (4 * weight.shape[1])))
    return torch.cat([_turned(wide, part.float()) for part in slices], dim=1).to(weight.dtype)
