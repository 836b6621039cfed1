"""What a method is: one way to call ``generate()``, timed and counted the same way for all."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ...runtime.statistics import GenerationStatistics


@dataclass(frozen=True)
class MethodContext:
    """What methods are built from: the loaded target and the command's defaults.

    Attributes:
        target: in evaluation mode, on its device.
        drafter: folder or Hub repo of the Falcon drafter.
        tree: paths of child ranks that replace the drafter's own tree.
    """

    target: PreTrainedModel
    drafter: str | None = None
    tree: list[list[int]] | None = None


@dataclass(frozen=True)
class MethodResult:
    """One call of ``generate()``.

    Attributes:
        tokens: the new tokens.
        seconds: wall-clock time of the whole call.
        statistics: counts, and phases where the method knows them (see ``GenerationStatistics.as_dict``).
    """

    tokens: list[int]
    seconds: float
    statistics: dict[str, float]


class Method(ABC):
    """One way to generate. A subclass in a file of its own in this folder, named ``METHOD`` there, is found by name.

    A method is asked for as ``name`` or ``name:setting=value:...``, which is also its label in results.

    Attributes:
        name: how it is asked for.
        settings: the settings it takes, each with what it is.
        needs_drafter: whether it cannot do without a Falcon drafter.
    """

    name: ClassVar[str]
    settings: ClassVar[dict[str, str]] = {}
    needs_drafter: ClassVar[bool] = False

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        """``settings`` has keys of the class's own only; values are as typed.

        Raises:
            BenchError: on an impossible value, or a file that cannot be read.
        """
        self.label = label
        self.target = context.target

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What this method adds to the call of ``generate()``."""

    def provenance(self) -> dict[str, Any]:
        """What a reader of the results must know to repeat this method; JSON values."""
        return {"method": self.name}

    def statistics(self, new_tokens: int, forwards: int) -> dict[str, float]:
        """Counts of the call that just ended, from the target's forwards.

        The first forward counts as the prefill, even where it verifies drafts too, as prompt lookup's does.
        """
        rounds, accepted = forwards - 1, max(new_tokens - forwards, 0)
        counted = GenerationStatistics(
            rounds=rounds, row_rounds=rounds, accepted=accepted, new_tokens=new_tokens
        ).as_dict()
        return {name: counted[name] for name in ("rounds", "accepted", "new_tokens", "tau", "tau_with_bonus", "alpha")}

    def generate(self, ids: torch.Tensor, options: dict[str, Any]) -> MethodResult:
        """Generate from ``ids`` ``[1, P]`` with ``options`` of ``generate()``.

        Raises:
            ValueError: what ``generate()`` raises on options that do not go together.
        """
        ids = ids.to(self.target.device)
        arguments = {"attention_mask": torch.ones_like(ids), **_pad(self.target), **options, **self.arguments()}
        with _counted_forwards(self.target) as forwards:
            _synchronize(self.target.device)
            start = time.perf_counter()
            out = self.target.generate(ids, **arguments)
            _synchronize(self.target.device)
            seconds = time.perf_counter() - start
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return MethodResult(tokens, seconds, self.statistics(len(tokens), forwards[0]))


def _pad(target: PreTrainedModel) -> dict[str, Any]:
    """A pad token where the target has none: ``generate()`` would choose the same one, with a warning each call."""
    config: Any = target.generation_config
    if config.pad_token_id is not None or config.eos_token_id is None:
        return {}
    eos = config.eos_token_id
    return {"pad_token_id": eos[0] if isinstance(eos, list) else eos}


@contextmanager
def _counted_forwards(target: PreTrainedModel) -> Iterator[list[int]]:
    """Count the calls of ``target`` in the ``with`` body; a list of the one count."""
    count = [0]

    def increment(*_: Any) -> None:
        count[0] += 1

    handle = target.register_forward_pre_hook(increment)
    try:
        yield count
    finally:
        handle.remove()


def _synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a time is that of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
