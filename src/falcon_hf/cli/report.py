"""``falcon-hf report``: tables, plots and rating sheets from stored results, and a README kept equal to them.

Of ``falcon-hf tune --check`` too, whose file holds predictions beside measurements: its table alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.blind_sheet import write_sheet
from ..bench.errors import BenchError
from ..bench.plots import write_plots
from ..bench.question_sets import find_questions
from ..bench.report import BEGIN, END, render, update_file
from ..bench.result_file import read_result
from ..tuning.check_file import is_check, read_check
from ..tuning.errors import TuningError
from .console import fail, print_json, refuse_options, stderr
from .tune_tables import check_table


def report(
    command: typer.Context,
    results: Annotated[
        list[Path],
        typer.Argument(help="Result files of falcon-hf bench, in the order of the rows; or one of tune --check."),
    ],
    update: Annotated[
        Path | None, typer.Option(help=f"Write the report between {BEGIN} and {END} in this file.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if the --update file differs.")
    ] = False,
    brief: Annotated[bool, typer.Option("--brief", help="One table of speed and agreement.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Draw the results into this folder, as PNG files.")] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="Write a blind side-by-side sheet (HTML) of the texts that differ from plain's, its key beside it; "
            "of one result, with --questions."
        ),
    ] = None,
    questions: Annotated[str | None, typer.Option(help="The result's question set, for --sheet; as in bench.")] = None,
    sheet_seed: Annotated[int, typer.Option(help="Draws the sheet's order and sides.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print settings and summaries as JSON instead of Markdown.")
    ] = False,
) -> None:
    """Turn results of falcon-hf bench into Markdown tables: speed, agreement, time of a round; plots, rating sheets.

    Example: falcon-hf report results/mt_bench.json results/gsm8k.json --update README.md --plots results/plots
    """
    if any(is_check(path) for path in results):
        _report_check(command, results, as_json)
        return
    if sheet is None:
        refuse_options(command, {"questions", "sheet_seed"}, "needs --sheet FILE")
    if as_json and update is None:
        refuse_options(command, {"brief"}, "not with --json, which prints no table")
    try:
        if sheet is not None and (questions is None or len(results) != 1):
            raise BenchError("--sheet takes one result, and --questions with its question set.")
        contents = [read_result(path) for path in results]
        text = render(contents, brief)
        if check and update is None:
            raise BenchError("--check compares with a file: add --update FILE.")
        if check and (plots is not None or sheet is not None):
            raise BenchError("--check writes nothing: leave out --plots and --sheet.")
        differs = update is not None and update_file(update, text, check)
        drawn = [] if plots is None else write_plots(contents, plots)
        key = None
        if sheet is not None and questions is not None:
            key = write_sheet(contents[0], find_questions(questions), sheet, sheet_seed)
    except BenchError as error:
        fail(str(error))
    if as_json:
        print_json({"results": [{key: value for key, value in one.items() if key != "runs"} for one in contents]})
    elif update is None:
        typer.echo(text, nl=False)
    for path in drawn:
        stderr.print(f"{path} drawn.", soft_wrap=True)
    if key is not None:
        stderr.print(f"{sheet} written; its key is {key}.", soft_wrap=True)
    if check and differs:
        stderr.print(f"{update} differs from the results; run the same command without --check.", soft_wrap=True)
        raise typer.Exit(1)
    if update is not None and not check:
        stderr.print(f"{update}: {'updated' if differs else 'already up to date'}.", soft_wrap=True)


def _report_check(command: typer.Context, files: list[Path], as_json: bool) -> None:
    """Print the one check; ends the command where other files or options were given."""
    if len(files) > 1:
        fail("A file of falcon-hf tune --check is reported alone.")
    every = {str(parameter.name) for parameter in command.command.params}
    refuse_options(command, every - {"results", "as_json"}, "not for a file of falcon-hf tune --check")
    try:
        result = read_check(files[0])
    except TuningError as error:
        fail(str(error))
    if as_json:
        print_json({"check": {key: value for key, value in result.items() if key != "turns"}})
    else:
        check_table(result)
