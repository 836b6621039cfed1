"""Plain ``generate()`` with the products and norms that Falcon verifies by: what of a speed is theirs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ...runtime.few_rows import FewRowProducts, native_dtypes
from ...runtime.native_products import has_native_products
from ..errors import BenchError
from .base import MethodContext, MethodResult
from .plain import Plain


class PlainNative(Plain):
    """One token a forward, multiplied by ``native_products.py``; so is a prompt of few tokens."""

    name = "plain_native"

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        super().__init__(label, context, settings)
        require_kernel(label, context.target)
        self._products = FewRowProducts(self.target)

    def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
        """See [`Method.generate`]."""
        with self._products:
            return super().generate(ids, options)


def require_kernel(label: str, target: PreTrainedModel) -> None:
    """Refuse a target that Falcon verifies by torch's products.

    Raises:
        BenchError: if there is no kernel for its dtype on its device.
    """
    if target.device.type != "cpu" or target.dtype not in native_dtypes() or not has_native_products():
        raise BenchError(
            f"{label}: there is no kernel for {target.dtype} on this {target.device.type}; it needs a CPU with "
            "AVX2 and a C++ compiler, and bfloat16 is left to a CPU that has instructions for it but no AMX."
        )


METHOD = PlainNative
