"""``falcon-hf distill``: training data for a drafter, written by the target itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..bench.errors import BenchError
from ..bench.question_sets import find_questions
from ..bench.questions import read_lines
from ..training.distillation import DistillationSettings, distil
from ..training.distillation_folder import asked_turns, need_datasets, save_dataset
from ..training.errors import DistillationError
from .console import (
    AUTO,
    DTYPE_HELP,
    fail,
    parse_device,
    parse_dtype,
    parse_numbers,
    quiet,
    refuse_options,
    set_threads,
    stderr,
    stdout,
)
from .loading import DEMO, load_target


def distill(
    command: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the dataset. If it holds part of this run, the run goes on.")],
    target: Annotated[str, typer.Option(help="Hub repo or folder of the target, or 'demo'.")] = DEMO,
    dialogues: Annotated[int, typer.Option(min=1, help="How many dialogues the folder shall hold.")] = 10_000,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts: jsonl, parquet or Hub dataset (messages, ShareGPT or plain). Else self-made."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column with the prompts.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    stems: Annotated[Path | None, typer.Option(help="Beginnings of self-made turns, one a line.")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Questions that no prompt may share a passage with: a file or a set's name; repeatable."),
    ] = None,
    new_to: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of another distillation, whose user turns are not asked again; repeatable."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the answers; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of sampled answers.")] = 0.95,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are left out.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut.")] = 192,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 64,
    feature_layers: Annotated[
        str | None,
        typer.Option(
            help="Keep features for the trainer, which come for free here: hidden states, as 30 or 10,20,30; the last "
            "one's number is the model's num_hidden_layers."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of self-made turns and sampled answers.")] = 0,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = AUTO,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own by default.")] = None,
) -> None:
    """Write training data for a drafter: prompts, answered by the target, in batches whose rows are replaced.

    The dialogues are appended as they finish, so the same command goes on with a run that was cut off, or makes more
    of them. Next: falcon-hf train --data FOLDER.

    Example: falcon-hf distill --target HuggingFaceTB/SmolLM2-135M-Instruct --dialogues 20000 --output data
    """
    if prompts is None:
        refuse_options(command, {"column", "split"}, "needs --prompts")
    else:
        refuse_options(command, {"stems"}, "begins turns that the target makes itself, so not with --prompts")
    if temperature == 0:
        refuse_options(command, {"top_p"}, "needs a --temperature above 0")
        if prompts is not None:
            why = (
                "draws nothing for greedy answers to --prompts; other prompts than an earlier folder's: --new-to FOLDER"
            )
            refuse_options(command, {"seed"}, why)
    try:
        settings = DistillationSettings(
            dialogues=dialogues,
            prompts=prompts,
            column=column,
            split=split,
            stems=None if stems is None else _stems(stems),
            excluded=[
                turn for file in exclude or [] for question in find_questions(file).questions for turn in question.turns
            ],
            asked=[turn for folder in new_to or [] for turn in asked_turns(folder)],
            temperature=temperature,
            top_p=top_p,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            feature_layers=None if feature_layers is None else parse_numbers(feature_layers, "--feature-layers"),
            seed=seed,
        )
        need_datasets()
        where = parse_device(device)
        parsed = parse_dtype(dtype, where)
        set_threads(threads)
        with quiet():
            model, tokenizer = load_target(target, parsed, where)
            columns = (
                TextColumn("dialogues"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.0f} answer tokens/s"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            with Progress(*columns, console=stderr) as bar:
                task = bar.add_task("", total=dialogues, rate=0.0)
                for state in distil(model, tokenizer, settings, output):
                    rate = state.answer_tokens / max(state.seconds, 1e-9)
                    bar.update(task, completed=state.dialogues, rate=rate)
        count, tokens = save_dataset(output)
    except (DistillationError, BenchError, ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stderr.print(f"Stopped. What was done is in {output}; the same command goes on.", soft_wrap=True)
        raise typer.Exit(130) from None
    stdout.print(f"{count} dialogues with {tokens} answer tokens are in {output}.", soft_wrap=True)


def _stems(path: Path) -> list[str]:
    """The lines of a file of stems, without empty ones."""
    found = [line for line in read_lines(path) if line.strip()]
    if not found:
        raise DistillationError(f"{path} holds no stems.")
    return found
