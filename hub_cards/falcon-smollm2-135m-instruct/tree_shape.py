"""Static trees: which candidates of which drafter pass become nodes, fixed before any token is known.

A shape is a set of *paths of child ranks* in Medusa/EAGLE notation: ``(0, 2)`` is the third likeliest continuation
of the likeliest first token. The drafter fills it in passes of k depths (block size k): pass p covers depths pk + 1 to
(p + 1)k. Its blocks hang on the *boundary* nodes, those of depth pk that have descendants (pass 0: on the root).
Inside a block the k laws are independent of the tokens chosen, so cousins share their candidates; unless the drafter
corrects them for the token before, which gives each parent a law of its own, known one *level* after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .tree import ancestor_mask

# Depths of the paper's trees (section 4.1); about 20 children at the root.
_PAPER_DEPTHS = {1: 5, 2: 8, 3: 6, 4: 8}
_PAPER_ROOT_CHILDREN = 20
# The paper gives no node count; this taper makes it about 64 at depth 8, the size EAGLE verifies.
_PAPER_TAPER = 2.0

Path = tuple[int, ...]


@dataclass(frozen=True)
class DraftLevel:
    """New nodes whose laws are known at once: all of a pass, or those of one depth where laws are corrected.

    Attributes:
        first_node, end_node: the M new nodes are ``first_node`` to ``end_node`` - 1.
        rows: ``[L]``, flat position w * k + j in the pass of the estimate that each law comes from.
        parents: ``[L]``, the node whose token each law is corrected for; None for laws that are not.
        source: ``[M]``, the law, 0 to L - 1, that a new node's token comes from.
        rank: ``[M]``, its rank in that law.
        candidates: how many candidates of each law are needed, one more than the largest rank.
    """

    first_node: int
    end_node: int
    rows: torch.Tensor
    parents: torch.Tensor | None
    source: torch.Tensor
    rank: torch.Tensor
    candidates: int


@dataclass(frozen=True)
class DraftPass:
    """What one drafter pass of a static tree reads and fills; W blocks of k positions.

    Attributes:
        levels: the new nodes, in the order in which they can be filled.
        row_nodes: ``[W * k]``, nodes whose tokens are this pass's input pairs (empty in pass 0).
        row_features: ``[W * k]``, flat positions of the previous pass whose features are those pairs'.
        row_positions: ``[W * k]``, positions of those pairs, counted from the first pair behind the committed ones.
        parent_block: ``[W]``, block of the previous pass that each block continues.
        visible: ``[W * k, R + W * k]`` bool: which of the R rows of earlier passes (pass 0 left out) and of this
            pass's own rows each row sees: its own path's, and its whole own block (relaxed causal mask).
    """

    levels: tuple[DraftLevel, ...]
    row_nodes: torch.Tensor
    row_features: torch.Tensor
    row_positions: torch.Tensor
    parent_block: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True)
class TreeShape:
    """A static tree; ``paths`` are ordered by depth, then lexicographically. Node v > 0 is ``paths[v - 1]``."""

    paths: tuple[Path, ...]

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> TreeShape:
        """From any list of paths in Medusa/EAGLE notation.

        Raises:
            ValueError: on an empty list or path, a negative rank, a path given twice, or one whose parent is missing.
        """
        given = [tuple(path) for path in paths]
        if not given:
            raise ValueError("A tree needs at least one path.")
        known = set(given)
        if len(known) != len(given):
            twice = next(path for path in given if given.count(path) > 1)
            raise ValueError(f"The tree has path {list(twice)} twice.")
        for path in given:
            if not path or any(not isinstance(rank, int) or rank < 0 for rank in path):
                raise ValueError(f"A path is a non-empty list of ranks from 0 on, got {list(path)}.")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(
                    f"The tree has path {list(path)} but not its parent {list(path[:-1])}; add the parent."
                )
        return cls(tuple(sorted(given, key=lambda path: (len(path), path))))

    @classmethod
    def paper(
        cls,
        block_size: int,
        depth: int | None = None,
        root_children: int = _PAPER_ROOT_CHILDREN,
        taper: float = _PAPER_TAPER,
    ) -> TreeShape:
        """A tree of the paper's kind by a rule: likelier tokens' branches are deeper and wider.

        With R root children, depth D and taper g, a path of depth d with ranks r_1..r_d (from 0) is kept iff

            (r_1 + 1) (r_2 + 1) ... (r_d + 1) <= R ^ (((D - d) / (D - 1)) ^ g)

        which allows R children at the root and the all-likeliest path alone at depth D. The left side grows and the
        right side falls along a path, so a kept path's parent is kept.

        Args:
            block_size: k; gives the depth (8, 6, 8 for k = 2, 3, 4; 5 for k = 1; two passes above 4).
            depth: D, instead of the paper's.
            root_children: R.
            taper: g; the larger, the fewer nodes between root and tip.

        Raises:
            ValueError: if a parameter is out of range.
        """
        if depth is None:
            depth = _PAPER_DEPTHS.get(block_size, 2 * block_size)
        if min(block_size, depth, root_children) < 1 or taper <= 0:
            raise ValueError("block_size, depth and root_children must be at least 1, and taper positive.")
        paths: list[Path] = []
        level: dict[Path, int] = {(): 1}
        for d in range(1, depth + 1):
            bound = root_children ** (((depth - d) / (depth - 1)) ** taper) if depth > 1 else root_children
            level = {
                (*path, rank): product * (rank + 1)
                for path, product in level.items()
                for rank in range(int(bound / product + 1e-9))
            }
            paths.extend(level)
        return cls.from_paths(paths)

    @property
    def size(self) -> int:
        """N, the root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Depth of the deepest node; the root has depth 0."""
        return len(self.paths[-1])

    @property
    def candidates(self) -> int:
        """How many candidates of a law it needs at most, one more than its largest rank."""
        return max(path[-1] for path in self.paths) + 1

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of each node, -1 for the root."""
        index = {(): 0} | {path: node for node, path in enumerate(self.paths, start=1)}
        return (-1, *(index[path[:-1]] for path in self.paths))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node."""
        return (0, *(len(path) for path in self.paths))

    def ancestors(self) -> torch.Tensor:
        """``[N, N]`` bool, see [`DraftTree`]."""
        return ancestor_mask(self.parents)

    def truncate(self, depth: int) -> TreeShape:
        """The same tree without nodes deeper than ``depth``, which is at least 1."""
        return TreeShape(tuple(path for path in self.paths if len(path) <= depth))

    def passes(self, block_size: int, device: torch.device | str = "cpu", corrected: bool = False) -> list[DraftPass]:
        """The drafter passes that fill this tree, as index tensors on ``device``.

        Args:
            block_size: k.
            device: of the tensors.
            corrected: whether the laws behind a block's first position are corrected for the token before.
        """
        k = block_size
        index = {(): 0} | {path: node for node, path in enumerate(self.paths, start=1)}
        plans: list[DraftPass] = []
        rows: list[Path] = []  # rows of the passes before this one, as the paths their blocks hang on
        previous: dict[Path, int] = {}
        for start in range(0, self.depth, k):
            nodes = [path for path in self.paths if start < len(path) <= start + k]
            blocks = {path: w for w, path in enumerate(dict.fromkeys(path[:start] for path in nodes))}
            own = [path for path in blocks for _ in range(k)] if start else []
            all_rows = rows + own
            tensors = {
                "row_nodes": [index[path[: start - k + 1 + j]] for path in blocks for j in range(k)] if start else [],
                "row_features": [previous[path[: start - k]] * k + j for path in blocks for j in range(k)]
                if start
                else [],
                "row_positions": [start - k + j for _ in blocks for j in range(k)] if start else [],
                "parent_block": [previous[path[: start - k]] for path in blocks] if start else [],
            }
            # A row belongs to the block that hangs on its path, and sees the rows of its path's beginnings.
            visible = [[query[: len(key)] == key for key in all_rows] for query in own]
            together = [list(group) for _, group in itertools.groupby(nodes, key=len)] if corrected else [nodes]
            plans.append(
                DraftPass(
                    levels=tuple(_level(level, start, k, blocks, index, corrected, device) for level in together),
                    visible=torch.tensor(visible, dtype=torch.bool, device=device).view(len(own), len(all_rows)),
                    **{name: torch.tensor(values, dtype=torch.long, device=device) for name, values in tensors.items()},
                )
            )
            rows, previous = all_rows, blocks
        return plans


def _level(
    nodes: list[Path],
    start: int,
    block_size: int,
    blocks: dict[Path, int],
    index: dict[Path, int],
    corrected: bool,
    device: torch.device | str,
) -> DraftLevel:
    """The level of these nodes in the pass that begins at depth ``start``; ``index`` says which node a path is."""
    if corrected:
        laws = {parent: number for number, parent in enumerate(dict.fromkeys(path[:-1] for path in nodes))}
        rows = [blocks[parent[:start]] * block_size + len(parent) - start for parent in laws]
        source = [laws[path[:-1]] for path in nodes]
    else:
        laws = {}
        rows = list(range(len(blocks) * block_size))
        source = [blocks[path[:start]] * block_size + len(path) - start - 1 for path in nodes]
    behind = [index[parent] for parent in laws if len(parent) > start]  # all of them or, at the block's begin, none
    first, numbers = index[nodes[0]], (rows, source, [path[-1] for path in nodes])
    tensors = [torch.tensor(values, dtype=torch.long, device=device) for values in numbers]
    return DraftLevel(
        first_node=first,
        end_node=first + len(nodes),
        rows=tensors[0],
        parents=torch.tensor(behind, dtype=torch.long, device=device) if behind else None,
        source=tensors[1],
        rank=tensors[2],
        candidates=max(path[-1] for path in nodes) + 1,
    )


def chain(length: int) -> TreeShape:
    """The tree of one path: the likeliest token at each of ``length`` depths."""
    return TreeShape.from_paths(itertools.accumulate([(0,)] * length))
