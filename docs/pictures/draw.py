"""Draw the pictures of the documentation from the code they explain: ``python docs/pictures/draw.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

from falcon_hf import TreeShape
from falcon_hf.bench.plots import acceptance_by_depth, round_time, speed_against_length, speed_by_task
from falcon_hf.bench.report import names
from falcon_hf.bench.result_file import read_result
from falcon_hf.runtime.modeling_falcon_drafter import relaxed_causal_mask
from falcon_hf.tuning.check_file import read_check
from falcon_hf.tuning.pictures import draw_sweep

HERE = Path(__file__).parent
MEASUREMENTS = HERE.parent / "measurements"
DRAFTER = HERE.parents[1] / "hub_cards" / "falcon-smollm2-135m-instruct"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
SEEN, UNSEEN = "#0072B2", "#eeeeee"
# The same bytes from the same data.
rcParams["svg.hashsalt"] = "falcon_hf"
rcParams["svg.fonttype"] = "none"


def save(figure: Figure, name: str) -> None:
    """Write ``name``.svg and say so."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


def grid(axes: Any, visible: torch.Tensor, title: str, rows: list[str], columns: list[str]) -> None:
    """A mask as squares; rows are queries."""
    for row in range(visible.shape[0]):
        for column in range(visible.shape[1]):
            colour = SEEN if visible[row, column] else UNSEEN
            axes.fill(
                [column, column + 1, column + 1, column], [row, row, row + 1, row + 1], colour, ec="white", lw=1.5
            )
    axes.set_xlim(0, visible.shape[1])
    axes.set_ylim(visible.shape[0], 0)
    axes.set_aspect("equal")
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns, fontsize=8)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, pad=10)


def masks() -> None:
    """The drafter's masks: causal (k = 1) beside relaxed causal for k = 2 and 3."""
    figure = Figure(figsize=(9, 4.0), layout="constrained")
    for axes, k in zip(figure.subplots(1, 3), (1, 2, 3), strict=True):
        names = [str(position) for position in range(6)]
        title = "k = 1: causal" if k == 1 else f"k = {k}: relaxed causal"
        grid(axes, relaxed_causal_mask(6, k, torch.zeros(1, dtype=torch.long))[0, 0], title, names, names)
    figure.supxlabel("columns: keys j; rows: queries i; blue: i sees j", fontsize=9)
    save(figure, "masks")


def place(shape: TreeShape) -> dict[tuple[int, ...], float]:
    """A y for each path: leaves one below the other, a parent at the middle of its children."""
    y: dict[tuple[int, ...], float] = {}
    count = 0

    def visit(path: tuple[int, ...]) -> float:
        nonlocal count
        children = [kept for kept in shape.paths if len(kept) == len(path) + 1 and kept[:-1] == path]
        if children:
            places = [visit(child) for child in children]
            y[path] = (places[0] + places[-1]) / 2
        else:
            y[path] = float(count)
            count += 1
        return y[path]

    visit(())
    return y


def tree(axes: Any, shape: TreeShape, block_size: int, title: str, labels: bool) -> None:
    """Nodes by depth, coloured by the drafter pass that fills them."""
    y = place(shape)
    for path in shape.paths:
        axes.plot([len(path) - 1, len(path)], [y[path[:-1]], y[path]], color="#bbbbbb", lw=0.8, zorder=1)
    size = 260 if labels else 16
    axes.scatter(0, y[()], s=size, color="#444444", zorder=2)
    for path in shape.paths:
        colour = COLOURS[(len(path) - 1) // block_size % len(COLOURS)]
        axes.scatter(len(path), y[path], s=size, color=colour, zorder=2)
        if labels:
            axes.text(len(path), y[path], str(path[-1]), color="white", ha="center", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(-0.15, shape.depth + 0.15)
    axes.set_xticks(range(shape.depth + 1), ["root", *map(str, range(1, shape.depth + 1))])
    axes.set_xlabel("depth; a colour is a pass of the drafter", fontsize=9)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_title(title, fontsize=10)


def trees() -> None:
    """A tree of the shipped drafter's size, one that may be grown, and the paper's for the same block size."""
    config = json.loads((DRAFTER / "config.json").read_text(encoding="utf-8"))
    k = config["block_size"]
    grown = [[0], [1], [0, 0], [2], [0, 1]]
    assert len(grown) == config["tree"]["dear_rows"]["nodes"], "draw as many nodes as the shipped drafter grows"
    own = TreeShape.from_paths(grown)
    paper = TreeShape.paper(k)
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.8))
    tree(
        left,
        own,
        k,
        f"The shipped drafter, CPU in float32: {len(grown)} nodes,\nsuch as these; numbers are ranks in its law",
        labels=True,
    )
    tree(right, paper, k, f"The paper's kind for k = {k}: {paper.size - 1} nodes", labels=False)
    save(figure, "trees")


def verification() -> None:
    """The target's mask over a small tree behind a text of four tokens."""
    shape = TreeShape.from_paths([[0], [1], [0, 0], [0, 1], [1, 0]])
    nodes = ["root", *("".join(map(str, path)) for path in shape.paths)]
    text = [f"t{position}" for position in range(4)]
    ancestors = shape.ancestors()
    visible = torch.cat((torch.ones(len(nodes), len(text), dtype=torch.bool), ancestors), dim=1)
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    tree(left, shape, 2, "A tree of five candidates", labels=True)
    grid(right, visible, "What each node sees in the one forward that verifies it", nodes, text + nodes)
    save(figure, "verification")


def sweep() -> None:
    """Measured speed over plain decoding of the best tree for each k, m and N."""
    measured = read_check(MEASUREMENTS / "sweep-float32.json")
    cells = [entry for entry in measured["settings"] if entry["kind"] == "tuned"]
    figure = draw_sweep({**measured, "settings": cells})
    save(figure, "sweep")


def training() -> None:
    """Held-out accuracy of the shipped drafter's runs, from the curves in its recipe."""
    recipe = json.loads((DRAFTER / "recipe.json").read_text(encoding="utf-8"))
    runs: list[dict[str, Any]] = []
    while recipe is not None:
        runs.insert(0, recipe)
        recipe = recipe.get("started_from")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    before = 0.0
    for index, run in enumerate(runs):
        seen, steps = run["run"]["positions_seen"] / 1e6, run["run"]["steps"]
        points = {entry["step"]: entry for entry in run["curve"] if "eval_pass1_position1_top1" in entry}
        x = [before + seen * step / steps for step in points]
        first = [100 * entry["eval_pass1_position1_top1"] for entry in points.values()]
        second = [
            100 * entry.get("eval_corrected_position2_top1", entry["eval_pass1_position2_top1"])
            for entry in points.values()
        ]
        colour, tokens = COLOURS[index], run["data"]["learned_tokens"] / 1000
        axes.plot(x, first, "o-", color=colour, ms=4, label=f"run {index + 1}: text of {tokens:,.0f},000 answer tokens")
        axes.plot(x, second, "s--", color=colour, ms=4)
        if index:
            axes.axvline(before, color="#bbbbbb", lw=0.8)
        before += seen
    axes.set_xlabel("positions seen, all runs together, millions", fontsize=9)
    axes.set_ylabel("right on held-out text, %", fontsize=9)
    axes.set_title("Circles: position 1; squares: position 2, corrected from run 2 on", fontsize=10)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    save(figure, "training")


def results() -> None:
    """The shipped drafter's greedy runs in bfloat16: all sets together, and MT-Bench from every side."""
    sets = {"MT-Bench": "mt-bench", "GSM8K": "gsm8k", "HumanEval": "humaneval", "out of domain": "out-of-domain"}
    read = {title: read_result(DRAFTER / "benchmarks" / f"{name}-bfloat16-greedy.json") for title, name in sets.items()}
    figure = speed_by_set(read)
    save(figure, "speed_by_set")
    result = read["MT-Bench"]
    (name,) = names([result])
    figure = speed_by_task(result, name)
    save(figure, "speed_by_task")
    figure = acceptance_by_depth(result, name)
    save(figure, "acceptance_by_depth")
    figure = round_time(result, name)
    save(figure, "round_time")
    figure = speed_against_length(result, name)
    save(figure, "speed_against_length")


def speed_by_set(results: dict[str, dict[str, Any]]) -> Figure:
    """Bars of the median speed over plain decoding with quartiles: a group a set of questions, a colour a method."""
    methods = {"plain_compiled": "plain, compiled", "falcon": "Falcon", "falcon_compiled": "Falcon, compiled"}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for index, (label, title) in enumerate(methods.items()):
        speeds = [result["summary"][label]["speed_ratio"] for result in results.values()]
        medians = [speed["median"] for speed in speeds]
        below = [speed["median"] - speed["lower_quartile"] for speed in speeds]
        above = [speed["upper_quartile"] - speed["median"] for speed in speeds]
        x = [place + 0.28 * (index - 1) for place in range(len(speeds))]
        axes.bar(
            x, medians, 0.26, color=COLOURS[index], label=title, yerr=[below, above],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#444444"},
        )  # fmt: skip
        for place, median in zip(x, medians, strict=True):
            axes.text(place, 0.08, f"{median:.2f}x", ha="center", fontsize=8, color="white", weight="bold")
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    counts = [result["settings"]["questions"]["count"] for result in results.values()]
    ticks = [f"{title}\n{count} questions" for title, count in zip(results, counts, strict=True)]
    axes.set_xticks(range(len(results)), ticks, fontsize=9)
    axes.set_ylabel("speed over plain generate()", fontsize=9)
    axes.set_title("Greedy, bfloat16, two CPU cores with AMX: median and quartiles over questions", fontsize=10)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
    return figure


def draw_all() -> None:
    """Every picture."""
    masks()
    trees()
    verification()
    sweep()
    training()
    results()


if __name__ == "__main__":
    draw_all()
