"""Plain ``generate()`` compiled with the products that a compiled verification has: what of a speed is theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...runtime.tree_graphs import TreeGraphs
from .base import MethodContext
from .compiling import CompilingMethod
from .plain import Plain
from .plain_native import require_kernel


class PlainNativeCompiled(CompilingMethod, Plain):
    """``plain_compiled`` by a backend of its own, so that both may be in one run, each with its graph."""

    name = "plain_native_compiled"

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        require_kernel(label, context.target)
        super().__init__(label, context, settings)

    def arguments(self) -> dict[str, Any]:
        """Those of ``plain_compiled``, compiled by [`inductor_with_our_products`]."""
        arguments = super().arguments()
        arguments["compile_config"].backend = inductor_with_our_products
        return arguments


def inductor_with_our_products(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """Torch's own compiler, whose graph is rewritten as a verification's is (see ``runtime/tree_graphs.py``)."""
    from torch._inductor.compile_fx import compile_fx

    with TreeGraphs(torch.device("cpu")):
        return compile_fx(graph, inputs)


METHOD = PlainNativeCompiled
