"""What methods share whose forwards are compiled: one graph for the whole run, and a reason where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CompileConfig

from ...compiled_decoding import compiled
from ..errors import BenchError
from .base import Forwards, Method, MethodContext, MethodResult

_COMPILED = "_compiled_call"  # where transformers keeps a model's compiled forward
MODE_SETTING = "torch.compile's; transformers' own by default, on a CPU 'default'"


class CompileError(RuntimeError):
    """The target does not compile here; the message says why."""


class CompilingMethod(Method):
    """``generate(**compiled(longest))``: compiling happens in the warm-up, for the run's longest text."""

    may_fail = True

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        usual = CompileConfig().mode if context.target.device.type == "cuda" else "default"
        self.mode = settings.get("mode", usual)
        super().__init__(label, context, {name: value for name, value in settings.items() if name != "mode"})
        known = list(dict.fromkeys(["default", *torch._inductor.list_mode_options()]))
        if self.mode not in known:
            raise BenchError(f"{label}: mode must be one of {', '.join(known)}, got {self.mode!r}.")
        self._longest: int | None = None
        self._called = False

    def prepare(self, longest: int) -> None:
        """Size the cache. Compiled methods share one size, or each would make graphs anew for the others'."""
        self._longest = longest

    def arguments(self) -> dict[str, Any]:
        """Those of the method, and a static cache and compilation on any device."""
        arguments = super().arguments()  # type: ignore[safe-super]  # the other base class has one
        return {**arguments, **compiled(self._longest, mode=self.mode)}

    def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
        """See [`Method.generate`].

        Raises:
            CompileError: if the compiler fails, transformers decided not to compile, or the static cache cannot serve.
            ValueError: what ``generate()`` raises on options that do not go together.
        """
        if not self._called:  # what another method had compiled would pass for this one's
            vars(self.target).pop(_COMPILED, None)
            self._called = True
        try:
            result = super().generate(ids, options)
        except torch._dynamo.exc.TorchDynamoException as error:  # the backend's failures are among them
            raise CompileError(str(error)) from error
        except ValueError as error:
            if "cache" not in str(error):
                raise
            raise CompileError(str(error)) from error
        if len(result.rows[0]) > 1 and not hasattr(self.target, _COMPILED):
            raise CompileError("transformers does not compile this target (its cache or quantisation rules it out)")
        return result

    @contextmanager
    def counted(self) -> Iterator[Forwards]:
        """Nothing is counted: a hook would be a graph break. Plain has one token a forward, Falcon its own count."""
        yield Forwards()

    def provenance(self) -> dict[str, Any]:
        """The mode, beside the method's."""
        return {**super().provenance(), "mode": self.mode}
