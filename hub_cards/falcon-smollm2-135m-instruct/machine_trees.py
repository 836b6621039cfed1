"""A dynamic tree for each kind of machine: where every further row of a verification costs, a smaller one pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .dynamic_tree import DynamicTree

KINDS = ("cheap_rows", "dear_rows")
# What of a tree follows from the price of a row; how sure the drafter is does not.
MACHINE_FIELDS = frozenset({"nodes", "passes", "width", "candidates", "continued", "pass_cost", "batch_nodes"})


def is_by_machine(tree: Any) -> bool:
    """Whether a config's ``tree`` is an entry with trees by kind of machine, and not one tree for all."""
    return isinstance(tree, Mapping) and not set(KINDS).isdisjoint(tree)


@dataclass(frozen=True)
class MachineTrees:
    """The dynamic trees of a drafter.

    Attributes:
        cheap_rows: for a GPU, and a CPU in a half precision it multiplies fast.
        dear_rows: for a CPU otherwise (see ``has_dear_rows``).
    """

    cheap_rows: DynamicTree
    dear_rows: DynamicTree

    @classmethod
    def from_config(cls, entry: Mapping[str, Any], block_size: int) -> MachineTrees:
        """From a config's ``tree``: a dynamic tree's entry, which is for all machines, or one with both kinds.

        That is ``{"kind": "dynamic", "calibration": ..., "cheap_rows": {"nodes": 16}, "dear_rows": {"nodes": 5}}``,
        either with the other fields of [`DynamicTree`].

        Raises:
            ValueError: if a kind is missing, a field stands where it would be ignored, or as
                [`DynamicTree.from_config`].
        """
        if not is_by_machine(entry):
            tree = DynamicTree.from_config(entry, block_size)
            return cls(tree, tree)
        if not all(isinstance(entry.get(kind), Mapping) for kind in KINDS):
            raise ValueError("a tree with cheap_rows or dear_rows has both, each with nodes and what else differs.")
        if idle := sorted(MACHINE_FIELDS & set(entry)):
            raise ValueError(f"{idle[0]} differs by machine here: set it in tree['cheap_rows'] or tree['dear_rows'].")
        shared = {name: value for name, value in entry.items() if name not in KINDS}
        trees = []
        for kind in KINDS:
            if foreign := sorted(set(entry[kind]) - MACHINE_FIELDS):
                raise ValueError(f"{kind} may have {', '.join(sorted(MACHINE_FIELDS))}; {foreign[0]} is none of them.")
            trees.append(DynamicTree.from_config({**shared, **entry[kind]}, block_size))
        return cls(*trees)

    @property
    def size(self) -> int:
        """Nodes verified at most, the root included, on any machine."""
        return max(self.cheap_rows.size, self.dear_rows.size)

    def where(self, dear: bool) -> DynamicTree:
        """The tree for machines on which further rows are ``dear``, or for the others."""
        return self.dear_rows if dear else self.cheap_rows
