"""Trees in files: our own JSON, path lists of Medusa and EAGLE, and upstream Falcon's.

A tree is a list of paths of child ranks. JSON holds the list itself, or an object with a ``tree``. In Python files
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

from ..runtime.tree_shape import TreeShape
from .calibration import write_json
from .errors import TuningError


def read_tree(path: Path, name: str | None = None) -> TreeShape:
    """The tree in a ``.json`` or ``.py`` file.

    Args:
        path: the file.
        name: the variable in a Python file; needed if it holds several trees.

    Raises:
        TuningError: if the file cannot be read, or holds no tree or not this one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TuningError(f"The tree file {path} cannot be read: {reason}.") from error
    try:
        paths = _python_paths(text, path, name) if Path(path).suffix == ".py" else _json_paths(text)
        return tree_from_paths(paths)
    except (SyntaxError, TypeError, ValueError) as error:
        raise TuningError(f"The tree file {path} cannot be used: {error}") from error


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


def _json_paths(text: str) -> Any:
    value = json.loads(text)
    paths = value.get("tree") if isinstance(value, dict) else value
    if not isinstance(paths, list):
        raise ValueError('it holds neither a list of paths nor an object with a "tree".')
    return paths


def _python_paths(text: str, path: Path, name: str | None) -> Any:
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
        raise ValueError(f"it holds several trees; name one of {', '.join(sorted(found))}.")
    if name is not None and name not in found:
        raise ValueError(f"it has no tree {name!r}, but {', '.join(sorted(found))}.")
    return found[name] if name is not None else next(iter(found.values()))


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
