"""Root mean square norms in one operation instead of six, while a tree is verified or drafted on a CPU.

Transformers spells them out: to float32, square, mean, root, two products. On the few rows of a tree each of these
costs its call alone, in every norm of every layer: 35 us for four rows of 576, by ``F.rms_norm`` 20 us, and 84.0 ms for
81.4 ms in a verification by SmolLM2-135M-Instruct (float32, 2 threads of an AVX2 CPU, medians of 30 interleaved
forwards). Only in float32, where both are the same up to the rounding of one mean: in half precision families round at
different places. ``tests/runtime/test_fused_norms.py`` holds both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def fused_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward for a module that is a root mean square norm in float32 on a CPU, else None.

    Families write the same norm under names of their own, and other norms under the same name (Gemma's weight is one
    less). So a module must have the parts, and its class give the same numbers when tried, once.
    """
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float | int):
        return None
    if (
        type(weight) is not nn.Parameter
        or weight.dim() != 1
        or weight.dtype != torch.float32
        or weight.device.type != "cpu"
    ):
        return None
    own = {name for name in vars(module) if not name.startswith("_")} - {"training", "variance_epsilon"}
    if own or len(module._parameters) > 1 or module._modules or module._buffers:
        return None  # it may read more than these two
    kind: Any = type(module)
    return functools.partial(_forward, module) if _is_the_norm(kind, kind.forward) else None


@functools.cache
def _is_the_norm(kind: type[nn.Module], forward: Callable[..., torch.Tensor]) -> bool:
    """Whether a class's forward takes one tensor and gives the numbers of ``F.rms_norm`` for a weight and epsilon."""
    if len(inspect.signature(forward).parameters) != 2:
        return False
    module: Any = kind.__new__(kind)
    nn.Module.__init__(module)
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        weight = torch.linspace(0.5, 2, 24, dtype=torch.float32)
        module.weight, module.variance_epsilon = nn.Parameter(weight), 0.1
        tried = torch.linspace(-3, 5, 48, dtype=torch.float32).view(2, 24)
        try:
            return torch.allclose(forward(module, tried), _forward(module, tried), rtol=1e-5, atol=1e-6)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # it needs more than it is given here
            return False


def _forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype != torch.float32:
        output: torch.Tensor = type(module).forward(module, hidden_states)
        return output
    return F.rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)
