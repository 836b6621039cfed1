"""Results as Markdown: tables, notes and provenance; every row is kept. And a file kept equal to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run_names import processor_name, setting_name, stem_of_questions, turns_name
from ..whole_files import write_whole
from . import tables
from .errors import BenchError
from .tables import Result

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def render(results: Sequence[Result], brief: bool = False) -> str:
    """The report on one or several results (contents of result files), in the order given.

    Args:
        results: at least one.
        brief: one table of speed and agreement, and where it is from folded away, for the first page of a project.

    Raises:
        BenchError: if there is no result, or one has no finished question.
    """
    if not results:
        raise BenchError("A report needs at least one result.")
    for result in results:
        if not result["summary"]:
            raise BenchError("A result has no finished question yet; let falcon-hf bench go on.")
    named = list(zip(names(results), results, strict=True))
    sources = "\n".join(f"- {name}: {describe(result)}" for name, result in named)
    provenance = tables.folded("Models, machine and settings of each run", sources)
    if brief:
        parts = [tables.brief(named), _BRIEF_NOTE, provenance]
    else:
        further = (
            tables.agreement, tables.tasks, tables.gaps, tables.positions, tables.rows_of_batches, tables.rounds,
            tables.memory,
        )  # fmt: skip
        parts = [tables.speed(named), _SPEED_NOTE, *(table(named) for table in further), provenance]
    return "\n\n".join(part for part in parts if part) + "\n"


_SPEED = (
    "Speed: a question's tokens per second over plain `generate()`'s in the same run, setup and prefill included; "
    "median over questions, quartiles, range."
)
_BRIEF_NOTE = (
    f"{_SPEED} Tokens a round: tokens per forward of the target. Identical: texts that are plain's, token for token."
)
_SPEED_NOTE = (
    f"{_SPEED} Total time: plain's over the method's. tau: accepted drafts per round "
    "(the paper's); with bonus: tokens per target forward (Spec-Bench's). alpha: accepted drafts over all new tokens."
)


def names(results: Sequence[Result]) -> list[str]:
    """A short name for each result: questions, dtype, decoding, batch, turns; numbered where two would share it."""
    names = [f"{stem_of_questions(result['settings'])}, {setting_name(result['settings'])}" for result in results]
    for name in {name for name in names if names.count(name) > 1}:
        for number, index in enumerate([i for i, other in enumerate(names) if other == name], start=1):
            names[index] = f"{name} ({number})"
    return names


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
        f"{_tree(method)})"
        for label, method in settings["methods"].items()
        if "weights_sha256" in method
    ]
    drafters += [
        f"`{label}` drafts with {method['model']} ({method['parameters'] / 1e6:.0f}M parameters, "
        f"{method['tokens']} tokens, {method['schedule']} schedule)"
        for label, method in settings["methods"].items()
        if method.get("method") == "assistant"
    ]
    drafters += [
        f"`{label}` compiles in mode {method['mode']}"
        for label, method in settings["methods"].items()
        if method.get("mode", "default") != "default"
    ]
    parts = [
        f"{target['name']}, {target['dtype']}, {target['attention']} attention",
        f"{where}{processor_name(machine)}, {_counted(machine['threads'], 'thread')}",
        f"{turns_name(questions['turns'])} of {_counted(questions['count'], 'question')} of {questions['file']} "
        f"(sha256 {questions['sha256'][:12]}{', chosen ' + questions['chosen'] if 'chosen' in questions else ''}), "
        f"{settings['options'].get('max_new_tokens', 'default')} new tokens at most, "
        f"{_counted(len(seeds), 'seed')}, {_counted(settings['repeats'], 'repeat')}",
        *([f"batches of {settings['batch_size']}"] if settings.get("batch_size", 1) > 1 else []),
        *drafters,
        *(f"`{label}` did not run: {why}" for label, why in result.get("failed", {}).items()),
        f"falcon_hf {versions['falcon_hf']}, transformers {versions['transformers']}, torch {versions['torch']}",
        result["date"][:10],
        *([] if result["complete"] else [f"INCOMPLETE: {len(asked)} of {steps} done"]),
    ]
    return "; ".join(parts) + "."


def _tree(method: dict[str, Any]) -> str:
    size = f"tree of {method['tree_nodes']} nodes, depth {method['tree_depth']}"
    if not isinstance(method.get("tree"), dict):
        return size
    looked_up = method.get("config", {}).get("lookup") is not None
    return f"dynamic {size}{', with look-up' if looked_up else ''}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


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
            write_whole(path, updated)
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} cannot be updated: {getattr(error, 'strerror', None) or 'not text'}.") from error
    return updated != text
