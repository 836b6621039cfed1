"""A tree becomes the tree of a drafter in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..runtime.tree_shape import TreeShape
from .calibration import write_json
from .errors import TuningError


def write_drafter_tree(folder: Path, tree: TreeShape | dict[str, Any]) -> None:
    """Make ``tree``, a shape or a dynamic tree's entry, the tree of the drafter in ``folder``.

    Of its ``config.json`` nothing else changes, but that a static tree has no ``lookup``, which needs a dynamic one.

    Raises:
        TuningError: if the folder holds no Falcon drafter, or cannot be written.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TuningError(f"{folder} is no drafter's folder: its config.json cannot be read.") from error
    if not isinstance(config, dict) or config.get("model_type") != "falcon_drafter":
        raise TuningError(f"{folder} holds no Falcon drafter.")
    config["tree"] = [list(path) for path in tree.paths] if isinstance(tree, TreeShape) else tree
    if isinstance(tree, TreeShape) and config.get("lookup") is not None:
        config["lookup"] = None  # it needs a dynamic tree
    write_json(file, config, indent=2)
