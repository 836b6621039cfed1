"""``falcon-hf tune``: measure a drafter on its target, and find the tree that makes it fastest."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.errors import BenchError
from ..bench.provenance import describe_target, machine, versions
from ..bench.question_sets import NAMES
from ..bench.result_file import first_setting_that_differs
from ..drafter_loading import DrafterError, drafter_folder, weights_sha256
from ..runtime.half_precision import has_dear_rows
from ..tuning.calibrate import CalibrationPlan, NamedDrafter, calibrate
from ..tuning.calibration import Calibration
from ..tuning.choice import Prediction, choose, fitting
from ..tuning.errors import TuningError
from ..tuning.pictures import draw_sweep, draw_tree, need_matplotlib, save
from .console import (
    AUTO,
    DTYPE_HELP,
    fail,
    parse_device,
    parse_dtype,
    parse_numbers,
    print_json,
    quiet,
    refuse_options,
    set_attention,
    set_threads,
    stderr,
)
from .loading import DEMO, find_demo_drafter, load_drafter, load_target
from .prompts import read_prompts
from .tree_receiver import TreeReceiver
from .tune_check import check_settings, run_check
from .tune_plan import curves, simulate
from .tune_tables import check_table, choice_table, prediction_values

_CHECKS = {"sweep", "settings", "check_prompts", "check_repeats", "dynamic"}
# What must be equal for a stored calibration to be used again; of the prompts, not the name of their file.
_SAME = ("target", "machine", "versions", "prompts", "plan")

# Options of --simulate and of --cost-curves, and what else these two read.
_PLANNED = {"shape", "gpu", "gpus", "acceptance", "mode", "context"}
_SIMULATE = _PLANNED | {"simulated", "max_passes", "max_nodes", "output", "pictures", "as_json"}
_CURVES = {"cost_curves", "shape", "device", "dtype", "threads", "contexts", "max_passes", "repeats", "output"}


def tune(
    command: typer.Context,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts: Spec-Bench questions (jsonl), jsonl with a 'prompt', .txt lines, a file of a Hub dataset "
            f"(org/dataset:file.jsonl), or one of {', '.join(NAMES)}."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Calibration file (JSON). If it is there and fits, it is used as it is.")
    ] = None,
    target: Annotated[str, typer.Option(help="Hub repo or folder of the target, or 'demo'.")] = DEMO,
    drafter: Annotated[
        list[str] | None, typer.Option(help="Folder or Hub repo; give several to choose k among them.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="So many, of questions spread evenly over the categories; all by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a prompt.")] = 96,
    max_passes: Annotated[int, typer.Option(min=1, help="m: drafter passes a round, at most.")] = 4,
    max_nodes: Annotated[int, typer.Option(min=2, help="N: nodes of a tree, the root included, at most.")] = 64,
    contexts: Annotated[str, typer.Option(help="Context lengths at which verification is timed.")] = "64,256",
    repeats: Annotated[int, typer.Option(min=1, help="Of each timed call.")] = 9,
    apply: Annotated[
        Path | None,
        typer.Option(
            help="Write the best tree of the --drafter in this folder into its config: as a dynamic one, with look-up."
        ),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="--apply writes the static tree, without look-up.")] = False,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside",
            help="--apply keeps the drafter's dynamic tree for machines of the other kind: a GPU, or a CPU in bfloat16 "
            "that multiplies it fast, against a CPU otherwise.",
        ),
    ] = False,
    check: Annotated[
        Path | None, typer.Option(help="Measure settings beside plain generate() and store them with predictions.")
    ] = None,
    check_prompts: Annotated[
        str | None, typer.Option(help="Prompts for --check, as --prompts, which they are by default.")
    ] = None,
    check_repeats: Annotated[int, typer.Option(min=1, help="Times --check asks each prompt.")] = 1,
    settings: Annotated[int, typer.Option(min=1, help="How many settings --check measures.")] = 12,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="--check measures the best tree for every k, m and N instead.")
    ] = False,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic", help="--check measures each tree as a dynamic one too; --apply writes what was fastest."
        ),
    ] = False,
    pictures: Annotated[Path | None, typer.Option(help="Folder for pictures: the best tree, the sweep, plans.")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = AUTO,
    attention: Annotated[str | None, typer.Option(help="sdpa or eager; the target's own by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; CUDA if there is one by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own by default.")] = None,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="Measure nothing: plan for a target's shape and a GPU by a roofline.")
    ] = False,
    cost_curves: Annotated[
        bool,
        typer.Option("--cost-curves", help="Time a target of --shape with random weights on --device; no download."),
    ] = False,
    shape: Annotated[str, typer.Option(help="--simulate: 1B, 7B, 8B, 13B, 70B, or all.")] = "all",
    gpu: Annotated[str, typer.Option(help="--simulate: a100-80gb, h100-sxm, ...; see docs/tuning.md.")] = "a100-80gb",
    gpus: Annotated[int, typer.Option(min=1, help="--simulate: GPUs that share the target.")] = 1,
    acceptance: Annotated[
        str, typer.Option(help="--simulate: a named profile, or a calibration file.")
    ] = "paper-vicuna-7b",
    mode: Annotated[str, typer.Option(help="--simulate: graph (compiled) or eager.")] = "graph",
    context: Annotated[int, typer.Option(min=1, help="--simulate: tokens in the cache.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Find the draft tree that is fastest with a drafter, a target and this machine.

    Measures how often the drafter is right and what each step costs, predicts tokens per second for some hundred
    trees, and shows the best. Several drafters, of other block sizes, are compared. docs/tuning.md explains it.

    Example: falcon-hf tune --drafter my-drafter --prompts everyday --output tune.json --apply my-drafter
    """
    _refuse_ignored(command, simulated, cost_curves, check is not None, sweep, apply is not None)
    if static and dynamic:
        fail("--static and --dynamic rule each other out.")
    if static and beside:
        fail("--static writes a tree for all machines: there is none beside it.")
    try:
        if pictures is not None:
            need_matplotlib()  # before anything is measured for them
        if simulated:
            simulate(shape, gpu, gpus, acceptance, mode, context, max_passes, max_nodes, output, pictures, as_json)
            return
        if cost_curves:
            where = parse_device(device)
            set_threads(threads)
            curves(
                shape,
                where,
                parse_dtype(dtype, where),
                tuple(parse_numbers(contexts, "--contexts")),
                max_passes,
                repeats,
                output,
            )
            return
        if prompts is None or output is None:
            raise TuningError("Name prompts to measure on and a file to keep: --prompts FILE --output FILE.")
        plan = CalibrationPlan(
            max_new_tokens,
            max_passes,
            max_nodes,
            contexts=tuple(parse_numbers(contexts, "--contexts")),
            repeats=repeats,
        )
        where = parse_device(device)
        parsed = parse_dtype(dtype, where)
        sources = drafter or ([find_demo_drafter()] if target == DEMO else [])
        if not sources:
            raise TuningError("Name the target's drafter: --drafter FOLDER_OR_REPO.")
        receiver = None if apply is None else TreeReceiver(apply, sources, beside)
        set_threads(threads)
        with quiet():
            model, tokenizer = load_target(target, parsed, where)
            set_attention(model, attention)
            asked = read_prompts(prompts, tokenizer, num_prompts)
            wanted = asked if check_prompts is None else read_prompts(check_prompts, tokenizer, num_prompts)
            drafters = [_drafter(source, model) for source in sources]
            if receiver is not None and dynamic:
                receiver.refuse_rejection(drafters)
            provenance = {
                "versions": versions(),
                "machine": machine(model.device),
                "target": describe_target(model),
                "prompts": {"file": asked.name, "sha256": asked.sha256, "count": len(asked.prompts)},
                "plan": {name: getattr(plan, name) for name in plan.__dataclass_fields__},
            }
            calibration = _stored(output, provenance, drafters)
            if calibration is None:
                calibration = calibrate(model, drafters, asked.prompts, plan, provenance, _progress(not as_json))
                calibration.write(output)
            found = choose(calibration.options(), max_passes, max_nodes)
            ranked = fitting(found, max_nodes)
            best = ranked[0]
            dear = has_dear_rows(model.device, model.dtype)
            if receiver is not None and not dynamic:
                own = next(one for one in ranked if one.drafter == receiver.name)
                # A dynamic tree of the same size and look-up were faster on all sets of docs/comparison.md, on one CPU.
                # --dynamic --check measures both where it is to be used.
                given = own if static or receiver.draws_siblings(drafters) else calibration.dynamic(own)
                receiver.give(given.tree, given.lookup, dear)
            result = None
            if check is not None:
                chosen = check_settings(calibration, best, plan, None if sweep else settings, dynamic)
                if receiver is not None and dynamic:
                    receiver.require_one_of(chosen)
                result = run_check(
                    check, output, calibration, model, drafters, wanted, chosen, max_new_tokens, check_repeats,
                    _progress(not as_json),
                )  # fmt: skip
                if receiver is not None and dynamic:  # what a dynamic tree is worth is known by now, and only now
                    receiver.give_fastest(result["settings"], dear)
            if pictures is not None:
                _draw(pictures, calibration, best, result if sweep else None)
    except (TuningError, BenchError, DrafterError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stderr.print("Stopped. A finished calibration and a begun --check are kept; the same command goes on.")
        raise typer.Exit(130) from None
    _show(found, result, output, None if receiver is None else receiver.words, as_json)


def _refuse_ignored(
    command: typer.Context, simulated: bool, cost_curves: bool, checks: bool, sweeps: bool, applies: bool
) -> None:
    """End the command if an option was given that what it does would not read."""
    every = {str(parameter.name) for parameter in command.command.params}
    if simulated:
        refuse_options(command, every - _SIMULATE, "not with --simulate, which measures nothing")
    elif cost_curves:
        refuse_options(command, every - _CURVES, "not with --cost-curves, which times random weights alone")
    else:
        refuse_options(command, _PLANNED, "only with --simulate (--shape with --cost-curves too)")
    if not applies:
        refuse_options(command, {"static", "beside"}, "only with --apply")
    if not checks:
        refuse_options(command, _CHECKS, "needs --check FILE")
    elif sweeps:
        refuse_options(command, {"settings"}, "--sweep measures every size")


def _show(
    found: list[Prediction], result: dict[str, Any] | None, output: Path, applied: str | None, as_json: bool
) -> None:
    if as_json:
        values = {"output": str(output), "predictions": [prediction_values(one) for one in found[:20]]}
        print_json(values | ({} if result is None else {"check": result}))
        return
    choice_table(found)
    if result is not None:
        check_table(result)
    if found[0].shape is None:
        stderr.print("No tree is predicted to beat plain decoding: this drafter does not pay here.", soft_wrap=True)
    if applied is not None:
        stderr.print(applied, soft_wrap=True)


def _draw(folder: Path, calibration: Calibration, best: Prediction, sweep: dict[str, Any] | None) -> None:
    assert best.shape is not None
    option = next(option for option in calibration.options() if option.name == best.drafter)
    title = f"N = {best.nodes}, m = {best.passes}, k = {best.block_size}: {best.tokens:.2f} tokens a round"
    save(draw_tree(best.shape, option.model.score, title=title), folder / "tree")
    if sweep is not None:
        for kind in {entry["kind"] for entry in sweep["settings"]} - {"chosen"}:
            own = {**sweep, "settings": [entry for entry in sweep["settings"] if entry["kind"] == kind]}
            save(draw_sweep(own), folder / f"sweep-{kind}")


def _drafter(source: str, target: Any) -> NamedDrafter:
    folder = drafter_folder(source)
    drafter = load_drafter(str(folder), target)
    config = drafter.config
    provenance = {
        "weights_sha256": weights_sha256(folder),
        "block_size": config.block_size,
        "fusion": config.fusion,
        "draft_vocab_size": config.draft_vocab_size,
    }
    return NamedDrafter(source, drafter, provenance)


def _stored(path: Path, provenance: dict[str, Any], drafters: list[NamedDrafter]) -> Calibration | None:
    """The calibration at ``path`` if it is one of these models, prompts and plan on this machine; None without a file.

    Raises:
        TuningError: if the file is something else.
    """
    if not path.exists():
        return None
    calibration = Calibration.read(path)
    now = json.loads(json.dumps(provenance))
    then = {name: copy.copy(calibration.provenance.get(name)) for name in _SAME}
    then["drafters"] = {drafter.name: drafter.provenance for drafter in calibration.drafters}
    now = {name: now[name] for name in _SAME} | {"drafters": {named.name: named.provenance for named in drafters}}
    for settings in (then, now):
        if isinstance(settings["prompts"], dict):
            settings["prompts"].pop("file", None)
    difference = first_setting_that_differs(then, now)
    if difference is not None:
        raise TuningError(f"{path} is of other settings ({difference}); choose another --output, or delete it.")
    stderr.print(f"Using the calibration in {path}.", soft_wrap=True)
    return calibration


def _progress(shown: bool) -> Any:
    """Prints what is being done on standard error, one line each."""
    return (lambda text: stderr.print(f"{text} ...", soft_wrap=True)) if shown else (lambda text: None)
