"""Loading of targets, tokenizers and drafters for the commands; whatever is wrong is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..demo_target import load_demo_target
from ..drafter_loading import DrafterError
from ..drafter_loading import load_drafter as read_drafter
from ..runtime.half_precision import drafting_dtype
from ..runtime.modeling_falcon_drafter import FalconDrafter
from .console import AUTO, fail, parse_dtype

DEMO = "demo"
"""As a target's name: the model of ``load_demo_target``."""
DEMO_DRAFTER = "falcon-smollm2-135m-instruct"

_HUB_TIMEOUT = 10.0  # seconds; the libraries themselves wait and retry for minutes
# What loading raises for a repo that is of another kind or broken.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError, HTTPError)


def find_repo(name: str) -> str | None:
    """What to load for ``name``: a local folder, a Hub repo, or its cached copy; None if there is no such thing."""
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    try:
        cached = try_to_load_from_cache(name, "config.json")
        model_info(name, timeout=_HUB_TIMEOUT)
    except ValueError:  # cannot be a repo's name
        return None
    except (HTTPError, OSError):
        return str(Path(cached).parent) if isinstance(cached, str) else None
    return name


def require_repo(name: str, kind: str) -> str:
    """[`find_repo`]; if there is nothing, the command ends with an error about the ``kind`` ("drafter") of model."""
    found = find_repo(name)
    if found is None:
        fail(
            f"There is no {kind} {name!r}: it is no local folder, and the Hub has no such repo, or cannot be reached "
            "(a private repo needs `hf auth login`)."
        )
    return found


def load_target(
    name: str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a target and its tokenizer; a problem ends the command.

    Args:
        name: a Hub repo, a local folder, or ``demo``.
        dtype: of the weights; the checkpoint's own by default (for ``demo`` bfloat16 where that is fast, else float32).
        device: where the target goes; the CPU by default.

    Returns:
        The target, in evaluation mode, and its tokenizer.
    """
    try:
        if name == DEMO:
            target, tokenizer = load_demo_target(dtype or parse_dtype(AUTO, device or torch.device("cpu")))
        else:
            found = require_repo(name, "target")
            target = AutoModelForCausalLM.from_pretrained(found, dtype=dtype or "auto")
            tokenizer = AutoTokenizer.from_pretrained(found)
            if not Path(name).expanduser().is_dir():
                target.config._name_or_path = name  # not the cached copy's folder: drafters and results name it
        return target.to(device or torch.device("cpu")).eval(), tokenizer
    except typer.Exit:
        raise  # which is a RuntimeError
    except _LOAD_ERRORS as error:
        fail(f"Cannot load the target {name!r}: {error}")


def load_drafter(name: str, target: PreTrainedModel, trust_remote_code: bool = False) -> FalconDrafter:
    """Load a drafter for a target, onto its device and in the dtype that is fast there; a problem ends the command.

    Args:
        name: a Hub repo or a local folder.
        target: the target it shall draft for.
        trust_remote_code: run the code in the drafter's repo instead of this package's.
    """
    try:
        dtype = drafting_dtype(target.device, target.dtype)
        drafter = read_drafter(require_repo(name, "drafter"), dtype, trust_remote_code)
    except DrafterError as error:
        fail(str(error))
    return drafter.to(target.device)


def find_demo_drafter() -> str:
    """The drafter of the demo target: in the source checkout, else in the current folder's ``hub_cards``.

    If it is in neither, the command ends with an error that names both.
    """
    for root in (Path(__file__).parents[3], Path.cwd()):
        folder = root / "hub_cards" / DEMO_DRAFTER
        if (folder / "config.json").is_file():
            return str(folder)
    fail(
        f"The demo's drafter is not at hand: there is no folder hub_cards/{DEMO_DRAFTER} in falcon_hf's source "
        "checkout or in the current folder. Clone the repository, or name a drafter with --drafter PATH."
    )
