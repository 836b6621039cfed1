"""``falcon-hf report``: Markdown tables from stored results, and a README kept equal to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.errors import BenchError
from ..bench.report import BEGIN, END, render, update_file
from ..bench.result_file import read_result
from .console import fail, print_json, stderr


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of falcon-hf bench, in the order of the rows.")],
    update: Annotated[
        Path | None, typer.Option(help=f"Write the report between {BEGIN} and {END} in this file.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if the --update file differs.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print settings and summaries as JSON instead of Markdown.")
    ] = False,
) -> None:
    """Turn results of falcon-hf bench into Markdown tables: speed, agreement, time of a round.

    Example: falcon-hf report results/mt_bench.json results/gsm8k.json --update README.md
    """
    try:
        contents = [read_result(path) for path in results]
        text = render(contents)
        if check and update is None:
            raise BenchError("--check compares with a file: add --update FILE.")
        differs = update is not None and update_file(update, text, check)
    except BenchError as error:
        fail(str(error))
    if as_json:
        print_json({"results": [{key: value for key, value in one.items() if key != "runs"} for one in contents]})
    elif update is None:
        typer.echo(text, nl=False)
    if check and differs:
        stderr.print(f"{update} differs from the results; run the same command without --check.", soft_wrap=True)
        raise typer.Exit(1)
    if update is not None and not check:
        stderr.print(f"{update}: {'updated' if differs else 'already up to date'}.", soft_wrap=True)
