"""Loading a drafter for the commands and the benchmark: whatever is wrong with it is one kind of error, on one line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .drafter_checks import check_code, check_kind, check_weights, read_settings
from .runtime.configuration_falcon_drafter import FalconDrafterConfig
from .runtime.modeling_falcon_drafter import FalconDrafter
from .runtime.repo_files import CUSTOM_GENERATE

# Of a Hub repo nothing else is downloaded: pickled weights never.
_FILES = ["*.json", "*.safetensors", "*.py"]

LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    AttributeError,
    TypeError,
    SyntaxError,
    SafetensorError,
    StrictDataclassError,
    HTTPError,
)
"""What loading raises for a repo that is of another kind, broken or out of reach."""


class DrafterError(ValueError):
    """A drafter that cannot be loaded; the message says which and why."""


def load_drafter(
    source: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> FalconDrafter:
    """A drafter in evaluation mode, on the CPU. Its files are looked through before anything in them is used.

    Args:
        source: a folder, or a Hub repo, which is downloaded or found in the cache first.
        dtype: of the weights; as stored by default.
        trust_remote_code: run the code in the drafter's repo instead of this package's. Asked for here by hand:
            ``AutoModel`` prefers an installed class whatever it is told.

    Raises:
        DrafterError: if it is no Falcon drafter, or config, code or weights are absent, corrupt or incomplete.

    Warns:
        CodeStampWarning: if the code in the repo is not the code it was saved with.
    """
    folder = drafter_folder(source)
    try:
        settings = read_settings(folder)
        code = check_code(settings, folder) if trust_remote_code else None
        check_weights(folder, None if trust_remote_code else FalconDrafterConfig.from_pretrained(folder))
        model_class: Any = FalconDrafter if code is None else get_class_from_dynamic_module(code, str(folder))
        drafter: FalconDrafter = model_class.from_pretrained(folder, dtype=dtype or "auto")
        return drafter.eval()
    except LOADING_ERRORS as error:
        raise DrafterError(f"The drafter {str(source)!r} cannot be loaded: {_one_line(error)}") from error


def drafter_folder(source: str | Path) -> Path:
    """The local folder of a drafter.

    A Hub repo's is downloaded or found in the cache, once its config says that it is a drafter: others may be hundreds
    of gigabytes.

    Raises:
        DrafterError: if it is neither a folder nor a drafter's repo within reach.
    """
    repo = str(source)
    try:
        if Path(source).is_dir():
            return Path(source)
        validate_repo_id(repo)
    except (HFValidationError, OSError) as error:  # a name too long for a file is one for a repo too
        raise DrafterError(f"The drafter {repo} is not a folder here, nor a Hub repo's name (org/name).") from error
    try:
        settings, _ = PreTrainedConfig.get_config_dict(repo)
        check_kind(settings)
        return Path(snapshot_download(repo, allow_patterns=_FILES))
    except LOADING_ERRORS as error:
        raise DrafterError(
            f"The drafter {repo!r} is not a folder here, and cannot be loaded from the Hub: {_one_line(error)}"
        ) from error


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's safetensors; of several files, read one after the other in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def check_repo_code(folder: Path) -> None:
    """Refuse a folder whose code ``trust_remote_code`` and ``custom_generate`` could not run, or another's than saved.

    Raises:
        DrafterError: naming what is absent, no Python, or edited.
    """
    try:
        check_code(read_settings(folder), folder)
        start, own = folder / CUSTOM_GENERATE / "generate.py", folder / "remote_generate.py"
        if start.read_bytes() != own.read_bytes():
            raise ValueError(f"{start} is not the {own.name} that was saved with it")
        if not start.with_name("requirements.txt").is_file():
            raise ValueError(f"it lacks {CUSTOM_GENERATE}/requirements.txt")
    except (OSError, ValueError) as error:
        raise DrafterError(
            f"{folder} is no whole Hub repo: {_one_line(error)}. Load the drafter and save it again with "
            "save_pretrained."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
