"""What was measured about drafters and their target, with where it comes from: one JSON file, checked when read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..whole_files import write_whole
from .acceptance import RankRecord
from .choice import Option, Prediction, batch_nodes
from .confidence import ConfidenceTables
from .errors import TuningError
from .lookup_measurement import LookupCounts
from .monotone import Curve

FORMAT = "falcon-hf-calibration/2"
# Likeliest tokens of a law that a dynamic tree may choose from: more cost time in every round.
_DYNAMIC_CANDIDATES = 10


@dataclass(frozen=True)
class VerifyTime:
    """Seconds of one verification of ``nodes`` nodes (root included) behind ``context`` cached tokens: a median."""

    context: int
    nodes: int
    seconds: float


@dataclass(frozen=True)
class DraftTime:
    """Seconds of drafting in ``passes`` passes, all but the first of ``width`` blocks: a median."""

    passes: int
    width: int
    seconds: float


@dataclass(frozen=True)
class DrafterRecord:
    """One drafter: what it is, how often its ranks hit, and what its passes cost.

    Attributes:
        name: folder or Hub repo, as given.
        provenance: its weights' hash, fusion, vocabulary and so on; JSON values.
        ranks: see [`RankRecord`].
        confidence: see [`ConfidenceTables`].
        draft_times: see [`DraftTime`].
        append_seconds: telling the drafter of a round's committed pairs.
    """

    name: str
    provenance: dict[str, Any]
    ranks: RankRecord
    confidence: ConfidenceTables
    draft_times: tuple[DraftTime, ...]
    append_seconds: float


@dataclass(frozen=True)
class Calibration:
    """Everything ``falcon-hf tune`` measured.

    Attributes:
        provenance: versions, machine, target, prompts and settings; JSON values.
        drafters: at least one.
        verify_times: see [`VerifyTime`].
        plain_seconds: a token of plain ``generate()``, the prefill left out.
        plain_context: mean context those tokens had.
        walk_seconds: of choosing and committing one token of a Falcon round.
        round_seconds: of a Falcon round, all that is neither drafting, verification nor walk; below 0 where those
            curves overrate a round.
        lookup: see [`LookupCounts`].
    """

    provenance: dict[str, Any]
    drafters: tuple[DrafterRecord, ...]
    verify_times: tuple[VerifyTime, ...]
    plain_seconds: float
    plain_context: float
    walk_seconds: float
    round_seconds: float
    lookup: LookupCounts
    format: str = field(default=FORMAT, init=False)

    def options(self, context: float | None = None) -> list[Option]:
        """The drafters as [`choose`] takes them, at a context length (the calibration's own by default)."""
        at = self.plain_context if context is None else context
        return [
            Option(drafter.name, drafter.ranks.model, MeasuredCosts(self, drafter, at), drafter.ranks.replay)
            for drafter in self.drafters
        ]

    def dynamic(self, prediction: Prediction, context: float | None = None) -> Prediction:
        """The dynamic tree with a static one's numbers of passes, blocks and nodes, and look-up, both as calibrated.

        How many tokens a round it makes is not predicted; it has to be measured.

        Raises:
            TuningError: if the prediction is plain decoding's.
        """
        if prediction.shape is None:
            raise TuningError("Plain decoding has no tree to be made dynamic.")
        index = next(i for i, one in enumerate(self.drafters) if one.name == prediction.drafter)
        drafter, option = self.drafters[index], self.options(context)[index]
        costs = option.costs
        entry: dict[str, Any] = {
            "kind": "dynamic",
            "nodes": prediction.nodes - 1,
            "passes": prediction.passes,
            "width": max(prediction.width, 1),
            "candidates": min(_DYNAMIC_CANDIDATES, drafter.ranks.width),
            "calibration": drafter.confidence.to_json(),
        }
        if prediction.passes > 1:
            another = costs.draft_seconds((1, prediction.width)) - costs.draft_seconds((1,))
            others = costs.verify_seconds(prediction.nodes) + costs.rest_seconds(prediction.tokens)
            entry["pass_cost"] = max(another / max(others, another, 1e-9), 1e-3)
        if fewer := batch_nodes(option, prediction, max(time.nodes for time in self.verify_times)):
            entry["batch_nodes"] = fewer
        return replace(prediction, kind="dynamic", dynamic=entry, lookup=self.lookup.config_entry())

    def write(self, path: Path) -> None:
        """Write the file in one step.

        Raises:
            TuningError: if it cannot be written.
        """
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value["verify_times"] = [asdict(time) for time in self.verify_times]
        value["lookup"] = asdict(self.lookup)
        value["drafters"] = [
            {
                **{name: getattr(drafter, name) for name in drafter.__dataclass_fields__},
                "ranks": drafter.ranks.to_json(),
                "confidence": drafter.confidence.to_json(),
                "draft_times": [asdict(time) for time in drafter.draft_times],
            }
            for drafter in self.drafters
        ]
        write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read and check a calibration.

        Raises:
            TuningError: if the file cannot be read or is none.
        """
        value = read_json(path)
        if value.get("format") != FORMAT:
            raise TuningError(f"{path} is not a calibration of this version ({FORMAT}): run falcon-hf tune again.")
        try:
            drafters = tuple(
                DrafterRecord(
                    name=str(one["name"]),
                    provenance=dict(one["provenance"]),
                    ranks=RankRecord.from_json(one["ranks"]),
                    confidence=ConfidenceTables.from_json(one["confidence"]),
                    draft_times=tuple(DraftTime(**time) for time in one["draft_times"]),
                    append_seconds=_seconds(one["append_seconds"]),
                )
                for one in value["drafters"]
            )
            calibration = cls(
                provenance=dict(value["provenance"]),
                drafters=drafters,
                verify_times=tuple(VerifyTime(**time) for time in value["verify_times"]),
                round_seconds=float(value["round_seconds"]),
                lookup=LookupCounts.from_json(value["lookup"]),
                **{name: _seconds(value[name]) for name in ("plain_seconds", "plain_context", "walk_seconds")},
            )
            for verify in calibration.verify_times:
                _seconds(verify.seconds)
            for draft in (time for drafter in drafters for time in drafter.draft_times):
                _seconds(draft.seconds)
        except (KeyError, TypeError, ValueError) as error:
            raise TuningError(f"{path} is a damaged calibration ({error}): run falcon-hf tune again.") from error
        if not drafters or not calibration.verify_times or any(not drafter.draft_times for drafter in drafters):
            raise TuningError(f"{path} is an incomplete calibration: run falcon-hf tune again.")
        return calibration


def _seconds(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{value!r} is no time")
    return number


class MeasuredCosts:
    """Costs of a round from a calibration's curves, at one context length; see [`Costs`]."""

    def __init__(self, calibration: Calibration, drafter: DrafterRecord, context: float) -> None:
        self.calibration, self.drafter, self.context = calibration, drafter, context

    @property
    def plain_seconds(self) -> float:
        """One token of plain decoding at this context: the measured one, and what verification of 1 node adds."""
        cached = self._verify_at(self.context)(1) - self._verify_at(self.calibration.plain_context)(1)
        return self.calibration.plain_seconds + cached

    def draft_seconds(self, widths: Sequence[int]) -> float:
        """The first pass, and each further pass by its width."""
        first, further = self._passes
        return (first + sum(further(width) for width in widths[1:])) if widths else 0.0

    def verify_seconds(self, nodes: int) -> float:
        """Monotone in the nodes, straight between the measured context lengths."""
        return self._verify(nodes)

    def rest_seconds(self, tokens: float) -> float:
        """Walk, cache, appending to the drafter, and what is left."""
        calibration = self.calibration
        return calibration.walk_seconds * tokens + calibration.round_seconds + self.drafter.append_seconds

    @cached_property
    def _passes(self) -> tuple[float, Curve]:
        firsts = [time.seconds for time in self.drafter.draft_times if time.passes == 1]
        first = sum(firsts) / len(firsts) if firsts else 0.0
        further = [
            (time.width, max(time.seconds - first, 0.0) / (time.passes - 1))
            for time in self.drafter.draft_times
            if time.passes > 1
        ]
        return first, Curve.fit(further) if further else Curve((1.0,), (first,))

    @cached_property
    def _verify(self) -> Curve:
        return self._verify_at(self.context)

    def _verify_at(self, context: float) -> Curve:
        """The curve over nodes at a context: for each number of nodes, monotone and straight over contexts."""
        times = self.calibration.verify_times
        by_nodes: dict[int, list[tuple[float, float]]] = {}
        for time in times:
            by_nodes.setdefault(time.nodes, []).append((time.context, time.seconds))
        return Curve.fit([(nodes, Curve.fit(points)(context)) for nodes, points in by_nodes.items()])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        TuningError: if the file cannot be read or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TuningError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise TuningError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise TuningError(f"{path} holds no JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any], indent: int | None = None) -> None:
    """Write JSON in one step, so that a reader sees the old file or the new one, whole.

    Raises:
        TuningError: if it cannot be written.
    """
    text = json.dumps(value, allow_nan=False, indent=indent, separators=None if indent else (",", ":"))
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        raise TuningError(f"{path} cannot be written: {error.strerror}.") from error
