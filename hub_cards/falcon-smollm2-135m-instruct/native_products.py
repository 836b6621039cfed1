"""Products of weights with few rows by the kernel of ``native_kernel.py``, where there is one and it can multiply them.

All products of SmolLM2-135M-Instruct in one forward, ms, 2 threads of an AMD EPYC of the third generation (AVX2):

| rows | 1 | 2 | 4 | 6 | 8 | 16 | 32 |
|---|---|---|---|---|---|---|---|
| float32, torch | 39 | 65 | 78 | 71 | 69 | 84 | 115 |
| float32, here | 24 | 22 | 24 | 26 | 34 | 53 | 94 |
| bfloat16, torch | 17 | 32 | 67 | 96 | 130 | | |
| bfloat16, here | 13 | 14 | 17 | 20 | 30 | 55 | 108 |

Of an Intel Xeon with AMX:

| rows | 1 | 2 | 4 | 8 | 12 | 16 | 32 |
|---|---|---|---|---|---|---|---|
| float32, torch | 30 | 32 | 50 | 62 | 77 | 76 | 98 |
| float32, here | 32 | 34 | 34 | 43 | 46 | 56 | 90 |
| float32, here, in AVX2's vectors | 35 | 34 | 34 | 45 | 56 | 72 | 140 |
| bfloat16, torch | 38 | 31 | 31 | 32 | 31 | 33 | 46 |
| bfloat16, here, in tiles | 21 | 20 | 20 | 20 | 20 | 23 | 32 |

``tests/runtime/test_native_products.py`` holds the numbers against exact ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from .native_kernel import DTYPES, MULTIPLE, TILE_MULTIPLE, TILE_OUTPUTS, call, compiled_kernel

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def takes_natively(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies ``x [..., I]`` with ``weight [O, I]``; it is compiled when first asked for.

    Not while a compiler traces, nor where a tensor is a subclass: those see operations, not memory.
    """
    return (
        _fits(x, weight)
        and type(x) in _PLAIN
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
        and serves_weight(weight)
    )


def serves_weight(weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies rows of its dtype with ``weight [O, I]``; it is compiled when first asked for."""
    return (
        weight.dtype in DTYPES
        and weight.dim() == 2
        and weight.device.type == "cpu"
        and weight.shape[1] % MULTIPLE == 0
        and weight.is_contiguous()
        and type(weight) in _PLAIN
        and has_native_products()
    )


def takes_tiles(weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies ``weight [O, I]`` in a CPU's tiles, with which 16 rows cost as much as one."""
    outputs, size = weight.shape
    return (
        weight.dtype == torch.bfloat16 and outputs >= TILE_OUTPUTS and size % TILE_MULTIPLE == 0 and has_native_tiles()
    )


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    on_cpu = x.device.type == weight.device.type == "cpu"
    return on_cpu and x.dtype == weight.dtype and x.shape[-1] == weight.shape[-1]


def native_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[R, I]`` rows and a weight ``[O, I]``, for which [`takes_natively`] is true -> ``[R, O]``."""
    return native_products(x, [weight])[0]


def native_products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The products of ``x`` ``[R, I]`` with several weights, one ``[R, O]`` each; see [`native_product`].

    Raises:
        ValueError: if a weight is of another width, dtype or device, which would be read as what it is not, or there is
            no kernel.
    """
    if not all(_fits(x, weight) for weight in weights) or x.shape[-1] % MULTIPLE or x.dtype not in DTYPES:
        raise ValueError("The kernel multiplies rows and weights of one dtype and width on a CPU.")
    kernel = compiled_kernel()
    if kernel is None:
        raise ValueError("This machine has no kernel for products with few rows.")
    return call(kernel, x.contiguous(), weights)


def has_native_products() -> bool:
    """Whether this machine has the kernel; compiles it, once."""
    return compiled_kernel() is not None


def has_native_tiles() -> bool:
    """Whether the kernel multiplies bfloat16 in tiles here; without AMX it is not compiled to find out."""
    if not _has_amx():
        return False
    kernel = compiled_kernel()
    return kernel is not None and kernel.has_tiles


@functools.cache
def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
