"""Root mean square norms in one operation instead of six or eight, while a tree is verified or drafted on a CPU.

Transformers spells them out: to float32, square, mean, root, two products. On the few rows of a tree each of these
costs its call alone, in every norm of every layer. By the kernel of ``native_kernel.py``, or in float32 without it by
``F.rms_norm``; us for sixteen rows of 576, 2 threads of an Intel Xeon, medians:

| | spelled out | ``F.rms_norm`` | kernel |
|---|---|---|---|
| float32 | 40 | 31 | 11 |
| bfloat16 | 55 | | 19 |

In half precision families round at different places, so a norm has to round as the kernel does: as Llama's.
``tests/runtime/test_fused_norms.py`` holds both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .native_kernel import DTYPES, MULTIPLE, Kernel, compiled_kernel, is_readable

_MOST_NUMBERS = 1 << 16  # above, an operation's call costs little, and torch's have threads
_TRIED = 48  # numbers a row in a trial


def fused_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward for a module that is a root mean square norm on a CPU, else None.

    Families write the same norm under names of their own, and other norms under the same name (Gemma's weight is one
    less). So a module must have the parts, and its class give the same numbers when tried, once.
    """
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float | int):
        return None
    if type(weight) is not nn.Parameter or weight.dim() != 1 or weight.device.type != "cpu":
        return None
    # A forward may be another call's of ours; whether it is has been looked at.
    own = {name for name in vars(module) if not name.startswith("_")} - {"training", "variance_epsilon", "forward"}
    if own or len(module._parameters) > 1 or module._modules or module._buffers:
        return None  # it may read more than these two
    kind: Any = type(module)
    kernel = compiled_kernel() if weight.dtype in DTYPES and weight.shape[0] % MULTIPLE == 0 else None
    if kernel is None:
        is_norm = weight.dtype == torch.float32 and _is_the_norm(kind, kind.forward, torch.float32, None)
        return functools.partial(plain_norm, module) if is_norm else None
    return NativeNorm(module, kernel) if _is_the_norm(kind, kind.forward, weight.dtype, kernel) else None


@functools.cache
def _is_the_norm(
    kind: type[nn.Module], forward: Callable[..., torch.Tensor], dtype: torch.dtype, kernel: Kernel | None
) -> bool:
    """Whether a class's forward takes one tensor and gives the numbers of ours for a weight and epsilon.

    Half precision's rounding is the same if hardly a number differs: another order of a sum may move one to its
    neighbour, rounding in another place a quarter of them.
    """
    if len(inspect.signature(forward).parameters) != 2:
        return False
    module: Any = kind.__new__(kind)
    nn.Module.__init__(module)
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        weight = torch.linspace(0.5, 2, _TRIED, dtype=torch.float32)
        module.weight, module.variance_epsilon = nn.Parameter(weight.to(dtype)), 0.1
        tried = torch.linspace(-3, 5, 4 * _TRIED, dtype=torch.float32).view(4, _TRIED).to(dtype)
        own = functools.partial(plain_norm, module) if kernel is None else NativeNorm(module, kernel)
        try:
            theirs, ours = forward(module, tried), own(tried)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # it needs more than it is given here
            return False
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return False
        if dtype != torch.float32 and (theirs == ours).float().mean() < 0.95:
            return False
        rounding = max(torch.finfo(dtype).eps, 1e-5)
        return torch.allclose(theirs, ours, rtol=rounding, atol=1e-6)


class NativeNorm:
    """The forward of a norm by the kernel, for few rows.

    Args:
        module: for which [`fused_norm`] has found that it may be.
        kernel: the kernel.
    """

    def __init__(self, module: Any, kernel: Kernel) -> None:
        self._module, self._normalise, self._epsilon = module, kernel.rms_norm, float(module.variance_epsilon)
        self._size, self._dtype = module.weight.shape[0], module.weight.dtype

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., I]`` to ``[..., I]``."""
        weight, numbers = self._module._parameters["weight"], hidden_states.numel()
        if (
            not 0 < numbers <= _MOST_NUMBERS
            or hidden_states.shape[-1] != self._size
            or weight.shape[0] != self._size
            or weight.dtype is not self._dtype
            or not is_readable(hidden_states, weight)
        ):
            return plain_norm(self._module, hidden_states)
        y = torch.empty_like(hidden_states)
        self._normalise(
            hidden_states.data_ptr(), weight.data_ptr(), y.data_ptr(), self._size, numbers // self._size,
            self._epsilon, DTYPES[self._dtype],
        )  # fmt: skip
        return y


def plain_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm's own forward, or in float32 torch's, ``[..., I]`` to ``[..., I]``."""
    if not hidden_states.dtype == module.weight.dtype == torch.float32:
        output: torch.Tensor = type(module).forward(module, hidden_states)
        return output
    return F.rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)
