"""A linear layer's forward by the kernel of ``native_kernel.py``, in as little Python as can be.

A verification makes hundreds of small products, and looking at each whether and how the kernel makes it takes longer
than the smallest ones: of sixteen rows by a weight of 192 times 576 in bfloat16 it took 37 us, 13 of them the kernel.
What a call of ``generate()`` does not change is looked at once here, and it takes 25.

``tests/runtime/test_native_linear.py`` holds the numbers, and that everything else is left to the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .native_kernel import DTYPES, Kernel, is_readable


class NativeLinear:
    """The forward of a layer whose weight the kernel takes (see [`serves_weight`]).

    Args:
        layer: a linear layer of torch's own.
        kernel: the kernel.
        most_rows: products of more rows are made the other way.
        otherwise: a forward for whatever else the layer may be given: ``[..., I]`` to ``[..., O]``.
    """

    def __init__(
        self, layer: nn.Linear, kernel: Kernel, most_rows: int, otherwise: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._layer: Any = layer
        self._multiply, self._most_rows, self._otherwise = kernel.one_weight, most_rows, otherwise
        self._shape, self._dtype, self._kind = layer.weight.shape, layer.weight.dtype, DTYPES[layer.weight.dtype]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., I]`` to ``[..., O]``."""
        weight = self._layer._parameters["weight"]
        outputs, size = self._shape
        rows = x.numel() // size
        if (
            not 0 < rows <= self._most_rows
            or x.shape[-1] != size
            or weight.shape != self._shape
            or weight.dtype is not self._dtype
            or not is_readable(x, weight)
        ):
            return self._otherwise(x)
        y = x.new_empty((*x.shape[:-1], outputs))
        self._multiply(
            weight.data_ptr(), y.data_ptr(), outputs, x.data_ptr(), size, rows, self._kind, torch.get_num_threads()
        )
        bias = self._layer._parameters["bias"]
        return y if bias is None else y.add_(bias)
