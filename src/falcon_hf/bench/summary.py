"""From a run's entries to its figures: speed against plain, acceptance, agreement, and where a round's time goes."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from ..metrics import spread
from .methods import BASELINE

PHASES = ("draft", "verify", "walk", "cache", "rest")

FORBIDDEN_GAP = 1e300
"""Stands for the infinite gap of a token that a processor forbids: JSON has no infinity."""

Entry = dict[str, Any]


def summarise(entries: list[Entry], labels: list[str]) -> dict[str, dict[str, Any]]:
    """Figures of the methods ``labels``, in that order; those without an entry are left out.

    Sums run over all turns, seeds and repeats. ``speed_ratio`` is the spread, over questions, of tokens per second
    against plain's; ``total_time_ratio`` is plain's whole time over the method's. Both are None without plain.
    """
    by_method = {label: [entry for entry in entries if entry["method"] == label] for label in labels}
    plain = by_method.get(BASELINE)
    return {label: _figures(own, plain) for label, own in by_method.items() if own}


def _figures(entries: list[Entry], plain: list[Entry] | None) -> dict[str, Any]:
    seconds, tokens = _sum(entries, "seconds"), _sum(entries, "new_tokens")
    return {
        "calls": len(entries),
        "new_tokens": int(tokens),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "speed_ratio": None if plain is None else asdict(spread(speed_ratios(entries, plain))),
        "total_time_ratio": None if plain is None else _sum(plain, "seconds") / seconds,
        **_acceptance(entries),
        **_agreement(entries),
        "peak_bytes": max((entry["peak_bytes"] for entry in entries if entry.get("peak_bytes")), default=None),
        "round": _round(entries),
    }


def call_key(entry: Entry) -> int | str:
    """The question whose calls the entry's are: of a batch, its first."""
    key: int | str = entry.get("batch_of", entry.get("batch", [entry["question_id"]])[0])
    return key


def speed_ratios(entries: list[Entry], plain: list[Entry]) -> list[float]:
    """One ratio a question: the method's tokens per second over plain's; turns, seeds and repeats summed.

    Questions of one batch share their time, so a batch gives one ratio.
    """

    def speeds(given: list[Entry]) -> dict[int | str, float]:
        questions: dict[int | str, list[Entry]] = {}
        for entry in given:
            questions.setdefault(call_key(entry), []).append(entry)
        return {key: _sum(own, "new_tokens") / _sum(own, "seconds") for key, own in questions.items()}

    baseline = speeds(plain)
    return [speed / baseline[question] for question, speed in speeds(entries).items()]


def _sum(entries: list[Entry], field: str) -> float:
    return sum(entry[field] for entry in entries)


def _total(entries: list[Entry], field: str) -> float:
    return sum(entry["statistics"][field] for entry in entries)


def _acceptance(entries: list[Entry]) -> dict[str, Any]:
    """Acceptance, pooled over all rows; a row counts the rounds before its end (all of them at batch size 1)."""
    accepted, tokens = (_total(entries, name) for name in ("accepted", "new_tokens"))
    rounds = sum(entry["statistics"].get("row_rounds", entry["statistics"]["rounds"]) for entry in entries)
    return {
        "rounds": round(_total(entries, "rounds")),
        "tau": accepted / rounds if rounds else 0.0,
        # Each round gives its accepted drafts and one token of the target's own.
        "tau_with_bonus": accepted / rounds + 1 if rounds else 0.0,
        "alpha": accepted / tokens if tokens else 0.0,
        "tau_by_row": asdict(spread([entry["statistics"]["tau"] for entry in entries if "tau" in entry["statistics"]]))
        if any("tau" in entry["statistics"] for entry in entries)
        else None,
    }


def acceptance_by_position(entries: list[Entry]) -> list[float]:
    """Share of rounds in which at least d drafts were accepted, for d = 1, 2, ...; their sum is tau.

    Empty if no entry knows its rounds, or nothing was accepted.
    """
    lengths = [length for entry in entries for length in entry.get("accepted", ())]
    return [
        sum(length >= depth for length in lengths) / len(lengths) for depth in range(1, max(lengths, default=0) + 1)
    ]


def _agreement(entries: list[Entry]) -> dict[str, Any]:
    """Texts compared with plain's, one a question, turn and seed: identical if they were so in every repeat."""
    texts: dict[tuple[Any, ...], bool] = {}
    for entry in entries:
        if entry["identical"] is not None:
            key = (entry["question_id"], entry.get("turn", 0), entry["seed"])
            texts[key] = texts.get(key, True) and entry["identical"]
    gaps = [abs(entry["gap"]) for entry in entries if entry["gap"] is not None]
    units = [entry["gap_units"] for entry in entries if entry["gap"] is not None]
    return {
        "compared": len(texts),
        "identical": sum(texts.values()),
        "median_gap": statistics.median(gaps) if gaps else None,
        "largest_gap": max(gaps, default=None),
        "median_gap_units": statistics.median(units) if units else None,
        "largest_gap_units": max(units, default=None),
    }


def _round(entries: list[Entry]) -> dict[str, Any] | None:
    """Milliseconds per round and shares of each phase; None for a method that does not time its phases.

    ``prefill_ms`` and ``outside_ms`` are per call of ``generate()``, a batch's too: the prompt's forward, and what
    ``generate()`` does before the decoding loop and after it.
    """
    rounds = _total(entries, "rounds")
    if not rounds or any("draft_seconds" not in entry["statistics"] for entry in entries):
        return None
    seconds = {phase: _total(entries, f"{phase}_seconds") for phase in ("prefill", *PHASES[:-1], "total")}
    decoding = seconds["total"] - seconds["prefill"]
    seconds["rest"] = decoding - sum(seconds[phase] for phase in PHASES[:-1])
    shares = {phase: seconds[phase] / decoding for phase in PHASES}
    calls = sum(1 / len(entry.get("batch", [None])) for entry in entries)
    return {
        "ms": {phase: 1000 * seconds[phase] / rounds for phase in PHASES},
        "share": shares,
        "total_ms": 1000 * decoding / rounds,
        "overhead_share": shares["walk"] + shares["cache"] + shares["rest"],
        "prefill_ms": 1000 * seconds["prefill"] / calls,
        "outside_ms": 1000 * (_sum(entries, "seconds") - seconds["total"]) / calls,
    }
