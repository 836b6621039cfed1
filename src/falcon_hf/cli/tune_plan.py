"""``falcon-hf tune --simulate``: plans for targets and GPUs that are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..bench.provenance import machine, versions
from ..tuning.calibration import write_json
from ..tuning.choice import Prediction
from ..tuning.cost_curves import measure_curves
from ..tuning.errors import TuningError
from ..tuning.plan import BLOCK_SIZES, PROFILES, best_by_block_size, limit_curve, options_for
from ..tuning.roofline import SHAPES, gpu_named, shape_named
from .console import print_json, quiet
from .tune_tables import prediction_values, show_table


def simulate(
    shape: str, gpu: str, gpus: int, acceptance: str, mode: str, context: int, passes: int, nodes: int,
    output: Path | None, pictures: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the best setting for each target and k, and the speedup as acceptance falls; write JSON and plots.

    With ``all`` shapes, one that does not fit the GPUs given gets as many as it needs.

    Raises:
        TuningError: on an unknown name, or a target that does not fit.
    """
    card = gpu_named(gpu)
    shapes = list(SHAPES.values()) if shape == "all" else [shape_named(shape)]
    plans: list[dict[str, Any]] = []
    for own in shapes:
        count = gpus
        while shape == "all" and own.read_weights * 2 > card.memory * count:
            count *= 2
        options = options_for(acceptance, own, card, count, context, mode, passes)
        best = best_by_block_size(options, passes, nodes)
        limit = (
            limit_curve(PROFILES[acceptance], own, card, count, context, mode, passes, nodes)
            if acceptance in PROFILES
            else []
        )
        plans.append({"shape": own.name, "gpus": count, "best": best, "limit": limit})
    values = {
        "format": "falcon-hf-plan/1",
        "gpu": card.name,
        "acceptance": acceptance,
        "mode": mode,
        "context": context,
        "plans": [
            {
                "shape": plan["shape"],
                "gpus": plan["gpus"],
                "by_block_size": [prediction_values(one) for one in plan["best"]],
                "limit": [{"top1": top1, **prediction_values(one)} for top1, one in plan["limit"]],
            }
            for plan in plans
        ],
    }
    if output is not None:
        write_json(output, values)
    if pictures is not None:
        _draw(pictures, plans)
    if as_json:
        print_json(values)
        return
    title = f"Simulated: {card.name}, {mode}, {context} tokens of context, acceptance {acceptance}"
    _best_table(plans, title, nodes)
    if plans[0]["limit"]:
        _limit_table(plans)


def curves(
    shape: str, device: torch.device, dtype: torch.dtype, contexts: tuple[int, ...], passes: int, repeats: int,
    output: Path | None,
) -> None:  # fmt: skip
    """Measure cost curves of one shape on this device with random weights, and keep them with the device's name.

    Raises:
        TuningError: without a file to keep them in, or one shape.
    """
    if output is None or shape == "all":
        raise TuningError("Name one shape and a file to keep: --cost-curves --shape 1B --output FILE.")
    with quiet():
        found = measure_curves(shape_named(shape), BLOCK_SIZES, device, dtype, contexts, passes, repeats)
    write_json(output, found | {"machine": machine(device), "versions": versions()})
    rows = [
        [str(time["context"]), str(time["nodes"]), f"{1000 * time['seconds']:.2f}"] for time in found["verify_times"]
    ]
    show_table(f"Verification, {shape}", ["context", "nodes", "ms"], rows)
    rows = [
        [k, str(time["passes"]), str(time["width"]), f"{1000 * time['seconds']:.2f}"]
        for k, one in found["drafts_by_block_size"].items()
        for time in one["times"]
    ]
    show_table(f"Drafts; plain decoding {1000 * found['plain_seconds']:.2f} ms a token", ["k", "m", "n", "ms"], rows)


def _best_table(plans: list[dict[str, Any]], title: str, most_nodes: int) -> None:
    """Of every target and drafter the fastest setting; a profile's drafters have no names but their k."""
    columns = ["target", "GPUs", "drafter", *"kmnNE", "plain ms", "ms a round", "tokens/s", "speedup", ""]
    rows = []
    for plan in plans:
        fastest = max(plan["best"], key=lambda one: one.tokens_per_second)
        for one in plan["best"]:
            plain = 1000 * one.speedup / one.tokens_per_second
            cells = [one.block_size, one.passes, one.width, one.nodes, f"{one.tokens:.2f}", f"{plain:.2f}"]
            cells += [f"{1000 * one.round_seconds:.2f}", f"{one.tokens_per_second:.1f}", f"{one.speedup:.2f}x"]
            remark = "best" if one is fastest else ""
            # More nodes than were asked about might be faster still.
            remark += f"{' ' if remark else ''}(N at its limit)" if one.nodes >= most_nodes else ""
            rows.append([plan["shape"], str(plan["gpus"]), Path(one.drafter).name, *map(str, cells), remark])
    show_table(title, columns, rows)


def _limit_table(plans: list[dict[str, Any]]) -> None:
    rows = [
        [f"{row[0][0]:.2f}", *(_cell(one) for _, one in row)]
        for row in zip(*(plan["limit"] for plan in plans), strict=True)
    ]
    columns = ["top-1", *(plan["shape"] for plan in plans)]
    show_table("Best speedup as acceptance falls (and its k, m, N)", columns, rows)


def _cell(one: Prediction) -> str:
    if one.shape is None:
        return "1.00x (plain)"
    return f"{one.speedup:.2f}x ({one.block_size}, {one.passes}, {one.nodes})"


def _draw(folder: Path, plans: list[dict[str, Any]]) -> None:
    from ..tuning.pictures import draw_lines, save

    if plans[0]["limit"]:
        lines = {plan["shape"]: [(top1, one.speedup) for top1, one in plan["limit"]] for plan in plans}
        label = "chance that the likeliest first token is right"
        save(draw_lines(lines, label, "best speedup", "Limit as acceptance falls"), folder / "limit")
    by_size = {plan["shape"]: [(one.block_size, one.speedup) for one in plan["best"]] for plan in plans}
    save(draw_lines(by_size, "block size k", "best speedup", "Best block size"), folder / "block_size")
    largest = max(len(plan["best"]) for plan in plans)
    scaling = {
        f"k = {plans[0]['best'][index].block_size}": [
            (SHAPES[plan["shape"]].read_weights / 1e9, plan["best"][index].speedup) for plan in plans
        ]
        for index in range(largest)
    }
    save(draw_lines(scaling, "weights read, 1e9", "best speedup", "Scaling with the target"), folder / "scaling")
