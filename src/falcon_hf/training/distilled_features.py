"""The features that ``falcon-hf distill --feature-layers`` kept while it wrote the text: no forward is left to do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .dataset import TrainingData
from .distillation_folder import DIALOGUES, DIGEST, FEATURES, RECIPE
from .features import held_digest

logger = logging.getLogger(__name__)


class DistilledFeatures:
    """Rows of ``features.bfloat16`` by dialogue, read from the disk as they are asked for.

    Args:
        path: of the file.
        offsets: ``[D + 1]``, where each dialogue begins, in tokens.
        width: of a row, all kept layers side by side.
        columns: those of the layers asked for.
    """

    def __init__(self, path: Path, offsets: np.ndarray, width: int, columns: np.ndarray) -> None:
        self._offsets = offsets
        self._rows = np.memmap(path, dtype=np.int16, mode="r", shape=(path.stat().st_size // (2 * width), width))
        self._columns = columns
        self._all = len(columns) == width

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def rows(self, dialogue: int) -> torch.Tensor:
        """``[n, W]`` bfloat16: the features of a dialogue's n tokens; zeros for the last."""
        block = self._rows[self._offsets[dialogue] : self._offsets[dialogue + 1]]
        chosen = np.array(block if self._all else block[:, self._columns])
        return torch.from_numpy(chosen).view(torch.bfloat16)


def find_distilled_features(
    folder: Path, target: PreTrainedModel, data: TrainingData, feature_layers: list[int] | None
) -> DistilledFeatures | None:
    """The features kept in a distillation's folder, if they are this target's, of these layers and of just this text.

    Args:
        folder: of ``falcon-hf distill``; anything else has none.
        target: the target.
        data: what was read from the folder.
        feature_layers: hidden states wanted, None for the last.
    """
    folder = folder.expanduser()
    path = folder / FEATURES
    if not path.is_file():
        return None
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        kept: list[int] = list(recipe["settings"]["feature_layers"])
        lengths = _lengths(folder / DIALOGUES)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "The features in %s are not used: its %s or %s cannot be read (%r).", path, RECIPE, DIALOGUES, error
        )
        return None
    text: Any = target.config.get_text_config()
    wanted = feature_layers or [int(text.num_hidden_layers)]
    digest = recipe.get(DIGEST)
    width = len(kept) * int(text.hidden_size)
    reasons = {
        f"they are of the layers {kept}": not set(wanted) <= set(kept),
        "their recipe, of an earlier falcon_hf, does not tell the target": digest is None,
        "they are another target's, or of another dtype": digest is not None and digest != held_digest(target),
        "the text was cut or has grown": not np.array_equal(lengths[: len(data)], data.lengths),
        "the file is too short": path.stat().st_size < int(data.offsets[-1]) * 2 * width,
    }
    for reason, applies in reasons.items():
        if applies:
            logger.warning("The features in %s are not used: %s.", path, reason)
            return None
    size = int(text.hidden_size)
    columns = np.concatenate([np.arange(size) + kept.index(layer) * size for layer in wanted])
    return DistilledFeatures(path, data.offsets, width, columns)


def _lengths(path: Path) -> np.ndarray:
    """``[D]`` tokens of each dialogue."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    return np.array([len(line["p"]) + len(line["r"]) for line in lines], dtype=np.int64)
