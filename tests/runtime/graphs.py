"""Graphs for the tests of what is rewritten in them; apart from the helpers because the compiler is slow to import."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx


def as_compilers_see_it(function: Any, *inputs: torch.Tensor) -> Any:
    """The graph as it is when torch's compiler makes code of it; ``function`` takes exactly these inputs."""
    return make_fx(function, select_decomp_table(), tracing_mode="fake")(*inputs)
