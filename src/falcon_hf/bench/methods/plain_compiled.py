"""Plain ``generate()`` with its decoding forward compiled: the baseline that launch-bound machines must be shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig

from ..errors import BenchError
from .base import Forwards, Method, MethodContext, MethodResult

_DEFAULT_MODE = "default"


class CompileError(RuntimeError):
    """The target does not compile here; the message says why."""


class PlainCompiled(Method):
    """``generate(cache_implementation="static")`` with ``torch.compile`` as transformers applies it.

    One graph serves the whole run: the cache is as long as the run's longest text. Compiling happens in the warm-up.
    """

    name = "plain_compiled"
    settings = {"mode": f"torch.compile's, {_DEFAULT_MODE} by default"}
    may_fail = True

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        super().__init__(label, context, settings)
        self.mode = settings.get("mode", _DEFAULT_MODE)
        if self.mode not in torch._inductor.list_mode_options() and self.mode != _DEFAULT_MODE:
            known = ", ".join([_DEFAULT_MODE, *torch._inductor.list_mode_options()])
            raise BenchError(f"{label}: mode must be one of {known}, got {self.mode!r}.")
        self._longest: int | None = None

    def prepare(self, longest: int) -> None:
        """Size the cache."""
        self._longest = longest

    def arguments(self) -> dict[str, Any]:
        """A static cache, and compilation on any device: transformers' own default is on accelerators only."""
        compile_config = CompileConfig(mode=self.mode)
        compile_config._compile_all_devices = True
        added: dict[str, Any] = {"cache_implementation": "static", "compile_config": compile_config}
        if self._longest is not None and hasattr(GenerationConfig(), "max_cache_len"):  # not in 5.17
            added["max_cache_len"] = self._longest
        return added

    def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
        """See [`Method.generate`].

        Raises:
            CompileError: if the compiler fails, or transformers decided not to compile.
        """
        try:
            result = super().generate(ids, options)
        except torch._dynamo.exc.TorchDynamoException as error:  # the backend's failures are among them
            raise CompileError(str(error)) from error
        if len(result.rows[0]) > 1 and not hasattr(self.target, "_compiled_call"):
            raise CompileError("transformers does not compile this target (its cache or quantisation rules it out)")
        return result

    @contextmanager
    def counted(self) -> Iterator[Forwards]:
        """Nothing to count, one token a forward; and a hook would be a graph break."""
        yield Forwards()

    def provenance(self) -> dict[str, Any]:
        """The mode."""
        return {**super().provenance(), "mode": self.mode}


METHOD = PlainCompiled
