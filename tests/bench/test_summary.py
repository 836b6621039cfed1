"""Figures of a run, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from falcon_hf.bench.summary import PHASES, acceptance_by_position, summarise

PHASED = {
    "rounds": 4, "drafted": 12, "accepted": 4, "new_tokens": 9, "prefill_seconds": 0.2, "draft_seconds": 0.2,
    "verify_seconds": 0.4, "walk_seconds": 0.1, "cache_seconds": 0.06, "total_seconds": 1.0,
}  # fmt: skip


def entry(method: str, question: int, seconds: float, tokens: int, **fields: Any) -> dict[str, Any]:
    counts = {"rounds": tokens - 1, "accepted": 0, "new_tokens": tokens}
    compared = dict.fromkeys(("identical", "first_difference", "gap", "gap_unit", "gap_units"))
    where = {"question_id": question, "category": "a", "seed": 0, "repeat": 0, "prompt_tokens": 3}
    call = {"method": method, "order": 0, "seconds": seconds, "new_tokens": tokens, "output_sha256": "0"}
    return {**where, **call, **compared, "statistics": counts, **fields}


def test_speed() -> None:
    entries = [
        entry("plain", 1, 2.0, 10), entry("fast", 1, 1.0, 10),
        entry("plain", 2, 2.0, 20), entry("fast", 2, 4.0, 20),
        entry("plain", 3, 1.0, 10), entry("fast", 3, 1.0, 12),
    ]  # fmt: skip
    summary = summarise(entries, ["fast", "absent", "plain"])
    assert list(summary) == ["fast", "plain"]
    fast = summary["fast"]
    assert fast["tokens_per_second"] == pytest.approx(42 / 6)
    assert (fast["speed_ratio"]["min"], fast["speed_ratio"]["median"], fast["speed_ratio"]["max"]) == (0.5, 1.2, 2.0)
    assert fast["total_time_ratio"] == pytest.approx(5 / 6)
    assert summary["plain"]["speed_ratio"]["median"] == 1.0
    assert summary["plain"]["total_time_ratio"] == 1.0


def test_repeats_and_seeds_of_a_question_are_one_ratio() -> None:
    entries = [
        entry("plain", 1, 1.0, 10), entry("fast", 1, 0.5, 10),
        entry("plain", 1, 3.0, 10, repeat=1), entry("fast", 1, 1.5, 10, repeat=1),
    ]  # fmt: skip
    ratio = summarise(entries, ["plain", "fast"])["fast"]["speed_ratio"]
    assert (ratio["count"], ratio["median"]) == (1, 2.0)


def test_without_plain_there_is_no_ratio() -> None:
    summary = summarise([entry("fast", 1, 1.0, 10)], ["fast"])
    assert summary["fast"]["speed_ratio"] is None
    assert summary["fast"]["total_time_ratio"] is None
    assert summary["fast"]["compared"] == 0


def test_acceptance_is_pooled() -> None:
    one = {"rounds": 4, "accepted": 5, "new_tokens": 10}
    other = {"rounds": 1, "accepted": 3, "new_tokens": 5}
    figures = summarise([entry("m", 1, 1.0, 10, statistics=one), entry("m", 2, 1.0, 5, statistics=other)], ["m"])["m"]
    assert figures["tau"] == pytest.approx(8 / 5)
    assert figures["tau_with_bonus"] == pytest.approx(13 / 5)
    assert figures["alpha"] == pytest.approx(8 / 15)


def test_agreement_counts_texts_not_repeats() -> None:
    def compared(question: int, repeat: int, identical: bool, gap: float | None = None) -> dict[str, Any]:
        units = None if gap is None else abs(gap) / 0.5
        fields = {"identical": identical, "gap": gap, "gap_unit": gap and 0.5, "gap_units": units}
        return entry("m", question, 1.0, 10, repeat=repeat, **fields)

    entries = [
        compared(1, 0, True), compared(1, 1, True), compared(2, 0, True), compared(2, 1, False, -1.0),
        compared(3, 0, False, 0.25), compared(3, 1, False, 0.5),
    ]  # fmt: skip
    figures = summarise(entries, ["m"])["m"]
    assert (figures["compared"], figures["identical"]) == (3, 1)
    assert (figures["median_gap"], figures["largest_gap"]) == (0.5, 1.0)
    assert (figures["median_gap_units"], figures["largest_gap_units"]) == (1.0, 2.0)


def test_round_breakdown() -> None:
    timed = summarise([entry("m", 1, 1.5, 9, statistics=PHASED)], ["m"])["m"]["round"]
    assert timed["total_ms"] == pytest.approx(200)
    assert [timed["ms"][phase] for phase in PHASES] == pytest.approx([50, 100, 25, 15, 10])
    assert sum(timed["share"].values()) == pytest.approx(1)
    assert timed["overhead_share"] == pytest.approx((25 + 15 + 10) / 200)
    assert (timed["prefill_ms"], timed["outside_ms"]) == (pytest.approx(200), pytest.approx(500))


def test_prefill_is_of_a_call_whatever_its_batch() -> None:
    """A row has its share of a batch's time: two halves are one call."""
    half = {name: value / 2 for name, value in PHASED.items()}
    rows = [entry("m", row, 0.75, 9, statistics=half, batch=[1, 2]) for row in (1, 2)]
    timed = summarise(rows, ["m"])["m"]["round"]
    assert (timed["prefill_ms"], timed["outside_ms"]) == (pytest.approx(200), pytest.approx(500))


def test_no_breakdown_without_phases_or_rounds() -> None:
    assert summarise([entry("m", 1, 1.0, 10)], ["m"])["m"]["round"] is None
    no_round = {**PHASED, "rounds": 0}
    assert summarise([entry("m", 1, 1.0, 1, statistics=no_round)], ["m"])["m"]["round"] is None


def test_acceptance_by_position_sums_to_tau() -> None:
    entries = [entry("m", 1, 1.0, 9, accepted=[2, 0, 1]), entry("m", 2, 1.0, 9, accepted=[0])]
    shares = acceptance_by_position(entries)
    assert shares == [2 / 4, 1 / 4]
    assert sum(shares) == pytest.approx((2 + 0 + 1 + 0) / 4)
    assert acceptance_by_position([entry("m", 1, 1.0, 9)]) == []
    assert acceptance_by_position([entry("m", 1, 1.0, 9, accepted=[0, 0])]) == []


def test_a_batchs_questions_are_one_ratio_and_turns_are_summed() -> None:
    shared = {"batch": [1, 2]}
    entries = [
        entry("plain", 1, 1.0, 10, **shared), entry("plain", 2, 1.0, 5, **shared),
        entry("fast", 1, 0.5, 10, **shared), entry("fast", 2, 0.5, 5, **shared),
        entry("plain", 3, 1.0, 10, turn=0), entry("plain", 3, 2.0, 10, turn=1),
        entry("fast", 3, 1.0, 10, turn=0), entry("fast", 3, 1.0, 10, turn=1),
    ]  # fmt: skip
    ratio = summarise(entries, ["plain", "fast"])["fast"]["speed_ratio"]
    assert (ratio["count"], ratio["max"], ratio["min"]) == (2, 2.0, 1.5)


def test_a_batch_is_one_ratio_though_a_later_turn_has_fewer_of_it() -> None:
    entries = [
        entry(method, question, seconds, 10, turn=turn, batch=batch, batch_of=1)
        for method, seconds in (("plain", 1.0), ("fast", 0.5))
        for turn, batch in enumerate(([1, 2], [2]))
        for question in batch
    ]
    ratio = summarise(entries, ["plain", "fast"])["fast"]["speed_ratio"]
    assert (ratio["count"], ratio["median"]) == (1, 2.0)


def test_rows_count_their_own_rounds() -> None:
    """Of a batch with 6 rounds one row ended after 3: its tau is over 3, and the call's rounds are 6."""
    rows = [{"rounds": 3.0, "row_rounds": own, "accepted": 3, "new_tokens": own + 4} for own in (6, 3)]
    figures = summarise([entry("m", 1, 1.0, row["row_rounds"] + 4, statistics=row) for row in rows], ["m"])["m"]
    assert figures["rounds"] == 6
    assert figures["tau"] == pytest.approx(6 / 9)
    assert figures["tau_with_bonus"] == pytest.approx((10 + 7 - 2) / 9)
