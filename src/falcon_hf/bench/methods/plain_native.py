"""Plain ``generate()`` with the products that Falcon verifies by: what of a speed is theirs, and what is drafting's."""

from __future__ import annotations

from typing import Any

from ...runtime.few_rows import FewRowProducts
from ...runtime.native_products import has_native_products
from ..errors import BenchError
from .base import MethodContext, MethodResult
from .plain import Plain


class PlainNative(Plain):
    """One token a forward, multiplied by ``native_products.py``. Falcon without a draft is this."""

    name = "plain_native"

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        super().__init__(label, context, settings)
        if context.target.device.type != "cpu" or not has_native_products():
            raise BenchError(f"{label}: there is no kernel here; it needs a CPU with AVX2 and a C++ compiler.")
        self._products = FewRowProducts(self.target)

    def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
        """See [`Method.generate`]."""
        with self._products:
            return super().generate(ids, options)


METHOD = PlainNative
