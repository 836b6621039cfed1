"""The tables of a report, each empty where there is nothing to show. A run's name and its result go together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .methods import BASELINE
from .summary import FORBIDDEN_GAP, PHASES, acceptance_by_position, summarise

Result = dict[str, Any]
Row = Sequence[str]
Named = Sequence[tuple[str, Result]]


def speed(named: Named) -> str:
    """Tokens per second, speed ratios, acceptance; a method that did not run has a row that says so."""
    head = ("run", "method", "tokens/s", "speed", "quartiles", "range", "total time", "tau", "with bonus", "alpha")
    rows = []
    for name, result in named:
        rows += [(name, label, *_speed(label, own)) for label, own in result["summary"].items()]
        rows += [(name, label, "did not run", *["-"] * 7) for label in result.get("failed", {})]
    return _table(head, 2, rows)


def brief(named: Named) -> str:
    """Speed, tokens a round and agreement in one table, a row for each method but plain, whose speed is a column."""
    head = ("run", "method", "plain tokens/s", "tokens/s", "speed", "quartiles", "range", "tokens a round", "identical")
    rows = []
    for name, result in named:
        summary = result["summary"]
        plain = f"{summary[BASELINE]['tokens_per_second']:.1f}" if BASELINE in summary else "-"
        for label, own in summary.items():
            if label != BASELINE:
                shown = _speed(label, own)
                rows.append((name, label, plain, *shown[:4], shown[6], _same(own)))
        rows += [(name, label, plain, "did not run", *["-"] * 5) for label in result.get("failed", {})]
    return _table(head, 2, rows)


def _speed(label: str, figures: dict[str, Any]) -> Row:
    ratio, total = figures["speed_ratio"], figures["total_time_ratio"]
    speed = ["-"] * 4
    if label != BASELINE and ratio is not None:
        speed = [
            f"{ratio['median']:.2f}x",
            f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}",
            f"{ratio['min']:.2f} to {ratio['max']:.2f}",
            f"{total:.2f}x",
        ]
    acceptance = (f"{figures['tau']:.2f}", f"{figures['tau_with_bonus']:.2f}", f"{100 * figures['alpha']:.0f}%")
    return (f"{figures['tokens_per_second']:.1f}", *speed, *acceptance)


def _same(figures: dict[str, Any]) -> str:
    return f"{figures['identical']} of {figures['compared']}" if figures["compared"] else "-"


def tasks(named: Named) -> str:
    """Speed, acceptance and agreement of each category of questions, folded away; empty if no run has two."""
    rows = []
    for name, result in named:
        for category, figures in by_category(result).items():
            for label, own in figures.items():
                shown = _speed(label, own)
                rows.append((name, category, label, str(own["calls"]), shown[0], shown[1], *shown[5:], _same(own)))
    if not rows:
        return ""
    head = ("run", "task", "method", "texts", "tokens/s", "speed", "tau", "with bonus", "alpha", "identical")
    return folded("By task", _table(head, 3, rows))


def by_category(result: Result) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures of each method for each category, in the order of the questions; empty if there is only one category."""
    runs = result["runs"]
    categories = list(dict.fromkeys(entry["category"] for entry in runs))
    if len(categories) < 2:
        return {}
    labels = list(result["settings"]["methods"])
    return {
        category: summarise([entry for entry in runs if entry["category"] == category], labels)
        for category in categories
    }


def positions(named: Named) -> str:
    """Share of rounds that accepted a draft at each depth, with a title; empty if no method knows."""
    found = []
    for name, result in named:
        for label in result["summary"]:
            shares = acceptance_by_position([entry for entry in result["runs"] if entry["method"] == label])
            if shares:
                found.append((name, label, shares))
    deepest = max((len(shares) for *_, shares in found), default=0)
    if not deepest:
        return ""
    rows = [
        (name, label, *(f"{100 * share:.0f}%" for share in shares), *["-"] * (deepest - len(shares)))
        for name, label, shares in found
    ]
    head = ("run", "method", *(f"depth {depth}" for depth in range(1, deepest + 1)))
    return titled("Rounds that accept a draft at each depth", _table(head, 2, rows))


def rows_of_batches(named: Named) -> str:
    """Spread of tau over the rows of batches, with a title; empty if no run has batches."""
    rows = []
    for name, result in named:
        if result["settings"].get("batch_size", 1) == 1:
            continue
        for label, own in result["summary"].items():
            taus = own.get("tau_by_row")
            if label != BASELINE and taus is not None:
                quartiles = f"{taus['lower_quartile']:.2f} to {taus['upper_quartile']:.2f}"
                shown = (f"{taus['median']:.2f}", quartiles, f"{taus['min']:.2f} to {taus['max']:.2f}")
                rows.append((name, label, str(taus["count"]), *shown))
    head = ("run", "method", "rows", "median", "quartiles", "range")
    return titled("tau of a batch's rows", _table(head, 2, rows)) if rows else ""


def memory(named: Named) -> str:
    """Peak memory of a call (the process's on a CPU, torch's on CUDA), folded away; empty where not measured."""
    rows = []
    for name, result in named:
        baseline = result["summary"].get(BASELINE, {}).get("peak_bytes")
        for label, own in result["summary"].items():
            peak = own.get("peak_bytes")
            if peak is not None:
                over = "-" if label == BASELINE or baseline is None else f"{(peak - baseline) / 2**20:+.0f}"
                rows.append((name, label, f"{peak / 2**20:.0f}", over))
    return folded("Peak memory", _table(("run", "method", "peak MiB", "beyond plain's"), 2, rows)) if rows else ""


def agreement(named: Named) -> str:
    """How many texts are plain's, how large the gaps at first differences, with a title; empty without a comparison."""
    rows = []
    for name, label, own in _summaries(named):
        if own["compared"]:
            numbers = (own["median_gap"], own["largest_gap"], own["median_gap_units"], own["largest_gap_units"])
            rows.append((name, label, _same(own), *(_number(number) for number in numbers)))
    head = ("run", "method", "identical", "median gap", "largest gap", "median, in units", "largest, in units")
    return titled("Texts that are plain's, and gaps where others part", _table(head, 2, rows)) if rows else ""


def gaps(named: Named) -> str:
    """Every first difference of the first repeat, folded away; empty if there is none."""
    rows = []
    for name, result in named:
        for entry in result["runs"]:
            if entry["identical"] is False and entry["repeat"] == 0:
                question = str(entry["question_id"])
                if entry.get("turn", 0):
                    question += f", turn {entry['turn'] + 1}"
                place = (question, str(entry["seed"]), str(entry["first_difference"]))
                gap = (_number(entry[field]) for field in ("gap", "gap_unit", "gap_units"))
                rows.append((name, entry["method"], *place, *gap))
    if not rows:
        return ""
    head = ("run", "method", "question", "seed", "position", "gap", "rounding unit", "in units")
    note = (
        "Gap: plain's token's score minus the other's, by one forward on the text up to there. Unit: eps of the dtype "
        "times the score's magnitude; a gap of a few units is a tie that rounding decides. Sampled texts have no gap."
    )
    return folded("Every first difference", f"{_table(head, 2, rows)}\n\n{note}")


def rounds(named: Named) -> str:
    """Milliseconds and share of each phase of a round, with a title; empty if no method times its phases."""
    rows = []
    for name, label, own in _summaries(named):
        timed = own["round"]
        if timed is not None:
            phases = [f"{timed['ms'][phase]:.2f} ({100 * timed['share'][phase]:.1f}%)" for phase in PHASES]
            overhead = f"{100 * timed['overhead_share']:.1f}%"
            rows.append((name, label, str(own["rounds"]), f"{timed['total_ms']:.1f}", *phases, overhead))
    head = ("run", "method", "rounds", "ms a round", *PHASES, "walk + cache + rest")
    return titled("Where a round's time goes, ms", _table(head, 2, rows)) if rows else ""


def _summaries(named: Named) -> list[tuple[str, str, dict[str, Any]]]:
    return [(name, label, own) for name, result in named for label, own in result["summary"].items()]


def titled(title: str, content: str) -> str:
    """With its title above it."""
    return f"**{title}**\n\n{content}"


def folded(title: str, content: str) -> str:
    """Shown when its title is clicked, on GitHub and the Hub."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def unfolded(report: str) -> str:
    """A report for a terminal, where nothing is clicked and HTML is left out: titles above what was folded away."""
    return re.sub(r"<details><summary>(.*)</summary>", r"**\1**", report).replace("</details>\n", "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "forbidden token" if abs(value) >= FORBIDDEN_GAP / 2 else f"{value:.3g}"


def _table(head: Row, text_columns: int, rows: Sequence[Row]) -> str:
    """A Markdown table; columns from ``text_columns`` on are aligned right."""
    rule = ["---" if column < text_columns else "---:" for column in range(len(head))]
    cells = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
