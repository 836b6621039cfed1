"""What is wrong with a drafter's folder, found by reading it: nothing of it is run, unpickled or allocated.

Raised as ``ValueError`` with the remedy in the message; ``drafter_loading`` names the drafter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .runtime.configuration_falcon_drafter import FalconDrafterConfig
from .runtime.modeling_falcon_drafter import FalconDrafter

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CODE_NAME = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")  # file.Class, of this very repo
_CODE_CLASSES = {"AutoConfig": "FalconDrafterConfig", "AutoModel": "FalconDrafter"}
_AGAIN = "fetch the repo again"

Shapes = dict[str, list[int]]


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        ValueError: if it is absent, no JSON object, or not a Falcon drafter's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            "it is not a Falcon drafter: it has no config.json; give the folder that save_pretrained wrote."
        )
    settings = _read_json(path)
    check_kind(settings)
    if not isinstance(settings.get("dtype"), (str, type(None))):
        raise ValueError(
            f"its config.json has the dtype {settings['dtype']!r}, not a name such as 'bfloat16': {_AGAIN}."
        )
    return settings


def check_kind(settings: dict[str, Any]) -> None:
    """Refuse the config of another kind of model."""
    kind = settings.get("model_type")
    if kind != FalconDrafterConfig.model_type:
        raise ValueError(
            f"it is not a Falcon drafter: its model_type is {kind!r}, not {FalconDrafterConfig.model_type!r}. "
            "falcon-hf convert reads checkpoints of upstream Falcon and EAGLE-1."
        )


def check_code(settings: dict[str, Any], folder: Path) -> str:
    """The code reference to trust, ``file.Class``, after a look at all of them.

    Args:
        settings: the config.
        folder: where the files must lie.

    Raises:
        ValueError: if the repo names no code, code of another repo or outside its own folder, another class, or a
            file that is absent or no Python.
    """
    entries = settings.get("auto_map")
    if not isinstance(entries, dict) or not entries.keys() >= _CODE_CLASSES.keys():
        raise ValueError(
            "it brings no code of its own to trust (auto_map in config.json names none for AutoConfig and AutoModel): "
            "leave trust_remote_code out."
        )
    for name, wanted in _CODE_CLASSES.items():
        entry = entries[name]
        if not isinstance(entry, str) or not _CODE_NAME.fullmatch(entry) or entry.split(".")[1] != wanted:
            raise ValueError(
                f"auto_map in its config.json sends {name} to {entry!r}, where a drafter has FILE.{wanted} in its own "
                "repo: leave trust_remote_code out, or save the drafter again."
            )
        _check_python(folder / f"{entry.split('.')[0]}.py")
    return str(entries["AutoModel"])


def check_weights(folder: Path, config: FalconDrafterConfig | None) -> None:
    """Refuse weights that are absent, pickled, truncated, outside the folder, or not those of ``config``.

    Args:
        folder: the drafter's.
        config: to compare names and shapes with; None where the repo's own code knows them.
    """
    shapes: Shapes = {}
    for path in _weight_files(folder):
        shapes |= _header(path)
    if config is not None:
        _compare(shapes, config)
    if "draft_vocab_ids" in shapes:
        _check_ids(folder, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {path.name} is not JSON ({type(error).__name__}): {_AGAIN}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"its {path.name} is not a JSON object: {_AGAIN}.")
    return content


def _check_python(path: Path) -> None:
    """The code file is there and can be compiled; it is not run."""
    if not path.is_file():
        raise ValueError(
            f"its code lacks {path.name}, which config.json names: {_AGAIN}, or leave trust_remote_code out."
        )
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"its code file {path.name} is no Python ({error}): {_AGAIN}.") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"it has its weights as a pickle ({pickles[0]}), which is never opened here: get them as {WEIGHTS} "
                "(falcon-hf convert does it for upstream checkpoints)."
            )
        raise ValueError(f"it has no weights ({WEIGHTS}): {_AGAIN}.")
    names = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"its {INDEX} has no weight_map: {_AGAIN}.")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"its {INDEX} names {name!r}, which is no safetensors file of its own folder: do not use it."
            )
        if not (folder / name).is_file():
            raise ValueError(f"it lacks the weight file {name}: {_AGAIN}.")
        files.append(folder / name)
    return files


def _header(path: Path) -> Shapes:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"its weight file {path.name} is truncated or damaged ({error}): {_AGAIN}.") from error


def _compare(shapes: Shapes, config: FalconDrafterConfig) -> None:
    # Each layer has more than one weight; without this a config of a billion layers would be built first.
    if config.num_hidden_layers + config.fusion_layers > len(shapes) + 8:
        raise ValueError(f"its config has {config.num_hidden_layers} layers and its weights far fewer: {_AGAIN}.")
    with torch.device("meta"):
        wanted = {name: list(weight.shape) for name, weight in FalconDrafter(config).state_dict().items()}
    missing = sorted(wanted.keys() - shapes.keys())
    if missing:
        raise ValueError(
            f"its weights are incomplete: {', '.join(missing[:3])} ({len(missing)} in all) missing; {_AGAIN}, or "
            "correct config.json."
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ValueError(
                f"its weight {name} has shape {shapes[name]}, its config wants {shape}: {_AGAIN}, or correct "
                "config.json."
            )


def _check_ids(folder: Path, config: FalconDrafterConfig | None) -> None:
    """The draft vocabulary holds ascending ids of the target's vocabulary; others would index out of its head."""
    for path in _weight_files(folder):
        with safe_open(path, "pt") as file:
            if "draft_vocab_ids" not in file.keys():  # noqa: SIM118 (no iterator)
                continue
            ids = file.get_tensor("draft_vocab_ids")
            ascending = ids.dtype == torch.long and bool((ids.diff() > 0).all())
            below = config is None or int(ids[-1]) < config.vocab_size
            if not ascending or not below or int(ids[0]) < 0:
                raise ValueError(
                    f"its draft_vocab_ids are not ascending ids of its vocabulary of tokens: {_AGAIN}, or train anew."
                )
