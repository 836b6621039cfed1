"""Results as pictures: speed by task, acceptance by depth, time of a round, speed against length."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import BenchError
from .methods import BASELINE
from .report import names
from .summary import PHASES, acceptance_by_position, call_key, speed_ratios
from .tables import Result, by_category

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
_WIDTH = 8.0  # inches
_DPI = 150
_LENGTH_BINS = 5
_LONGEST_SLUG = 200  # bytes: file systems take names of 255, and a plot's own part has 24


def write_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw every plot that ``results`` have figures for into ``folder``.

    Returns:
        The files written, ``<run>-<plot>.png``.

    Raises:
        BenchError: if matplotlib is not installed, there is nothing to draw, or ``folder`` cannot be written to.
    """
    try:
        import matplotlib.figure  # noqa: F401 - the first of the plots would find out too late
    except ImportError as error:
        raise BenchError("Plots need the package matplotlib: pip install 'falcon_hf[bench]'.") from error
    drawn = []
    named = names(results)
    for name, slug, result in zip(named, slugs(named), results, strict=True):
        for title, draw in _PLOTS.items():
            figure = draw(result, name)
            if figure is not None:
                path = folder / f"{slug}-{title}.png"
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    figure.savefig(path, dpi=_DPI)
                except OSError as error:
                    raise BenchError(f"The plot {path} cannot be written: {error.strerror}.") from error
                drawn.append(path)
    if not drawn:
        raise BenchError("There is nothing to draw: a plot needs a method beside plain, or one that times its rounds.")
    return drawn


def slugs(names: Sequence[str]) -> list[str]:
    """Runs' names as parts of files': ``mt_bench, float32, greedy`` to ``mt_bench-float32-greedy``.

    Letters of all scripts stay. Long ones are cut, and numbered where two would share a file.
    """
    taken: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.]+", "-", name).strip("-")
        slug = cut = plain.encode()[:_LONGEST_SLUG].decode(errors="ignore")
        for number in itertools.count(2):
            if slug.casefold() not in taken:  # some file systems do not tell capitals apart
                break
            slug = f"{cut}-{number}"
        taken[slug.casefold()] = slug
    return list(taken.values())


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _compared(result: Result) -> list[str]:
    """Methods with a speed ratio, the baseline left out."""
    return [label for label, own in result["summary"].items() if label != BASELINE and own["speed_ratio"] is not None]


def speed_by_task(result: Result, name: str) -> Any:
    """Bars of the median speed ratio with quartiles, one group a category and one for all; None without plain."""
    labels = _compared(result)
    if not labels:
        return None
    groups = {"all": result["summary"], **by_category(result)}
    bar = 0.8 / len(labels)
    figure, axes = _figure(1.4 + 0.28 * len(groups) * (len(labels) + 0.8))
    for index, label in enumerate(labels):
        for place, figures in enumerate(groups.values()):
            if label not in figures:
                continue
            ratio = figures[label]["speed_ratio"]
            median = ratio["median"]
            whiskers = [[median - ratio["lower_quartile"]], [ratio["upper_quartile"] - median]]
            y = place + (index - (len(labels) - 1) / 2) * bar
            axes.barh(
                y, median, bar, color=_COLOURS[index % len(_COLOURS)], label=None if place else label,
                xerr=whiskers, error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#444444"},
            )  # fmt: skip
            axes.text(0.02, y, f"{median:.2f}", va="center", ha="left", fontsize=8, color="white", weight="bold")
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens per second over plain generate()'s: median and quartiles over questions")
    axes.set_title(f"Speed by task\n{name}", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(labels), 3), fontsize=8)
    return figure


def acceptance_by_depth(result: Result, name: str) -> Any:
    """Lines of the share of rounds that accepted a draft at each depth; None if no method knows."""
    lines = {
        label: acceptance_by_position([entry for entry in result["runs"] if entry["method"] == label])
        for label in result["summary"]
    }
    lines = {label: shares for label, shares in lines.items() if shares}
    if not lines:
        return None
    figure, axes = _figure(4.2)
    for index, (label, shares) in enumerate(lines.items()):
        depths = range(1, len(shares) + 1)
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(depths, shares, marker="o", color=colour, label=f"{label} (tau {sum(shares):.2f})")
    deepest = max(map(len, lines.values()))
    axes.set_xticks(range(1, deepest + 1))
    axes.set_xlim(0.7, deepest + 0.3)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#dddddd")
    axes.set_xlabel("depth of the draft in the tree")
    axes.set_ylabel("share of rounds that accepted it")
    axes.set_title(f"Acceptance by depth; the sum over depths is tau\n{name}", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def round_time(result: Result, name: str) -> Any:
    """Stacked bars of the milliseconds of a round's phases; None if no method times them."""
    timed = {label: own["round"]["ms"] for label, own in result["summary"].items() if own["round"] is not None}
    if not timed:
        return None
    figure, axes = _figure(1.9 + 0.5 * len(timed))
    left = [0.0] * len(timed)
    for index, phase in enumerate(PHASES):
        widths = [own[phase] for own in timed.values()]
        axes.barh(range(len(timed)), widths, 0.6, left=left, color=_COLOURS[index], label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (whole, own) in enumerate(zip(left, timed.values(), strict=True)):
        text = f" {whole:.1f} ms, {100 * own['verify'] / whole:.0f}% verifying"
        axes.text(whole, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(timed)), list(timed))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(left))
    axes.set_xlabel("milliseconds a round")
    axes.set_title(f"Where a round's time goes\n{name}", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), fontsize=8)
    return figure


def speed_against_length(result: Result, name: str) -> Any:
    """Points of the speed ratio over the text's length, one a question, with medians of bins; None without plain."""
    labels = _compared(result)
    if not labels:
        return None
    figure, axes = _figure(4.6)
    plain = [entry for entry in result["runs"] if entry["method"] == BASELINE]
    for index, label in enumerate(labels):
        own = [entry for entry in result["runs"] if entry["method"] == label]
        # A question's calls are one point, as they are one ratio.
        lengths: dict[Any, list[int]] = {}
        for entry in own:
            lengths.setdefault(call_key(entry), []).append(entry["prompt_tokens"] + entry["new_tokens"])
        x = [statistics.mean(given) for given in lengths.values()]
        y = speed_ratios(own, plain)
        colour = _COLOURS[index % len(_COLOURS)]
        axes.scatter(x, y, s=14, alpha=0.45, color=colour, linewidths=0)
        axes.plot(*_bin_medians(x, y), marker="s", markersize=5, color=colour, label=label)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of prompt and answer, mean over a question's calls")
    axes.set_ylabel("speed over plain's")
    axes.set_title(f"Speed against length; squares are medians of equal bins\n{name}", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def _bin_medians(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Medians of x and y over bins of equally many points, in the order of x."""
    points = sorted(zip(x, y, strict=True))
    bins = min(_LENGTH_BINS, len(points))
    cuts = [round(index * len(points) / bins) for index in range(bins + 1)]
    groups = [points[start:end] for start, end in itertools.pairwise(cuts)]
    return (
        [statistics.median(point[0] for point in group) for group in groups],
        [statistics.median(point[1] for point in group) for group in groups],
    )


_PLOTS = {
    "speed-by-task": speed_by_task,
    "acceptance-by-depth": acceptance_by_depth,
    "round-time": round_time,
    "speed-against-length": speed_against_length,
}
