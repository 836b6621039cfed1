"""A training's progress on the terminal: one line a log, one an evaluation, and a bar while features are computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Prints what the trainer logs, with the time left.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: tuple[float, int] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock at the first step, which after a resume is not step 0."""
        if self._began is None:
            self._began = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self._console.print(self._training_line(state, logs), soft_wrap=True)
        elif "eval_loss" in logs:
            for line in evaluation_lines(logs):
                self._console.print(line, soft_wrap=True)

    def _training_line(self, state: Any, logs: dict[str, Any]) -> str:
        named = {"agreement": "agrees", "pass2_agreement": "pass 2", "kl": "kl", "smooth_l1": "smooth-l1"}
        numbers = " ".join(f"{label} {logs[name]:.3f}" for name, label in named.items() if name in logs)
        left = ""
        if self._began is not None and state.global_step > self._began[1]:
            since, first = self._began
            seconds = (time.monotonic() - since) / (state.global_step - first) * (state.max_steps - state.global_step)
            left = f", {seconds / 60:.0f} min left"
        speed = logs.get("positions_per_second", 0.0)
        step = f"step {state.global_step}/{state.max_steps}"
        return f"{step} loss {logs['loss']:.4f} {numbers} {speed:,.0f} positions/s{left}"


def evaluation_lines(logs: dict[str, Any]) -> list[str]:
    """An evaluation as lines: loss and acceptance length, then the accuracies of each pass."""
    tau = logs["eval_tau_with_bonus"]
    lines = [f"held out: loss {logs['eval_loss']:.4f}, {tau:.3f} tokens a round (simulated)"]
    number = 1
    while places := _accuracies(logs, f"eval_pass{number}", 1):
        lines.append(f"  pass {number}, top 1 / 3 / 10 in % a position: {places}")
        number += 1
    if places := _accuracies(logs, "eval_corrected", 2):
        lines.append(f"  pass 1 corrected for the token before, from position 2 on: {places}")
    return lines


def _accuracies(logs: dict[str, Any], name: str, place: int) -> str:
    """Top 1 / 3 / 10 in % of each position from ``place`` on; empty where there is none."""
    places = []
    while f"{name}_position{place}_top1" in logs:
        tops = [logs[f"{name}_position{place}_top{top}"] for top in (1, 3, 10)]
        places.append(" / ".join(f"{100 * top:.1f}" for top in tops))
        place += 1
    return "; ".join(places)


@contextmanager
def feature_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, all) tokens; a bar appears at the first call and goes when all is done.

    The next call after that begins another bar: features first, then laws.
    """
    columns = (BarColumn(), TextColumn("{task.completed:,.0f} tokens"), TimeRemainingColumn())
    bar: Progress | None = None
    task = TaskID(0)

    def update(done: int, whole: int) -> None:
        nonlocal bar, task
        if bar is None:
            bar = Progress(*columns, console=console, transient=True)
            task = bar.add_task("", total=whole)
            bar.start()
        bar.update(task, completed=done)
        if done >= whole:
            bar.stop()
            bar = None

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()
