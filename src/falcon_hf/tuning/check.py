"""Predictions against real calls of ``generate()``: settings measured in turn with plain decoding, and a sweep.

Each prompt is answered by plain decoding and by every setting, one after the other, in an order that rotates from
prompt to prompt, so that a slow minute of the machine hits all alike. Speeds leave the prefill out, which drafting does
not change. ``check_file.py`` keeps what was measured after each prompt.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..runtime.tree_shape import TreeShape, chain
from .calibrate import NamedDrafter, Prompt
from .calibration import Calibration
from .choice import Option, Prediction, choose, fitting, grid, predict
from .cost_measurement import plain_decoding
from .errors import TuningError
from .whole_calls import generate_with

logger = logging.getLogger(__name__)

SWEEP_NODES = (8, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Measurement:
    """What one setting, or plain decoding, did on the prompts of one task or all.

    Attributes:
        calls: of ``generate()``.
        tokens: emitted, each call's first left out: that one is the prefill's.
        seconds: decoding, prefills left out.
        rounds: of Falcon; tokens of plain decoding.
    """

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0

    def __add__(self, other: Measurement) -> Measurement:
        return Measurement(
            self.calls + other.calls,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.rounds + other.rounds,
        )

    @property
    def tokens_per_second(self) -> float:
        """0 if nothing was emitted."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """E as it happened; 0 without a round."""
        return self.tokens / self.rounds if self.rounds else 0.0


@dataclass(frozen=True)
class Turn:
    """One prompt's calls.

    Attributes:
        task: the prompt's.
        calls: what plain decoding did (index 0) and each setting (from index 1 on).
    """

    task: str
    calls: tuple[Measurement, ...]


def spread_settings(options: Sequence[Option], count: int, max_passes: int, max_nodes: int) -> list[Prediction]:
    """``count`` settings that differ: the best, the paper's trees and chains, then trees spread over passes and sizes.

    Raises:
        TuningError: if ``count`` is below 1.
    """
    if count < 1:
        raise TuningError("Ask for at least one setting.")
    ranked = fitting(choose(options, max_passes, max_nodes), max_nodes)
    found = [ranked[0]]
    for option in options:
        k = option.model.block_size
        deepest = min(max_passes * k, option.model.depth)
        found.append(predict(option, TreeShape.paper(k).truncate(deepest), "paper"))
        found += [predict(option, chain(length), "chain") for length in (k, deepest) if length < max_nodes]
    spread = sweep_settings(options, max_passes, max_nodes)
    step = max(len(spread) / max(count - len(found), 1), 1.0)
    found += [spread[int(index * step)] for index in range(int(len(spread) / step))]
    unique = {(prediction.drafter, prediction.shape): prediction for prediction in found + ranked}
    return list(unique.values())[:count]


def sweep_settings(options: Sequence[Option], max_passes: int, max_nodes: int) -> list[Prediction]:
    """The best tree for each drafter (k), number of passes m, and N of ``SWEEP_NODES`` within the limit (or that)."""
    sizes = [size for size in SWEEP_NODES if size <= max_nodes] or [max_nodes]
    return [one for option in options for one in grid(option, range(1, max_passes + 1), sizes)]


def measure(
    target: PreTrainedModel,
    drafters: Sequence[NamedDrafter],
    prompts: Sequence[Prompt],
    settings: Sequence[Prediction],
    max_new_tokens: int,
    repeats: int = 1,
    report: Callable[[str], None] = logger.info,
    done: Sequence[Turn] = (),
    keep: Callable[[Turn], None] = lambda turn: None,
) -> list[Turn]:
    """Measure plain decoding and each setting on every prompt, ``repeats`` times.

    Args:
        target: the target.
        drafters: those that the settings name.
        prompts: at least one.
        settings: what to measure.
        max_new_tokens: of each call.
        repeats: times the prompts are gone through.
        report: told what is being done.
        done: the first turns, where an earlier run has measured them.
        keep: given each further turn.

    Raises:
        TuningError: if there is no prompt, or a setting's drafter is not among ``drafters``.
    """
    by_name = {named.name: named.drafter for named in drafters}
    missing = [setting.drafter for setting in settings if setting.drafter not in by_name]
    if missing or not prompts:
        raise TuningError(f"No drafter {missing[0]!r} is given." if missing else "A check needs at least one prompt.")

    def run(index: int, prompt: Prompt, new_tokens: int) -> Measurement:
        if index == 0:
            options = {"do_sample": False, "max_new_tokens": new_tokens}
            tokens, seconds = plain_decoding(target, prompt.ids, options)
            return Measurement(1, tokens, seconds, tokens)
        setting = settings[index - 1]
        counted = generate_with(target, by_name[setting.drafter], setting.tree, prompt.ids, new_tokens, setting.lookup)
        seconds = counted.total_seconds - counted.prefill_seconds
        return Measurement(1, counted.new_tokens - 1, seconds, counted.rounds)

    turns, total, methods = list(done), repeats * len(prompts), range(len(settings) + 1)
    if len(turns) < total:
        for index in methods:  # first calls cost more
            run(index, prompts[0], min(max_new_tokens, 8))
    for turn in range(len(turns), total):
        prompt = prompts[turn % len(prompts)]
        report(f"Prompt {turn + 1} of {total}")
        order = [(turn + step) % len(methods) for step in methods]
        calls = {index: run(index, prompt, max_new_tokens) for index in order}
        turns.append(Turn(prompt.task, tuple(calls[index] for index in methods)))
        keep(turns[-1])
    return turns


def compare(calibration: Calibration, settings: Sequence[Prediction], turns: Sequence[Turn]) -> dict[str, Any]:
    """Predictions beside what the ``turns`` measured; JSON values.

    ``error`` is |predicted - measured| / measured tokens per second, ``speedup_error`` the same of the speedup over
    plain decoding, in which a machine that is slower as a whole than when it was calibrated does not show; both
    None for a dynamic tree, whose prediction is that of a static one of its size. ``quartiles`` are of the speedups
    prompt by prompt, of those where both have a speed. ``best_by_task`` says, for each task that has a speed, which
    setting was fastest and how far the predicted best one is from it.

    Raises:
        TuningError: if no answer is long enough to have a speed.
    """
    tasks = list(dict.fromkeys(turn.task for turn in turns))
    totals = _sums(turns)
    measured = {task: _sums([turn for turn in turns if turn.task == task]) for task in tasks}
    plain = totals[0]
    if not all(own.tokens for own in totals):
        raise TuningError("No answer has two tokens or more, so there is no speed: check on other prompts.")
    timed = [task for task in tasks if all(own.tokens for own in measured[task])]
    entries: list[dict[str, Any]] = []
    for index, (setting, own) in enumerate(zip(settings, totals[1:], strict=True), start=1):
        entries.append(
            {
                "drafter": setting.drafter,
                "kind": setting.kind,
                "block_size": setting.block_size,
                "passes": setting.passes,
                "width": setting.width,
                "nodes": setting.nodes,
                "tree": setting.tree,
                "lookup": setting.lookup,
                "predicted": {
                    "tokens_per_round": setting.tokens,
                    "round_seconds": setting.round_seconds,
                    "tokens_per_second": setting.tokens_per_second,
                    "speedup": setting.speedup,
                },
                "measured": {
                    "tokens_per_round": own.tokens_per_round,
                    "round_seconds": own.seconds / own.rounds if own.rounds else 0.0,
                    "tokens_per_second": own.tokens_per_second,
                    "speedup": _speedup(totals, index),
                    "quartiles": _quartiles(turns, index),
                },
                "by_task": {task: _speedup(measured[task], index) for task in timed},
                "error": None if setting.dynamic else _error(setting.tokens_per_second, own.tokens_per_second),
                "speedup_error": None if setting.dynamic else _error(setting.speedup, _speedup(totals, index)),
            }
        )
    errors, speedup_errors = (
        [entry[name] for entry in entries if entry[name] is not None] for name in ("error", "speedup_error")
    )
    best = max(range(len(entries)), key=lambda index: entries[index]["predicted"]["tokens_per_second"])
    return {
        "provenance": calibration.provenance,
        "plain": {
            "predicted": {"tokens_per_second": 1 / calibration.plain_seconds},
            "measured": {"tokens_per_second": plain.tokens_per_second},
        },
        "settings": entries,
        "summary": {
            "settings": len(entries),
            "calls": totals[0].calls,
            "median_error": statistics.median(errors) if errors else None,
            "largest_error": max(errors, default=None),
            "median_speedup_error": statistics.median(speedup_errors) if speedup_errors else None,
            "largest_speedup_error": max(speedup_errors, default=None),
            "predicted_best": best,
            "best_by_task": {task: _best(entries, best, task) for task in timed},
            "best": _best(entries, best, None),
        },
    }


def _sums(turns: Sequence[Turn]) -> list[Measurement]:
    """What plain decoding and each setting did in all turns together."""
    return [sum(own, Measurement()) for own in zip(*(turn.calls for turn in turns), strict=True)]


def _speedup(calls: Sequence[Measurement], index: int) -> float:
    return calls[index].tokens_per_second / calls[0].tokens_per_second


def _error(predicted: float, measured: float) -> float:
    return abs(predicted / measured - 1)


def _quartiles(turns: Sequence[Turn], index: int) -> list[float]:
    """First, second and third quartile of a setting's speedups on single prompts."""
    timed = [turn.calls for turn in turns if turn.calls[0].tokens and turn.calls[index].tokens]
    speedups = [_speedup(calls, index) for calls in timed]
    return statistics.quantiles(speedups, n=4, method="inclusive") if len(speedups) > 1 else speedups * 3


def _best(entries: list[dict[str, Any]], chosen: int, task: str | None) -> dict[str, Any]:
    """The fastest setting on a task (None: on all), and how much faster it is than the predicted best one."""

    def speed(index: int) -> float:
        entry = entries[index]
        return float(entry["measured"]["speedup"] if task is None else entry["by_task"][task])

    fastest = max(range(len(entries)), key=speed)
    names = ("drafter", "kind", "block_size", "passes", "width", "nodes")
    return {
        "setting": fastest,
        **{name: entries[fastest][name] for name in names},
        "speedup": speed(fastest),
        "chosen_speedup": speed(chosen),
        "chosen_falls_short_by": 1 - speed(chosen) / speed(fastest),
    }
