"""``falcon-hf publish``: a drafter's folder checked, with its card, and uploaded to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.errors import BenchError
from ..bench.report import BEGIN, END, render
from ..bench.result_file import read_result
from ..hub import publish as publishing
from ..hub.errors import HubError
from .console import fail, quiet, refuse_options, stderr


def publish(
    command: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The drafter: what save_pretrained or falcon-hf train wrote.")],
    repo: Annotated[str | None, typer.Argument(help="Hub repo to upload to, organisation/name.")] = None,
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Write and upload nothing; exit with 1 if the card is not up to date.")
    ] = False,
    overwrite_card: Annotated[bool, typer.Option("--overwrite-card", help="Replace a card written by hand.")] = False,
    private: Annotated[bool | None, typer.Option(help="Whether a new repo is private; else the Hub's default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if absent.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Check a drafter's folder, write its card, and upload it if a REPO is given.

    The card comes from config.json, recipe.json and benchmarks/*.json (results of falcon-hf bench) in the folder.

    Example: falcon-hf publish ./drafter my-org/falcon-drafter
    """
    if not folder.is_dir():
        fail(f"There is no folder {folder}.")
    if check and repo is not None:
        fail("--check uploads nothing: leave the repo out.")
    if repo is None:
        refuse_options(command, {"private", "revision", "create_pr", "message"}, "needs a REPO to upload to")
    try:
        if repo is not None:
            publishing.check_name(repo)
        with quiet():
            differs = publishing.prepare(folder, render_results, check=check, overwrite=overwrite_card)
            if check:
                if differs:
                    stderr.print(
                        f"{folder}/README.md is not up to date; run the same command without --check.", soft_wrap=True
                    )
                    raise typer.Exit(1)
                return
            stderr.print(f"{folder}/README.md: {'written' if differs else 'already up to date'}.", soft_wrap=True)
            if repo is not None:
                address = publishing.publish(
                    folder, repo, private=private, revision=revision, create_pr=create_pr, commit_message=message
                )
                typer.echo(address)
    except (HubError, BenchError) as error:
        fail(str(error))


def render_results(files: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """Result files -> their contents, and the report's tables between the report's marks; no text for no file."""
    results = [read_result(path) for path in files]
    return results, f"{BEGIN}\n{render(results).rstrip()}\n{END}" if results else ""
