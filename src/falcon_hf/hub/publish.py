"""A drafter's folder, made ready and uploaded: checked, with its card, in one commit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..drafter_loading import DrafterError, check_repo_code, load_drafter, weights_sha256
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.repo_card import first_card
from ..runtime.repo_files import CodeStampWarning
from ..runtime.repo_upload import upload_repo
from ..whole_files import write_whole
from .cards import MARK, CardSource, build_card
from .errors import HubError
from .recipe_file import read_recipe
from .stored_results import check_result, result_files

Render = Callable[[Sequence[Path]], tuple[list[dict[str, Any]], str]]
"""Result files -> their contents and the tables as Markdown: the bench's part."""


def prepare(folder: Path, render: Render, check: bool = False, overwrite: bool = False) -> bool:
    """Check a drafter's folder and write its card.

    Args:
        folder: what ``save_pretrained`` wrote, with ``recipe.json`` and ``benchmarks/*.json`` where they are known.
        render: makes the result tables.
        check: write nothing.
        overwrite: replace a README.md that was written by hand.

    Returns:
        Whether the card differs from what it was.

    Raises:
        HubError: if the drafter cannot be loaded, its code is not what it was saved with, files that the Hub needs are
            absent, a result is unfinished or of another drafter, or its card was written by hand or cannot be read or
            written.
    """
    drafter = _checked(folder)
    recipe, weights = read_recipe(folder), weights_sha256(folder)
    files = result_files(folder, recipe)
    results, tables = render(files)
    for file, result in zip(files, results, strict=True):
        check_result(file, result, drafter.config, weights)
    text = build_card(
        CardSource(
            name=folder.resolve().name,
            config=drafter.config,
            parameters=sum(weight.numel() for weight in drafter.parameters()),
            bytes_per_weight=drafter.dtype.itemsize,
            recipe=recipe,
            results=results,
            weights_sha256=weights,
        ),
        tables,
    )
    path = folder / "README.md"
    try:
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text != old and not check:
            if old and MARK not in old and old != first_card(drafter.config) and not overwrite:
                raise HubError(
                    f"{path} was written by hand. Move what it says into recipe.json (entry 'card') and take it away, "
                    "or replace it with --overwrite-card."
                )
            write_whole(path, text)
    except (OSError, UnicodeDecodeError) as error:
        raise HubError(f"{path} cannot be updated: {getattr(error, 'strerror', None) or 'not text'}.") from error
    return text != old


def check_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a Hub repo.

    Raises:
        HubError: naming the form.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a Hub repo; give organisation/name.") from error


def publish(folder: Path, repo_id: str, **options: Any) -> str:
    """Upload a prepared folder as the Hub repo ``repo_id``; options as in ``repo_upload.upload_repo``.

    Returns:
        The commit's address.

    Raises:
        HubError: if the Hub refuses it or cannot be reached.
    """
    check_name(repo_id)
    try:
        return upload_repo(folder, repo_id, **options)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        why = "log in with `hf auth login` or set HF_TOKEN, and ask for write access"
        if status not in (401, 403):
            why = " ".join((error.server_message or "").split())
        raise HubError(f"The Hub refused the upload to {repo_id!r} ({status}){': ' + why if why else ''}.") from error
    except (HTTPError, OSError) as error:
        raise HubError(f"The Hub cannot be reached ({type(error).__name__}): try again where it can be.") from error
    except ValueError as error:  # what the client makes of a card that the Hub does not take
        reason = " ".join(str(error).split())
        raise HubError(f"The Hub refused the card: {reason} Correct recipe.json's entry 'card'.") from error


def _checked(folder: Path) -> FalconDrafter:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", CodeStampWarning)
            drafter = load_drafter(folder)
            check_repo_code(folder)
    except DrafterError as error:
        raise HubError(str(error)) from error
    except CodeStampWarning as error:
        raise HubError(str(error)) from error
    if drafter.config.code_stamp is None:
        raise HubError(f"{folder} has no code stamp: load the drafter and save it again with save_pretrained.")
    if drafter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise HubError(f"The weights are {drafter.dtype}: save them as bfloat16, float16 or float32.")
    return drafter
