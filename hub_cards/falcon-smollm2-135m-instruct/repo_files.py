"""What a drafter's repo holds besides config and weights: the code and its stamp, ``custom_generate``, a first card.

The *code* is the modeling file and all that it imports by relative imports, flat, as transformers copies it. The
*stamp* in the config is its SHA-256: it tells a stale or edited copy from the one that was saved with the weights. It
is no signature: who can edit the code can edit the stamp.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.dynamic_module_utils import get_relative_import_files

from .remote_generate import generate
from .repo_card import first_card

if TYPE_CHECKING:
    from .configuration_falcon_drafter import FalconDrafterConfig

CUSTOM_GENERATE = "custom_generate"
REQUIREMENTS = "torch>=2.6\ntransformers>=5.17\n"
_MODELING = "modeling_falcon_drafter.py"
_HERE = Path(__file__).parent


class CodeStampWarning(UserWarning):
    """The code in a drafter's repo is not the code that its weights were saved with."""


def code_files(folder: Path = _HERE) -> list[Path]:
    """The code in ``folder`` (by default the code that is running), sorted by name; absent files are left out."""
    if not (folder / _MODELING).is_file():
        return []
    found = {folder / _MODELING}
    waiting = list(found)
    while waiting:
        try:
            imported = {Path(name) for name in get_relative_import_files(waiting.pop())}
        except OSError:  # one of them is absent; the stamp will differ
            continue
        fresh = {path for path in imported if path.is_file()} - found
        found |= fresh
        waiting.extend(fresh)
    return sorted(found, key=lambda path: path.name)


def code_stamp(folder: Path = _HERE) -> str:
    """SHA-256 over names and bytes of the code in ``folder``, as 64 hex digits."""
    digest = hashlib.sha256()
    for path in code_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def check_stamp(config: FalconDrafterConfig, source: str) -> None:
    """Compare the code with its stamp: the repo's copy if it is running, or lies in the local folder ``source``.

    Warns:
        CodeStampWarning: if they differ. A config without a stamp was saved by hand and says nothing.
    """
    if config.code_stamp is None:
        return
    running = __name__.startswith("transformers_modules.")
    folder = _HERE if running else Path(source)
    if (running or code_files(folder)) and code_stamp(folder) != config.code_stamp:
        warnings.warn(
            f"The code in {source!r} is not the code its weights were saved with: it is stale, or somebody edited it. "
            "Read it, or fetch the repo again; drafter.save_pretrained(folder) writes code and stamp anew.",
            CodeStampWarning,
            stacklevel=3,
        )


def write_repo_files(config: FalconDrafterConfig, folder: Path) -> None:
    """Write ``custom_generate/`` into the just saved ``folder``, and a first README.md where there is none.

    Weights of an earlier save in another form are removed: transformers would load a single file rather than shards.
    """
    forms = [path for path in (folder / "model.safetensors", folder / "model.safetensors.index.json") if path.exists()]
    for stale in sorted(forms, key=lambda path: path.stat().st_mtime_ns)[:-1]:
        stale.unlink()
    place = folder / CUSTOM_GENERATE
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(inspect.getfile(generate), place / "generate.py")
    (place / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(first_card(config), encoding="utf-8")
