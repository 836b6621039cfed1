"""A tree becomes the tree of a drafter in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..runtime.machine_trees import KINDS, MACHINE_FIELDS, is_by_machine
from ..runtime.tree_shape import TreeShape
from .calibration import write_json
from .errors import TuningError

_CONFIG = "config.json"


def write_drafter_tree(
    folder: Path,
    tree: TreeShape | list[list[int]] | dict[str, Any],
    lookup: dict[str, Any] | None = None,
    *,
    dear: bool | None = None,
    beside: bool = False,
) -> list[list[int]] | dict[str, Any]:
    """Make ``tree``, static or a dynamic tree's entry, the tree of the drafter in ``folder``.

    Of its ``config.json`` nothing else changes but ``lookup``: a static tree has none, and with a dynamic one the
    fields given here replace the drafter's own. Chances of acceptance are of matches from one token on.

    Args:
        folder: of the drafter.
        tree: the tree, or the entry of dynamic ones.
        lookup: the config's look-up beside a dynamic tree.
        dear: None for a tree for all machines. Else whether further rows of a verification cost where it was found (see
            ``has_dear_rows``): a dynamic tree then leaves beside it the one that the drafter has for the other kind.
        beside: keep for the other kind also a dynamic tree that has been for all machines.

    Returns:
        What is now the config's tree.

    Raises:
        TuningError: if the folder holds no Falcon drafter, or cannot be written.
    """
    config = drafter_config(folder)
    if isinstance(tree, TreeShape):
        tree = [list(path) for path in tree.paths]
    earlier = config.get("tree")
    if isinstance(tree, dict) and isinstance(earlier, dict) and dear is not None:
        tree = _beside(tree, earlier, dear) if beside or is_by_machine(earlier) else tree
    config["tree"] = tree
    own = config.get("lookup")
    if not isinstance(tree, dict):
        if own is not None:
            config["lookup"] = None
    elif lookup is not None:
        config["lookup"] = {**(own or {}), **lookup}
        if "acceptance" in lookup:
            config["lookup"].pop("min_match", None)
    write_json(Path(folder) / _CONFIG, config, indent=2)
    return tree


def drafter_config(folder: Path) -> dict[str, Any]:
    """The config of a drafter in a folder, as its file has it.

    Raises:
        TuningError: if the folder holds no Falcon drafter.
    """
    try:
        config = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TuningError(f"{folder} is no drafter's folder: its config.json cannot be read.") from error
    if not isinstance(config, dict) or config.get("model_type") != "falcon_drafter":
        raise TuningError(f"{folder} holds no Falcon drafter.")
    return config


def _beside(found: dict[str, Any], earlier: dict[str, Any], dear: bool) -> dict[str, Any]:
    """The entry of a dynamic tree found on one kind of machine, with what ``earlier`` has for the other."""
    if is_by_machine(found):
        return found
    here, elsewhere = reversed(KINDS) if dear else KINDS
    shared = {name: value for name, value in found.items() if name not in MACHINE_FIELDS}
    kept = earlier.get(elsewhere, earlier)
    return {
        **shared,
        here: {name: value for name, value in found.items() if name in MACHINE_FIELDS},
        elsewhere: {name: value for name, value in kept.items() if name in MACHINE_FIELDS},
    }
