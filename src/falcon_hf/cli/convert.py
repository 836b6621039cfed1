"""``falcon-hf convert``: a checkpoint of upstream Falcon or EAGLE-1 as a drafter's folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

from ..hub.convert import convert as read_checkpoint
from ..hub.errors import HubError
from .console import fail, parse_dtype, quiet, stderr


class _ToConsole(logging.Handler):
    """Our own log, line by line on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stderr.print(record.getMessage(), soft_wrap=True, markup=False)


def convert(
    source: Annotated[str, typer.Argument(help="The checkpoint: a folder or a Hub repo.")],
    output: Annotated[Path, typer.Argument(help="The drafter's folder; made if absent, and must be empty.")],
    *,
    target: Annotated[str, typer.Option(help="The model it was trained for, as on the Hub (organisation/name).")],
    fusion: Annotated[
        str | None,
        typer.Option(
            help="lstm or lstm_stateless, for Falcon checkpoints; the latter by default, saying how sure that is."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else as stored.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the Hub repo.")] = None,
) -> None:
    """Convert a checkpoint of upstream Falcon or EAGLE-1 to a drafter for generate(assistant_model=).

    Pickled weights are read as tensors only; nothing in them is run.

    Example: falcon-hf convert Bestpay-inc/Falcon-Qwen2.5-7B ./drafter --target Qwen/Qwen2.5-7B-Instruct
    """
    torch_dtype = parse_dtype(dtype) if dtype is not None else None
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        fail(f"{output} is not an empty folder; choose another, or empty it.")
    log, handler = logging.getLogger("falcon_hf.hub"), _ToConsole()
    log.addHandler(handler)
    try:
        with quiet():
            drafter = read_checkpoint(source, target, fusion, revision, torch_dtype)
            drafter.save_pretrained(output)
    except HubError as error:
        fail(str(error))
    except (OSError, SafetensorError) as error:
        fail(f"Cannot write the drafter to {output}: {' '.join(str(error).split())}")
    finally:
        log.removeHandler(handler)
    config = drafter.config
    stderr.print(
        f"{output}: k = {config.block_size}, {config.fusion} fusion, {drafter.num_parameters() / 1e6:.1f} million "
        f"parameters, {str(drafter.dtype).removeprefix('torch.')}.",
        soft_wrap=True,
        markup=False,
    )
