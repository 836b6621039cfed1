"""Where a training's features come from: what an earlier run or ``falcon-hf distill`` kept, or the target.

Of several texts each may have its own, so that more text costs no forward over what was there before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .dataset import TrainingData
from .distilled_features import find_distilled_features
from .features import (
    FeatureCache,
    Progress,
    cache_fits,
    cache_key,
    estimate_bytes,
    feature_width,
    free_bytes,
    is_complete,
)
from .laws import estimate_law_bytes
from .plan import TrainingPlan

logger = logging.getLogger(__name__)

Rows = Callable[[int], torch.Tensor]
"""``rows(dialogue)``: the features ``[n, W]`` of its n tokens."""


def prepare_features(
    plan: TrainingPlan,
    target: PreTrainedModel,
    texts: list[TrainingData],
    data: TrainingData,
    feature_layers: list[int] | None,
    say: Callable[[str], None],
    progress: Progress | None = None,
    with_laws: bool = True,
) -> FeatureCache | None:
    """The feature cache of all texts, filled; None for features on the fly.

    Args:
        plan: says where, and whether at all.
        target: whose features.
        texts: one for each of ``plan.data``.
        data: the same, joined.
        feature_layers: hidden states side by side, None for the last.
        say: told in a line what is being done.
        progress: called while features are computed.
        with_laws: whether laws are to be kept beside them (``laws.py``), and need room too.

    Raises:
        TrainingError: as [`FeatureCache.build`].
    """
    if plan.features == "live":
        say("features are computed on the fly")
        return None
    key = cache_key(target, data, plan.max_length, feature_layers)
    folder = (plan.cache or default_cache_folder(key)).expanduser()
    size = estimate_bytes(len(data.tokens), feature_width(target, feature_layers))
    begun = (folder / "index.json").is_file()
    what = "features"
    if with_laws:
        size, what = size + estimate_law_bytes(len(data.tokens), feature_width(target, None)), "features and laws"
    say(f"{what} take {size / 1e9:.2f} GB in {folder} ({free_bytes(folder) / 1e9:.0f} GB free)")
    if not begun and plan.features == "auto" and not cache_fits(folder, size):
        say("that is more than half of what is free: features are computed on the fly")
        return None
    ready = None
    if not is_complete(folder):
        found = [
            _kept_features(path, target, text, plan.max_length, feature_layers, folder, say)
            for path, text in zip(plan.data, texts, strict=True)
        ]
        ready = _JoinedRows(texts, found) if any(found) else None
    return FeatureCache.build(folder, target, data, key, feature_layers, progress, ready=ready)


def default_cache_folder(key: dict[str, Any]) -> Path:
    """Where features go unless a folder is named: one folder a target and text."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    layers = "-".join(map(str, key["feature_layers"] or ["last"]))
    return root / "falcon_hf" / "features" / f"{key['target'][:16]}-{key['data'][:16]}-{key['max_length']}-{layers}"


def _kept_features(
    path: Path,
    target: PreTrainedModel,
    text: TrainingData,
    max_length: int,
    feature_layers: list[int] | None,
    folder: Path,
    say: Callable[[str], None],
) -> Rows | None:
    """The features of one text that are on disk already: those that came with it, or an earlier run's."""
    distilled = find_distilled_features(path, target, text, feature_layers)
    if distilled is not None:
        say(f"those of {path} came with the text")
        return distilled.rows
    key = cache_key(target, text, max_length, feature_layers)
    earlier = default_cache_folder(key)
    if earlier != folder and is_complete(earlier):
        say(f"those of {path} are of an earlier run ({earlier})")
        return FeatureCache.open(earlier, key).rows
    return None


class _JoinedRows:
    """``rows(dialogue)`` of joined texts: the features that one of them has, None where it has none."""

    def __init__(self, texts: list[TrainingData], rows: list[Rows | None]) -> None:
        self._first = np.cumsum([0, *map(len, texts)])  # dialogue of each text, counted over all
        self._rows = rows

    def __call__(self, dialogue: int) -> torch.Tensor | None:
        number = int(np.searchsorted(self._first, dialogue, side="right")) - 1
        rows = self._rows[number]
        return None if rows is None else rows(dialogue - int(self._first[number]))
