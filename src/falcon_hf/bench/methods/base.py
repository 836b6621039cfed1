"""What a method is: one way to call ``generate()``, timed and counted the same way for all."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ...measured_calls import padding_token, synchronize
from ...runtime.statistics import GenerationStatistics
from ..memory import peak_bytes, reset_peak


@dataclass(frozen=True)
class MethodContext:
    """What methods are built from: the loaded target and the command's defaults.

    Attributes:
        target: in evaluation mode, on its device.
        drafter: folder or Hub repo of the Falcon drafter.
        tree: replaces the drafter's own, as its config holds it (see ``draft_trees.py``).
        batch_size: rows of the calls to come.
    """

    target: PreTrainedModel
    drafter: str | None = None
    tree: list[list[int]] | dict[str, Any] | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class MethodResult:
    """One call of ``generate()``.

    Attributes:
        rows: the new tokens of each row, up to its end.
        seconds: wall-clock time of the whole call.
        statistics: for each row its counts, and phases where the method knows them (see
            ``GenerationStatistics.as_dict``). Of what a call has once for all rows, its forwards and times, a row has
            its share, so that sums over rows are the call's.
        accepted: for each row the accepted drafts of each round; None where the method does not know.
        peak_bytes: peak memory of the call (see ``memory.py``); None where it cannot be told.
    """

    rows: list[list[int]]
    seconds: float
    statistics: list[dict[str, float]]
    accepted: list[list[int]] | None = None
    peak_bytes: int | None = None

    @property
    def tokens(self) -> list[int]:
        """The first row."""
        return self.rows[0]


@dataclass
class Forwards:
    """Forwards of the target in one call of ``generate()``."""

    count: int = field(default=0)


class Method(ABC):
    """One way to generate. A subclass in a file of its own in this folder, named ``METHOD`` there, is found by name.

    A method is asked for as ``name``, ``name:setting=value:...`` or ``label=name:...``; see ``methods/__init__.py``.

    Attributes:
        name: how it is asked for.
        settings: the settings it takes, each with what it is.
        needs_drafter: whether it cannot do without a Falcon drafter.
        may_fail: whether failing on a machine is a finding, kept with the result while the other methods go on.
        prefill_drafts: whether the forward over the prompt verifies drafts already, as transformers' assistants' does.
        draws_as_plain: whether a sampled text must be plain's with the same seed; if not, the two are not compared.
        room: slots of a static cache that the method needs beside the text.
    """

    name: ClassVar[str]
    settings: ClassVar[dict[str, str]] = {}
    needs_drafter: ClassVar[bool] = False
    may_fail: ClassVar[bool] = False
    prefill_drafts: ClassVar[bool] = False
    draws_as_plain: bool = True
    room: int = 0

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        """``settings`` has keys of the class's own only; values are as typed.

        Raises:
            BenchError: on an impossible value, or a file that cannot be read.
        """
        self.label = label
        self.target = context.target

    @classmethod
    def takes(cls, setting: str) -> bool:
        """Whether ``setting`` is one of the method's."""
        return setting in cls.settings

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What this method adds to the call of ``generate()``."""

    def provenance(self) -> dict[str, Any]:
        """What a reader of the results must know to repeat this method; JSON values."""
        return {"method": self.name}

    def prepare(self, longest: int) -> None:  # noqa: B027 - most methods have nothing to prepare
        """Called once before the run: no text with its prompt and any method's ``room`` exceeds ``longest`` tokens."""

    def row_statistics(self, new_tokens: int, forwards: int, rows: int, row: int) -> dict[str, float]:
        """Counts of one row of the call that just ended, from the target's forwards.

        A round is a forward that verifies; the prefill is none, unless it carries drafts.
        """
        prefills = 0 if self.prefill_drafts else 1
        rounds = min(forwards, max(new_tokens, 0)) - prefills  # a row that has ended takes part in no round
        accepted = max(new_tokens - forwards, 0)
        counted = GenerationStatistics(
            rounds=rounds, row_rounds=rounds, accepted=accepted, new_tokens=new_tokens
        ).as_dict()
        shown = {name: counted[name] for name in ("row_rounds", "accepted", "new_tokens", "tau", "alpha")}
        bonus = counted["tau"] + 1 if rounds > 0 else 0.0
        return {"rounds": (forwards - prefills) / rows, **shown, "tau_with_bonus": bonus}

    def accepted_by_round(self) -> list[list[int]] | None:
        """For each row of the call that just ended, the accepted drafts of each round, if the method knows."""
        return None

    def generate(self, ids: torch.Tensor | Sequence[torch.Tensor], options: dict[str, Any]) -> MethodResult:
        """Generate from prompts ``[1, P]``, one or a batch, with ``options`` of ``generate()``.

        Raises:
            ValueError: what ``generate()`` raises on options that do not go together.
        """
        prompts = [ids] if isinstance(ids, torch.Tensor) else list(ids)
        device = self.target.device
        padding = padding_token(self.target)
        batch, mask = left_padded(prompts, options.get("pad_token_id", padding or 0))
        inputs: dict[str, Any] = {"attention_mask": mask.to(device)}
        if padding is not None:
            inputs["pad_token_id"] = padding
        arguments = {**inputs, **options, **self.arguments()}
        batch = batch.to(device)
        with self.counted() as forwards:
            measured = reset_peak(device)
            synchronize(device)
            start = time.perf_counter()
            out = self.target.generate(batch, **arguments)
            synchronize(device)
            seconds = time.perf_counter() - start
            peak = peak_bytes(device) if measured else None
        texts = out[:, batch.shape[1] :].tolist()
        if len(texts) > 1:
            ends = _end_tokens(self.target, options)
            texts = [until_end(text, ends, arguments.get("pad_token_id")) for text in texts]
        count = forwards.count or max(map(len, texts))
        statistics = [self.row_statistics(len(text), count, len(texts), row) for row, text in enumerate(texts)]
        return MethodResult(texts, seconds, statistics, self.accepted_by_round(), peak)

    @contextmanager
    def counted(self) -> Iterator[Forwards]:
        """Count the target's forwards in the ``with`` body."""
        forwards = Forwards()

        def increment(*_: Any) -> None:
            forwards.count += 1

        handle = self.target.register_forward_pre_hook(increment)
        try:
            yield forwards
        finally:
            handle.remove()


def left_padded(prompts: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts ``[1, P]`` of any lengths as one batch ``[B, longest P]`` and its attention mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


def until_end(tokens: list[int], ends: set[int], pad: int | None) -> list[int]:
    """A batch's row without what stands behind its end: its first end token, else the padding."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    length = len(tokens)
    while not ends and length and tokens[length - 1] == pad:
        length -= 1
    return tokens[:length]


def _end_tokens(target: PreTrainedModel, options: dict[str, Any]) -> set[int]:
    config: Any = target.generation_config
    eos = options.get("eos_token_id", config.eos_token_id)
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, (list, tuple)) else {eos}
