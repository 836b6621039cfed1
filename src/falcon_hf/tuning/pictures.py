"""Pictures with matplotlib: a tree with its acceptance, heat maps of a sweep, the curves of a plan.

Every function returns a matplotlib ``Figure``: a notebook shows it, [`save`] writes it as SVG and PNG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.tree_shape import Path as NodePath
from ..runtime.tree_shape import TreeShape
from .errors import TuningError

# Beyond so many nodes their labels would cover each other.
_MOST_LABELS = 40


def need_matplotlib() -> Any:
    """The class ``Figure``: one that no global state knows, so that drawing needs no display.

    Raises:
        TuningError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TuningError("Pictures need matplotlib: pip install 'falcon_hf[tune]'.") from error
    return Figure


def _figure(width: float, height: float) -> Any:
    return need_matplotlib()(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> list[Path]:
    """Write ``path``.svg and ``path``.png; returns both.

    Raises:
        TuningError: if the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
        for file in written:
            figure.savefig(file, dpi=150)
    except OSError as error:
        raise TuningError(f"The picture {path} cannot be written: {error.strerror}.") from error
    return written


def draw_tree(
    shape: TreeShape,
    acceptance: Callable[[NodePath], float] | Mapping[NodePath, float],
    title: str = "",
    labels: Sequence[str] | None = None,
) -> Any:
    """A tree from top to bottom; colour and number are the chance that a node is accepted.

    Args:
        shape: the tree.
        acceptance: of a node's path, 0 to 1, such as ``AcceptanceModel.score``.
        title: above the tree.
        labels: one a node, the root's first, such as tokens; ranks by default.
    """
    chance = acceptance if callable(acceptance) else acceptance.__getitem__
    nodes: list[NodePath] = [(), *shape.paths]
    place = _places(nodes)
    leaves = max(x for x, _ in place.values()) + 1
    figure = _figure(min(max(6.0, 0.42 * leaves), 30.0), 1.0 + 0.9 * (shape.depth + 1))
    axes = figure.add_subplot()
    for path in nodes[1:]:
        (x0, y0), (x1, y1) = place[path[:-1]], place[path]
        axes.plot([x0, x1], [y0, y1], color="0.7", linewidth=0.4 + 2.5 * chance(path), zorder=1)
    values = [1.0, *(chance(path) for path in shape.paths)]
    points = axes.scatter(
        *zip(*(place[path] for path in nodes), strict=True),
        c=values, vmin=0, vmax=1, cmap="viridis", s=180, zorder=2, edgecolors="white",
    )  # fmt: skip
    texts = labels or ["root", *(str(path[-1]) for path in shape.paths)]
    for path, text, value in zip(nodes, texts, values, strict=True):
        axes.annotate(text, place[path], ha="center", va="center", fontsize=6, color=_ink(value), zorder=3)
        if path and len(nodes) <= _MOST_LABELS:
            below = {"xytext": (0, -13), "textcoords": "offset points"}
            axes.annotate(f"{value:.2f}", place[path], ha="center", fontsize=6, color="0.3", **below)
    figure.colorbar(points, ax=axes, label="chance of acceptance", shrink=0.7)
    axes.set_yticks(range(0, -shape.depth - 1, -1), [str(depth) for depth in range(shape.depth + 1)])
    axes.set_ylabel("depth")
    axes.set_xticks([])
    axes.margins(0.03, 0.1)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    return figure


def _ink(value: float) -> str:
    """What can be read on the colour of a value from 0 to 1."""
    return "black" if value > 0.6 else "white"


def _places(nodes: Sequence[NodePath]) -> dict[NodePath, tuple[float, float]]:
    """Leaves side by side in the order of their ranks, parents above the middle of their children."""
    children: dict[NodePath, list[NodePath]] = {path: [] for path in nodes}
    for path in sorted(nodes):
        if path:
            children[path[:-1]].append(path)
    place: dict[NodePath, tuple[float, float]] = {}
    leaves = 0
    for path in sorted(nodes, key=lambda path: path):
        if not children[path]:
            place[path] = (float(leaves), -float(len(path)))
            leaves += 1
    for path in sorted(nodes, key=len, reverse=True):
        if children[path]:
            own = [place[child][0] for child in children[path]]
            place[path] = ((own[0] + own[-1]) / 2, -float(len(path)))
    return place


def draw_sweep(check: Mapping[str, Any], value: str = "speedup", source: str = "measured") -> Any:
    """Heat maps of a sweep, one a block size k: passes m down, nodes N across.

    Args:
        check: a result of ``check.compare``.
        value: ``speedup``, ``tokens_per_second``, ``tokens_per_round`` or ``round_seconds``.
        source: ``measured`` or ``predicted``.

    Raises:
        TuningError: if the result has no settings.
    """
    cells: dict[tuple[str, int], dict[tuple[int, int], float]] = {}
    for entry in check["settings"]:
        own = cells.setdefault((entry["drafter"], entry["block_size"]), {})
        key = (entry["passes"], entry["nodes"])
        own[key] = max(own.get(key, 0.0), entry[source][value])
    if not cells:
        raise TuningError("The check has no settings to draw.")
    across = min(len(cells), 2)
    down = -(-len(cells) // across)
    figure = _figure(5.0 * across, 3.4 * down)
    everything = [number for own in cells.values() for number in own.values()]
    for index, ((_, k), own) in enumerate(sorted(cells.items(), key=lambda item: item[0][1]), start=1):
        axes = figure.add_subplot(down, across, index)
        passes, nodes = (sorted({key[axis] for key in own}) for axis in (0, 1))
        table = [[own.get((m, size), float("nan")) for size in nodes] for m in passes]
        image = axes.imshow(table, vmin=min(everything), vmax=max(everything), cmap="viridis", aspect="auto")
        for row, line in enumerate(table):
            for column, number in enumerate(line):
                if number == number:
                    axes.text(
                        column,
                        row,
                        f"{number:.2f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=_ink(image.norm(number)),
                    )
        axes.set_xticks(range(len(nodes)), [str(size) for size in nodes])
        axes.set_yticks(range(len(passes)), [str(m) for m in passes])
        axes.set_xlabel("nodes N")
        axes.set_ylabel("passes m")
        axes.set_title(f"k = {k}")
        figure.colorbar(image, ax=axes, label=f"{source} {value.replace('_', ' ')}")
    return figure


def draw_lines(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, title: str = "") -> Any:
    """Lines through (x, y) points, one a name, over a grey line at 1: plain decoding."""
    figure = _figure(6.5, 4.2)
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.axhline(1.0, color="0.6", linewidth=1, linestyle="--")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.legend()
    return figure
