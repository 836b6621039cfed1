"""A distillation's folder: what is in it, what of it another run may go on with, and the dataset made of it.

``turns.jsonl`` (user turns, one a line) and ``dialogues.jsonl`` (``n``: number of the turn, ``p``: the prompt's token
ids, ``r``: the answer's) are only ever appended to; ``recipe.json`` is everything that decides the data;
``features.bfloat16`` has the target's features, if asked for; and, from [`save_dataset`], the dialogues are there as a
``datasets`` dataset with ``input_ids`` and ``loss_mask``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from ..whole_files import write_whole
from .errors import DistillationError

logger = logging.getLogger(__name__)

DIALOGUES, TURNS, RECIPE, FEATURES = "dialogues.jsonl", "turns.jsonl", "recipe.json", "features.bfloat16"
DIGEST = "target_digest"  # the recipe's key
_FREE = {"dialogues", "batch_size"}  # settings that may change from run to run


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file, none if there is no file; a last line that was cut off is removed from the file.

    Raises:
        DistillationError: if another line is no JSON object.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        logger.warning("%s ends in the middle of a line, from a run that was cut off; the line is dropped.", path)
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DistillationError(f"{path}, line {number}, is no JSON object: {error}") from error
    return lines


def asked_turns(folder: Path) -> list[str]:
    """The user turns of a distillation's folder, which may be growing.

    Raises:
        DistillationError: if it has none.
    """
    try:
        with (folder / TURNS).open(encoding="utf-8") as file:
            return [str(json.loads(line)["turn"]) for line in file if line.endswith("\n")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillationError(f"{folder} holds no {TURNS} of falcon-hf distill that can be read: {error}") from error


def keep_recipe(output: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe, or hold it against the one that is there; only the number of dialogues and rows may differ.

    Until there is a dialogue, all may: what another recipe has begun makes room.

    Raises:
        DistillationError: if the folder holds data made otherwise, or a recipe of something else.
    """
    path, there = output / RECIPE, len(read_lines(output / DIALOGUES))
    if path.exists():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            mine, theirs = _comparable(recipe), _comparable(held)
            # What is there stays, though fewer are asked for.
            most = max(recipe["settings"]["dialogues"], min(there, int(held["settings"]["dialogues"])))
            recipe_has, held_has = recipe.get(DIGEST), held.get(DIGEST)
        except (ValueError, KeyError, TypeError) as error:
            raise DistillationError(f"{path} is no recipe of falcon-hf distill: {error}") from error
        different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if recipe_has and held_has and recipe_has != held_has:
            different.append(DIGEST)
        if different and there:
            raise DistillationError(
                f"{output} holds data made otherwise ({', '.join(different)} differ): choose another --output."
            )
        if different:
            for name in (TURNS, FEATURES):
                (output / name).unlink(missing_ok=True)
        else:
            # Folders made before there was a digest stay without: nobody knows whose their first dialogues are.
            recipe = {**recipe, DIGEST: held_has, "settings": {**recipe["settings"], "dialogues": most}}
    elif there:
        raise DistillationError(f"{output} holds dialogues without a {RECIPE}: choose another --output.")
    write_whole(path, json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")


def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in recipe["settings"].items() if key not in _FREE}
    return settings | {key: recipe[key] for key in ("target", "target_fingerprint", "target_dtype")}


def need_datasets() -> None:
    """See that a run could save its dataset at the end.

    Raises:
        DistillationError: naming what to install.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DistillationError("Distillation saves a dataset: pip install 'falcon_hf[train]'.")


def save_dataset(output: Path) -> tuple[int, int]:
    """Save the folder's dialogues as a ``datasets`` dataset in it: ``input_ids`` and ``loss_mask``, 1 for answers.

    Its description is the recipe, so that it goes where the dataset goes.

    Returns:
        The number of dialogues and of answer tokens.

    Raises:
        DistillationError: if there are none.
    """
    from datasets import Dataset, DatasetInfo

    lines = read_lines(output / DIALOGUES)
    if not lines:
        raise DistillationError(f"{output} holds no dialogues.")
    rows = [
        {"input_ids": line["p"] + line["r"], "loss_mask": [0] * len(line["p"]) + [1] * len(line["r"])} for line in lines
    ]
    info = DatasetInfo(description=(output / RECIPE).read_text(encoding="utf-8"))
    Dataset.from_list(rows, info=info).save_to_disk(str(output))
    return len(lines), sum(len(line["r"]) for line in lines)
