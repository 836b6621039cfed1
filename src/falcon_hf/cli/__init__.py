"""The command ``falcon-hf``: one file a command."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from . import bench, convert, demo, distill, generate, publish, report, train, tune
from .console import pipe_utf8

# Plain help: rich's boxes leave the many options of a command no room.
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for command in (
    demo.demo,
    generate.generate,
    distill.distill,
    train.train,
    tune.tune,
    bench.bench,
    report.report,
    publish.publish,
    convert.convert,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"falcon-hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Falcon speculative decoding for Hugging Face generate(): the same text, sooner."""


def main() -> None:
    """Run ``falcon-hf``."""
    pipe_utf8()
    app()
