"""The best static tree of a given size under calibrated scores.

Scores f(v) fall from parent to child, and from a sibling to the next (rates are monotone). So the N - 1 best nodes of
depth at most D are a tree, and growing best first from a heap finds them: the optimum of E(T) = 1 + sum of f(v).

What couples nodes is the drafter's width: a node at a block's end (depth k, 2k, ...) with descendants needs a block in
the next pass. Each such *boundary* node is charged a price, in tokens, and the best tree under that price comes from a
knapsack over the best few hundred nodes:

    G(v, m) = f(v) + max over sum m_c = m - 1 of sum_c G(c, m_c) - price * [v is a boundary node and m > 1]

The price is absolute: it is no node's score, so acceptance does not scale it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from ..runtime.tree_shape import Path, TreeShape
from .acceptance import AcceptanceModel


def best_nodes(model: AcceptanceModel, depth: int, width: int | None = None) -> Iterator[tuple[float, Path]]:
    """Scores and paths of all nodes to ``depth``, best first, a parent before its children; none of score 0.

    With ``width``, only the first so many nodes at each block's end get descendants: a plain cap on the blocks of a
    pass, where [`PricedTrees`] weighs them.
    """
    expanded: dict[int, int] = {}
    heap: list[tuple[float, int, Path]] = []

    def push(parent: float, path: Path) -> None:
        score = parent * model.rate(len(path), path[-2] if len(path) > 1 else 0, path[-1])
        if score > 0:
            # Of equal scores the shallower first, so that no child overtakes its parent.
            heapq.heappush(heap, (-score, len(path), path))

    scores: dict[Path, float] = {(): 1.0}
    push(1.0, (0,))
    while heap:
        negative, _, path = heapq.heappop(heap)
        scores[path] = -negative
        yield -negative, path
        if path[-1] + 1 < model.width:
            push(scores[path[:-1]], (*path[:-1], path[-1] + 1))
        if len(path) < min(depth, model.depth):
            if width is not None and len(path) % model.block_size == 0:
                expanded[len(path)] = expanded.get(len(path), 0) + 1
                if expanded[len(path)] > width:
                    continue
            push(scores[path], (*path, 0))


def best_tree(model: AcceptanceModel, nodes: int, depth: int) -> TreeShape | None:
    """The tree of at most ``nodes`` nodes, the root included, with the largest E; None if that is the root alone."""
    paths = [path for (_, path), _ in zip(best_nodes(model, depth), range(nodes - 1), strict=False)]
    return TreeShape.from_paths(paths) if paths else None


def widths(shape: TreeShape, block_size: int) -> tuple[int, ...]:
    """Blocks that each drafter pass queries: 1 for the first, then the boundary nodes with descendants."""
    ends = range(0, shape.depth, block_size)
    return tuple(len({path[:end] for path in shape.paths if len(path) > end}) for end in ends)


class PricedTrees:
    """Best trees under a price for each boundary node, for every size at once.

    Args:
        model: gives the scores.
        depth: no node deeper.
        price: tokens charged for each boundary node that has descendants.
        largest: the largest tree wanted, the root included.
        pool: how many of the best nodes the knapsack may choose from.
    """

    def __init__(self, model: AcceptanceModel, depth: int, price: float, largest: int, pool: int = 256) -> None:
        self.price, self._block_size, self._most = price, model.block_size, largest - 1
        self._scores: dict[Path, float] = {}
        for (score, path), _ in zip(best_nodes(model, depth), range(pool), strict=False):
            self._scores[path] = score
        self._children: dict[Path, list[Path]] = {path: [] for path in ((), *self._scores)}
        for path in self._scores:
            self._children[path[:-1]].append(path)
        # For each node: values of its subtree by size, and how its children share the nodes.
        self._values: dict[Path, np.ndarray] = {}
        self._splits: dict[Path, list[np.ndarray]] = {}
        for path in sorted(self._children, key=len, reverse=True):
            self._solve(path)

    def _solve(self, path: Path) -> None:
        """G(path, m) for m = 0, 1, ...; index 0 is the tree without this node."""
        below = np.zeros(1)  # the best value with so many nodes below ``path``
        splits = []
        for child in self._children[path]:
            below, split = _max_plus(below, self._values[child], self._most)
            splits.append(split)
        if path == ():
            self._values[path] = below
        else:
            own = self._scores[path] + below
            if len(path) % self._block_size == 0:
                own[1:] -= self.price
            self._values[path] = np.concatenate(([0.0], own))[: self._most + 1]
        self._splits[path] = splits

    def tree(self, nodes: int) -> TreeShape | None:
        """The best tree of exactly ``nodes`` nodes, the root included; of all that there are, if those are fewer."""
        count = min(nodes - 1, len(self._values[()]) - 1)
        paths: list[Path] = []
        open_nodes: list[tuple[Path, int]] = [((), count)]
        while open_nodes:
            path, below = open_nodes.pop()
            for child, split in zip(reversed(self._children[path]), reversed(self._splits[path]), strict=True):
                own = int(split[below])
                below -= own
                if own:
                    paths.append(child)
                    open_nodes.append((child, own - 1))
        return TreeShape.from_paths(paths) if paths else None

    def value(self, nodes: int) -> float:
        """Sum of scores minus prices of [`tree`]."""
        return float(self._values[()][min(nodes - 1, len(self._values[()]) - 1)])


def _max_plus(a: np.ndarray, b: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The max over i of a[m - i] + b[i] for each m up to ``most``, and that i."""
    size = min(len(a) + len(b) - 1, most + 1)
    table = np.full((size, len(b)), -np.inf)
    for i in range(min(len(b), size)):
        part = a[: size - i]
        table[i : i + len(part), i] = part + b[i]
    best = table.argmax(1)
    return table[np.arange(size), best], best
