"""A tree becomes the tree of a drafter in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..runtime.tree_shape import TreeShape
from .calibration import write_json
from .errors import TuningError


def write_drafter_tree(
    folder: Path, tree: TreeShape | list[list[int]] | dict[str, Any], lookup: dict[str, Any] | None = None
) -> None:
    """Make ``tree``, static or a dynamic tree's entry, the tree of the drafter in ``folder``.

    Of its ``config.json`` nothing else changes but ``lookup``: a static tree has none, and with a dynamic one the
    fields given here replace the drafter's own. Chances of acceptance are of matches from one token on.

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
    own = config.get("lookup")
    if not isinstance(tree, dict):
        if own is not None:
            config["lookup"] = None
    elif lookup is not None:
        config["lookup"] = {**(own or {}), **lookup}
        if "acceptance" in lookup:
            config["lookup"].pop("min_match", None)
    write_json(file, config, indent=2)
