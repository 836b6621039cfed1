"""Trees by name or from a file, as a drafter's config holds them: paths of child ranks, or a dynamic tree's fields."""

from __future__ import annotations

from typing import Any

from ..runtime.dynamic_tree import KIND as DYNAMIC
from ..runtime.tree_shape import TreeShape, chain
from ..tree_files import TreeFileError, as_paths
from ..tree_files import read_tree as read_tree_file
from .errors import BenchError

PAPER, CHAIN = "paper", "chain"

ConfigTree = list[list[int]] | dict[str, Any]


def named_tree(name: str, block_size: int) -> ConfigTree:
    """``paper`` (of that block size), ``chainN`` (the likeliest N tokens), ``dynamicN`` (N nodes), else a file's tree.

    Raises:
        BenchError: if it is a file that cannot be read or holds no tree.
    """
    if name == PAPER:
        return as_paths(TreeShape.paper(block_size))
    if (length := _number(name, CHAIN)) is not None:
        return as_paths(chain(length))
    if (nodes := _number(name, DYNAMIC)) is not None:
        return {"kind": DYNAMIC, "nodes": nodes}
    return read_tree(name)


def read_tree(path: str) -> ConfigTree:
    """The tree in a file, as a config holds it: see ``falcon_hf.tree_files``.

    Raises:
        BenchError: if the file cannot be read or holds no tree.
    """
    try:
        tree = read_tree_file(path)
    except TreeFileError as error:
        raise BenchError(str(error)) from error
    return as_paths(tree) if isinstance(tree, TreeShape) else tree


def _number(name: str, prefix: str) -> int | None:
    """N of ``prefixN``, at least 1."""
    rest = name.removeprefix(prefix)
    return int(rest) if name.startswith(prefix) and rest.isdecimal() and int(rest) > 0 else None
