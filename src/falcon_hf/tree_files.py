"""Trees in files: our own JSON, path lists of Medusa and EAGLE, upstream Falcon's; and what a result says of one.

A static tree is a list of paths of child ranks, a dynamic one an object with ``"kind": "dynamic"``. JSON holds the tree
itself, or an object with a ``tree``; a path without its parent is an error there. In Python files
(``medusa_choices.py``, ``choices.py`` of EAGLE and of Bestpay-inc/Falcon) a variable holds it; the file is parsed for
its literals and never run. Upstream Falcon's lists repeat paths and leave parents out: repeated paths count once, and
missing parents are added, which is what its own buffers amount to.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .runtime.dynamic_tree import KIND, DynamicTree
from .runtime.machine_trees import MachineTrees
from .runtime.tree_shape import TreeShape


class TreeFileError(ValueError):
    """A tree file that cannot be used; the message, one line, says which and why."""


def read_tree(source: Path | str, name: str | None = None) -> TreeShape | dict[str, Any]:
    """The tree in a ``.json`` or ``.py`` file.

    Args:
        source: the file; as a string, ``choices.py#NAME`` names the variable too.
        name: the variable in a Python file; needed if it holds several trees.

    Returns:
        A static tree's shape, or a dynamic tree's entry as a drafter's config holds it. Its calibration is not
        checked: that has a table for each block position, so only a drafter's config can.

    Raises:
        TreeFileError: if the file cannot be read, or holds no tree or not this one.
    """
    path = Path(source)
    if isinstance(source, str) and ".py#" in source:
        before, _, name = source.rpartition("#")
        path = Path(before)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            return tree_from_paths(_python_paths(text, name))
        found = _json_tree(text)
        if isinstance(found, list):
            return TreeShape.from_paths(found)
        MachineTrees.from_config({**found, "calibration": None}, block_size=1)
        return found
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text."
        raise TreeFileError(f"The tree file {path} cannot be used: {reason}") from error


def tree_from_paths(paths: Iterable[Iterable[int]]) -> TreeShape:
    """A tree from paths with repetitions and without their parents.

    Raises:
        ValueError: as [`TreeShape.from_paths`], for what cannot be a path.
    """
    given = [tuple(path) for path in paths]
    whole = {path[:end] for path in given for end in range(1, len(path) + 1)}
    if any(not path for path in given):
        raise ValueError("a path is a non-empty list of ranks from 0 on.")
    return TreeShape.from_paths(whole)


def as_paths(shape: TreeShape) -> list[list[int]]:
    """A static tree as a config or a result holds it."""
    return [list(path) for path in shape.paths]


def describe_tree(tree: TreeShape | DynamicTree, block_size: int) -> dict[str, Any]:
    """What a result says of a tree: its paths or fields, drafted nodes and depth (of a dynamic one, the most)."""
    if isinstance(tree, DynamicTree):
        fields = {"kind": KIND, "nodes": tree.nodes, "passes": tree.passes, "width": tree.width}
        fields |= {
            "candidates": tree.candidates,
            "continued": tree.continued,
            "calibrated": tree.calibration is not None,
        }
        fields["pass_cost"] = tree.pass_cost
        return {"tree": fields, "tree_nodes": tree.nodes, "tree_depth": tree.depth(block_size)}
    return {"tree": as_paths(tree), "tree_nodes": tree.size - 1, "tree_depth": tree.depth}


def _json_tree(text: str) -> Any:
    """Paths, or a dynamic tree's entry."""
    value = json.loads(text)
    tree = value["tree"] if isinstance(value, dict) and "tree" in value else value
    if not isinstance(tree, list) and not (isinstance(tree, dict) and "kind" in tree):
        raise ValueError('it holds neither a list of paths, nor a dynamic tree, nor an object with a "tree".')
    return tree


def _python_paths(text: str, name: str | None) -> Any:
    found: dict[str, Any] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, (ast.List, ast.Tuple)):
            try:
                value = ast.literal_eval(statement.value)
            except ValueError:
                continue  # not a literal, so not a tree
            if value and all(isinstance(entry, (list, tuple)) for entry in value):
                found |= {target.id: value for target in statement.targets if isinstance(target, ast.Name)}
    if not found:
        raise ValueError("it holds no list of paths.")
    if name is None and len(found) > 1:
        raise ValueError(f"it holds several trees; name one of {', '.join(sorted(found))}, as FILE.py#NAME.")
    if name is not None and name not in found:
        raise ValueError(f"it has no tree {name!r}, but {', '.join(sorted(found))}.")
    return found[name] if name is not None else next(iter(found.values()))
