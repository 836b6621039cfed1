"""``recipe.json``: what a drafter was made of, complete enough to make it again."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainingArguments

from ..runtime.target import fingerprint
from ..version import __version__


def make_recipe(
    plan: dict[str, Any],
    args: TrainingArguments,
    target: PreTrainedModel,
    data: dict[str, Any],
    history: list[dict[str, Any]],
    run: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Put the recipe together.

    Args:
        plan: the training plan's fields.
        args: the trainer's; those that differ from their defaults go in.
        target: the target.
        data: hash and counts of the text, and its own recipe.
        history: the trainer's log, the curve.
        run: steps, positions, seconds, memory.
        provenance: machine and whatever the caller knows.
    """
    return {
        "made_with": {
            "falcon_hf": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "target": {
            "name": target.config._name_or_path,
            "dtype": str(target.dtype).removeprefix("torch."),
            "fingerprint": fingerprint(target),
        },
        "data": data,
        "plan": {name: _without_paths(value) for name, value in plan.items()},
        "arguments": changed_arguments(args),
        "run": run,
        "curve": history,
        **provenance,
    }


def _without_paths(value: Any) -> Any:
    """The value as JSON takes it: paths as text, also in lists."""
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that are not as ``FalconTrainingArguments`` would have them, and all that are its own."""
    base = set(TrainingArguments.__dataclass_fields__)
    defaults = type(args)(output_dir=args.output_dir).to_dict()
    given = args.to_dict()
    return {name: value for name, value in given.items() if name not in base or value != defaults.get(name)}


def data_recipe(path: str | Path) -> Any:
    """What ``falcon-hf distill`` wrote about the text: ``recipe.json`` in a folder, or beside a file.

    None if there is none that can be read; likewise of a drafter's folder.
    """
    path = Path(path).expanduser()
    place = (path if path.is_dir() else path.parent) / "recipe.json"
    if not place.is_file():
        return None
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        return None
