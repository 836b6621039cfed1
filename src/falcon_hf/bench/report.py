"""Results as Markdown: speed, agreement with plain ``generate()``, and the time of a round. Every row is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import BenchError
from .methods import BASELINE
from .summary import FORBIDDEN_GAP, PHASES

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

Result = dict[str, Any]
Row = Sequence[str]


def render(results: Sequence[Result]) -> str:
    """The report on one or several results (contents of result files), in the order given.

    Raises:
        BenchError: if there is no result, or one has no finished question.
    """
    if not results:
        raise BenchError("A report needs at least one result.")
    for result in results:
        if not result["summary"]:
            raise BenchError("A result has no finished question yet; let falcon-hf bench go on.")
    named = list(zip(_names(results), results, strict=True))
    parts = [
        speed_table(named),
        _SPEED_NOTE,
        agreement_table(named),
        gap_table(named),
        round_table(named),
        "\n".join(f"- {name}: {describe(result)}" for name, result in named),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_SPEED_NOTE = (
    "Speed: a question's tokens per second over plain `generate()`'s in the same run, setup and prefill included; "
    "median over questions, quartiles, range. Total time: plain's over the method's. tau: accepted drafts per round "
    "(the paper's); with bonus: tokens per target forward (Spec-Bench's). alpha: accepted drafts over all new tokens."
)


def _names(results: Sequence[Result]) -> list[str]:
    """A short name for each result: questions, dtype, decoding; numbered where two would share it."""
    names = []
    for result in results:
        settings = result["settings"]
        stem = Path(settings["questions"]["file"]).stem
        names.append(f"{stem}, {settings['target']['dtype']}, {decoding(settings['options'])}")
    for name in {name for name in names if names.count(name) > 1}:
        for number, index in enumerate([i for i, other in enumerate(names) if other == name], start=1):
            names[index] = f"{name} ({number})"
    return names


def decoding(options: dict[str, Any]) -> str:
    """How tokens are chosen, in words: ``greedy``, ``temperature 0.7, top_p 0.9``."""
    ruled_out = ("do_sample", "max_new_tokens", "temperature")
    others = [f"{name} {value}" for name, value in options.items() if name not in ruled_out]
    first = f"temperature {options.get('temperature', 'as configured')}" if options["do_sample"] else "greedy"
    return ", ".join([first, *others])


def describe(result: Result) -> str:
    """One line of provenance."""
    settings = result["settings"]
    target, questions, machine = settings["target"], settings["questions"], settings["machine"]
    versions, seeds = settings["versions"], settings["seeds"]
    where = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    steps = questions["count"] * len(seeds) * settings["repeats"]
    asked = {(entry["question_id"], entry["seed"], entry["repeat"]) for entry in result["runs"]}
    drafters = [
        f"`{label}` is {method['drafter']} (weights {method['weights_sha256'][:12]}, k = {method['block_size']}, "
        f"tree of {method['tree_nodes']} nodes, depth {method['tree_depth']})"
        for label, method in settings["methods"].items()
        if "weights_sha256" in method
    ]
    parts = [
        f"{target['name']}, {target['dtype']}, {target['attention']} attention",
        f"{where}{machine['cpu']}, {machine['threads']} threads",
        f"first turns of {questions['count']} questions of {questions['file']} (sha256 {questions['sha256'][:12]}), "
        f"{settings['options'].get('max_new_tokens', 'default')} new tokens at most, "
        f"{_counted(len(seeds), 'seed')}, {_counted(settings['repeats'], 'repeat')}",
        *drafters,
        f"falcon_hf {versions['falcon_hf']}, transformers {versions['transformers']}, torch {versions['torch']}",
        result["date"][:10],
        *([] if result["complete"] else [f"INCOMPLETE: {len(asked)} of {steps} done"]),
    ]
    return "; ".join(parts) + "."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def speed_table(named: Sequence[tuple[str, Result]]) -> str:
    """Tokens per second, speed ratios, acceptance."""
    head = ("run", "method", "tokens/s", "speed", "quartiles", "range", "total time", "tau", "with bonus", "alpha")
    return _table(head, 2, [(name, label, *_speed(label, own)) for name, label, own in _summaries(named)])


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


def agreement_table(named: Sequence[tuple[str, Result]]) -> str:
    """How many texts are plain's, and how large the gaps at first differences are; empty without a comparison."""
    rows = []
    for name, label, own in _summaries(named):
        if own["compared"]:
            numbers = (own["median_gap"], own["largest_gap"], own["median_gap_units"], own["largest_gap_units"])
            identical = f"{own['identical']} of {own['compared']}"
            rows.append((name, label, identical, *(_number(number) for number in numbers)))
    head = ("run", "method", "identical", "median gap", "largest gap", "median, in units", "largest, in units")
    return _table(head, 2, rows) if rows else ""


def gap_table(named: Sequence[tuple[str, Result]]) -> str:
    """Every first difference of the first repeat, folded away; empty if there is none."""
    rows = []
    for name, result in named:
        for entry in result["runs"]:
            if entry["identical"] is False and entry["repeat"] == 0:
                place = (str(entry["question_id"]), str(entry["seed"]), str(entry["first_difference"]))
                gap = (_number(entry[field]) for field in ("gap", "gap_unit", "gap_units"))
                rows.append((name, entry["method"], *place, *gap))
    if not rows:
        return ""
    head = ("run", "method", "question", "seed", "position", "gap", "rounding unit", "in units")
    note = (
        "Gap: plain's token's score minus the other's, by one forward on the text up to there. Unit: eps of the dtype "
        "times the score's magnitude; a gap of a few units is a tie that rounding decides. Sampled texts have no gap."
    )
    return f"<details><summary>Every first difference</summary>\n\n{_table(head, 2, rows)}\n\n{note}\n\n</details>"


def round_table(named: Sequence[tuple[str, Result]]) -> str:
    """Milliseconds and share of each phase of a round; empty if no method times its phases."""
    rows = []
    for name, label, own in _summaries(named):
        timed = own["round"]
        if timed is not None:
            phases = [f"{timed['ms'][phase]:.2f} ({100 * timed['share'][phase]:.1f}%)" for phase in PHASES]
            overhead = f"{100 * timed['overhead_share']:.1f}%"
            rows.append((name, label, str(own["rounds"]), f"{timed['total_ms']:.1f}", *phases, overhead))
    head = ("run", "method", "rounds", "ms a round", *PHASES, "walk + cache + rest")
    return _table(head, 2, rows) if rows else ""


def _summaries(named: Sequence[tuple[str, Result]]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(name, label, own) for name, result in named for label, own in result["summary"].items()]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "forbidden token" if abs(value) >= FORBIDDEN_GAP / 2 else f"{value:.3g}"


def _table(head: Row, text_columns: int, rows: Sequence[Row]) -> str:
    """A Markdown table; columns from ``text_columns`` on are aligned right."""
    rule = ["---" if column < text_columns else "---:" for column in range(len(head))]
    cells = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def with_report(text: str, report: str) -> str:
    """``text`` with ``report`` between its markers.

    Raises:
        BenchError: unless each marker stands there once, the begin first.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BenchError(f"there must be one line {BEGIN} and after it one line {END}.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{report.rstrip()}\n{END}{rest.split(END)[1]}"


def update_file(path: Path, report: str, check: bool = False) -> bool:
    """Put ``report`` between the markers of a file; with ``check``, only look. Returns whether it differed.

    Raises:
        BenchError: if the file cannot be read or written, or its markers are not one pair.
    """
    try:
        text = path.read_text(encoding="utf-8")
        try:
            updated = with_report(text, report)
        except BenchError as error:
            raise BenchError(f"{path} has no place for results: {error}") from error
        if updated != text and not check:
            path.write_text(updated, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} cannot be updated: {getattr(error, 'strerror', None) or 'not text'}.") from error
    return updated != text
