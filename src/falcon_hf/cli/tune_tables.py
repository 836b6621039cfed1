"""Tables of ``falcon-hf tune``: predictions, and predictions beside measurements."""

from __future__ import annotations

from typing import Any

import typer
from rich.table import Table

from ..tuning.choice import Prediction
from .console import stdout

_ROWS = 8


def choice_table(found: list[Prediction]) -> None:
    """The best predictions, the best of each number of passes and drafter, and paper's, chain's and plain's."""
    drafters = list(dict.fromkeys(prediction.drafter for prediction in found if prediction.shape is not None))
    rows: list[list[str]] = []
    shown: list[Prediction] = []
    seen: set[tuple[str, str, int]] = set()
    for index, prediction in enumerate(found):
        cell = (prediction.drafter, prediction.kind, prediction.passes)
        if index < _ROWS // 2 or cell not in seen:
            shown.append(prediction)
        seen.add(cell)
    for prediction in shown:
        name = prediction.kind
        if len(drafters) > 1 and prediction.shape is not None:
            name = f"{name} ({prediction.drafter})"
        rows.append([name, *_setting(prediction_values(prediction)), *_figures(prediction_values(prediction))])
    columns = ["tree", "k", "m", "n", "N", "E", "ms a round", "tokens/s", "speedup"]
    show_table("Predicted, prefill left out", columns, rows)
    stdout.print(
        "k: block size, m: drafter passes, n: most blocks in a pass, N: nodes with the root, E: tokens a round.",
        soft_wrap=True,
    )


def check_table(result: dict[str, Any]) -> None:
    """Predictions beside measurements, and what to conclude."""
    columns = ["tree", "k", "m", "n", "N", "E pred.", "E meas.", "ms pred.", "ms meas.", "tok/s pred.", "tok/s meas."]
    rows: list[list[str]] = []
    for entry in result["settings"]:
        predicted, measured = entry["predicted"], entry["measured"]
        cells = [entry["kind"], *_setting(entry)]
        for name, factor, digits in (
            ("tokens_per_round", 1, 2),
            ("round_seconds", 1000, 1),
            ("tokens_per_second", 1, 1),
        ):
            cells += [f"{factor * own[name]:.{digits}f}" for own in (predicted, measured)]
        speedups = [f"{own['speedup']:.2f}x" for own in (predicted, measured)]
        rows.append([*cells, _share(entry["error"]), *speedups, _share(entry["speedup_error"])])
    columns += ["error", "speedup pred.", "speedup meas.", "error"]
    show_table("Predicted against measured, prefill left out", columns, rows)
    summary, plain = result["summary"], result["plain"]
    static = [entry for entry in result["settings"] if entry["error"] is not None]
    stdout.print(
        f"Error of predicted tokens/s: median {_share(summary['median_error'])}, largest "
        f"{_share(summary['largest_error'])}; of predicted speedups: median {_share(summary['median_speedup_error'])}, "
        f"largest {_share(summary['largest_speedup_error'])}; over {len(static)} settings and {summary['calls']} calls "
        f"each. Plain decoding: {plain['predicted']['tokens_per_second']:.1f} tokens/s when calibrated, "
        f"{plain['measured']['tokens_per_second']:.1f} now.",
        soft_wrap=True,
    )
    for task, best in [("all", summary["best"]), *summary["best_by_task"].items()]:
        stdout.print(
            f"Fastest on {task or 'the prompts'}: {best['kind']}, k = {best['block_size']}, m = {best['passes']}, "
            f"N = {best['nodes']} ({best['speedup']:.2f}x); the predicted best is "
            f"{best['chosen_falls_short_by']:.1%} slower.",
            soft_wrap=True,
        )


def prediction_values(prediction: Prediction) -> dict[str, Any]:
    """JSON values of a prediction."""
    values = {
        name: getattr(prediction, name) for name in prediction.__dataclass_fields__ if name not in ("shape", "dynamic")
    }
    return values | {"tree": prediction.tree}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A drawn table on a terminal; elsewhere Markdown, which no width cuts."""
    if not stdout.is_terminal:
        lines = [title, "", columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        typer.echo("\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines) + "\n")
        return
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    stdout.print(table)


def _setting(values: dict[str, Any]) -> list[str]:
    return [str(values[name]) for name in ("block_size", "passes", "width", "nodes")]


def _figures(values: dict[str, Any]) -> list[str]:
    return [
        f"{values['tokens']:.2f}",
        f"{1000 * values['round_seconds']:.1f}",
        f"{values['tokens_per_second']:.1f}",
        f"{values['speedup']:.2f}x",
    ]
