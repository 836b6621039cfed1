"""``falcon-hf bench``: speed and agreement of decoding methods, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown

from ..bench.draft_trees import read_tree
from ..bench.errors import BenchError
from ..bench.methods import METHODS, MethodContext, MethodSpec, build_method, parse_methods
from ..bench.question_sets import NAMES, find_questions
from ..bench.report import render
from ..bench.result_file import read_result
from ..bench.runs import RunPlan, run
from ..bench.tables import unfolded
from ..drafter_loading import DrafterError, drafter_folder
from .console import (
    AUTO,
    DTYPE_HELP,
    fail,
    parse_device,
    parse_dtype,
    parse_named_values,
    parse_numbers,
    print_json,
    quiet,
    set_attention,
    set_threads,
    stderr,
    stdout,
)
from .loading import DEMO, find_demo_drafter, load_target

_METHOD_HELP = "; ".join(
    name + (f" ({', '.join(f'{key}: {what}' for key, what in method.settings.items())})" if method.settings else "")
    for name, method in sorted(METHODS.items())
)


def bench(
    questions: Annotated[
        str,
        typer.Option(
            help="Question file in Spec-Bench format (jsonl), a file of a Hub dataset (org/dataset:file.jsonl), or one "
            f"of {', '.join(NAMES)}."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Result file (JSON). If it holds part of this run, the run goes on.")],
    target: Annotated[str, typer.Option(help="Hub repo or folder of the target, or 'demo'.")] = DEMO,
    drafter: Annotated[
        str | None, typer.Option(help="Folder or Hub repo of the drafter; the demo's drafter for 'demo'.")
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(
            help="Tree instead of the drafter's: JSON with paths, [[0], [1], [0, 0]], or a dynamic tree; or Python "
            "with a list of Medusa, EAGLE or upstream Falcon, choices.py#NAME."
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated, each NAME or NAME:SETTING=VALUE:..., LABEL= before it names it in the result. "
            f"Names: {_METHOD_HELP}."
        ),
    ] = "plain,falcon",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = AUTO,
    attention: Annotated[str | None, typer.Option(help="sdpa or eager; the target's own by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; CUDA if there is one by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own by default.")] = None,
    num_questions: Annotated[
        int | None, typer.Option(help="So many, spread evenly over the set's categories; all by default.")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Turns of a question at most; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a call.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a question.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Top-k sampling.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="As in generate().")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="As in generate().")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Any other option of generate(), NAME=JSON; may be given repeatedly.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated; more than one needs a temperature.")] = "0",
    repeats: Annotated[int, typer.Option(min=1, help="Times the whole set is run.")] = 1,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed short calls a method before the run.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print settings and summary as JSON instead of tables.")
    ] = False,
) -> None:
    """Compare decoding methods with plain generate(), interleaved, question by question.

    Asks through the tokenizer's chat template. A later turn stands behind plain's own answers, the same for all
    methods. The result file is written after each question; the same command goes on with a run that was cut off.

    Example: falcon-hf bench --questions mt_bench.jsonl --output mt_bench.json --methods plain,falcon --threads 2
    """
    try:
        specs = parse_methods(methods)
        plan = RunPlan(
            find_questions(questions).some(num_questions),
            _options(
                option, temperature, max_new_tokens=max_new_tokens, top_p=top_p, top_k=top_k,
                repetition_penalty=repetition_penalty, no_repeat_ngram_size=no_repeat_ngram_size,
            ),
            parse_numbers(seeds, "--seeds"),
            repeats,
            warmup,
            turns,
            batch_size,
        )  # fmt: skip
        paths = None if tree is None else read_tree(tree)
        # A file that is something else is refused before the target is loaded.
        stored = read_result(output) if output.exists() else None
        where = parse_device(device)
        parsed = parse_dtype(dtype, where)
        source = _drafter(drafter, target, specs)
        if paths is not None and not any(spec.method.takes("tree") and "tree" not in spec.settings for spec in specs):
            raise BenchError("--tree: no method of --methods would take it.")
        set_threads(threads)
        with quiet():
            model, tokenizer = load_target(target, parsed, where)
            set_attention(model, attention)
            context = MethodContext(model, source, paths, batch_size)
            built = [build_method(spec, context) for spec in specs]
            result = run(model, tokenizer, built, plan, output, show_progress=not as_json)
    except (BenchError, DrafterError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stderr.print(f"Stopped. What was done is in {output}; the same command goes on.", soft_wrap=True)
        raise typer.Exit(130) from None
    if stored is not None and stored["complete"]:
        stderr.print(f"{output} was complete already: nothing was measured.", soft_wrap=True)
    if as_json:
        shown = {key: value for key, value in result.items() if key != "runs"}
        print_json({"output": str(output), **shown})
    elif stdout.is_terminal:
        stdout.print(Markdown(unfolded(render([result]))))
    else:
        typer.echo(render([result]), nl=False)  # drawn tables would be cut to a terminal's width


def _drafter(given: str | None, target: str, specs: list[MethodSpec]) -> str | None:
    """The drafter for methods that name none themselves, known to be there; None if no method needs it."""
    if not any(spec.method.needs_drafter and "drafter" not in spec.settings for spec in specs):
        if given is not None:
            raise BenchError(f"--drafter {given}: no method of --methods would take it.")
        return None
    if given is None and target == DEMO:
        given = find_demo_drafter()
    if given is None:
        raise BenchError("Name the target's drafter: --drafter FOLDER_OR_REPO.")
    drafter_folder(given)
    return given


def _options(extra: list[str] | None, temperature: float, **given: Any) -> dict[str, Any]:
    """Options of ``generate()``: those given, and ``NAME=JSON`` ones; sampling if the temperature is above 0."""
    options = {name: value for name, value in given.items() if value is not None}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature}
    elif "top_p" in options or "top_k" in options:
        raise BenchError("--top-p and --top-k need a --temperature above 0; greedy decoding ignores them.")
    return options | parse_named_values(extra or [], "--option")
