"""The acceptance length that a drafter would have on held-out text, without decoding any.

Along the text itself, a draft's later passes see exactly the pairs that a rollout with the text's tokens sees. So the
ranks of the text's tokens in those laws say which path of the tree the text follows, from every column that a round
may begin at, and walking from round to round gives tokens per round. For text that the target chose greedily, that is
what greedy decoding would give (rounding aside); for sampled text, what sampling with the ``follow`` verifier would.
"""

from __future__ import annotations

import torch

from ..runtime.machine_trees import MachineTrees
from ..runtime.tree_shape import TreeShape

MISSED = 2**30
"""Rank of a token that is not among the candidates, or not in the draft vocabulary."""


def simulated_shape(tree: TreeShape | MachineTrees, block_size: int) -> TreeShape:
    """The static tree to simulate: the drafter's own, or for a dynamic tree one of its depth and size by a rule.

    Of two it is the one for cheap rows, wherever the training runs. The rule is [`TreeShape.paper`]'s, with the least
    taper whose tree is small enough. A dynamic tree picks its nodes by confidence, so it will do better than its
    stand-in.
    """
    if isinstance(tree, TreeShape):
        return tree
    dynamic = tree.where(dear=False)
    depth, children = dynamic.passes * block_size, min(dynamic.candidates, dynamic.nodes)
    while True:
        for quarter in range(1, 33):
            shape = TreeShape.paper(block_size, depth, children, taper=quarter / 4)
            if shape.size <= dynamic.size:
                return shape
        if children > 1:
            children -= 1
        else:
            depth -= 1


class TreeTable:
    """A tree as a table: ``child[node, rank]`` is the node or -1; node 0 is the root.

    Args:
        shape: the tree.
    """

    def __init__(self, shape: TreeShape) -> None:
        self.depth = shape.depth
        self.width = max(path[-1] for path in shape.paths) + 1
        nodes = {(): 0} | {path: number for number, path in enumerate(shape.paths, start=1)}
        self._child = torch.full((len(nodes), self.width + 1), -1, dtype=torch.long)  # the last rank never matches
        for path, number in nodes.items():
            if path:
                self._child[nodes[path[:-1]], path[-1]] = number

    def accepted(self, ranks: torch.Tensor) -> torch.Tensor:
        """``[..., depth]`` ranks of the text's next tokens -> ``[...]``, how many of them the tree has."""
        ranks = ranks.cpu().clamp(0, self.width)
        node = torch.zeros(ranks.shape[:-1], dtype=torch.long)
        count = torch.zeros_like(node)
        for rank in ranks.unbind(-1):
            # A walk that has ended stays ended, whatever it looks up.
            node = torch.where(node >= 0, self._child[node.clamp_min(0), rank], -1)
            count += node >= 0
        return count


def block_ranks(pass_ranks: list[torch.Tensor], block_size: int, depth: int) -> torch.Tensor:
    """Ranks of the ``depth`` next tokens, for a round that begins at each column.

    Args:
        pass_ranks: one ``[B, S]`` a pass: rank of each column's answer in that pass's law.
        block_size: k; depths 1 to k are pass 1's, k + 1 to 2k pass 2's, and so on.
        depth: D.

    Returns:
        ``[B, S, D]``; only columns at the first place of their block are meant.
    """
    rows, columns = pass_ranks[0].shape
    ranks = torch.full((rows, columns, depth), MISSED, dtype=torch.long, device=pass_ranks[0].device)
    for step in range(min(depth, columns)):
        ranks[:, : columns - step, step] = pass_ranks[step // block_size][:, step:]
    return ranks


def walk(accepted: torch.Tensor, learned: torch.Tensor) -> tuple[int, int]:
    """Decode the learned stretches round by round.

    Args:
        accepted: ``[B, S]``, drafts accepted by a round that begins at the column.
        learned: ``[B, S]`` bool, columns whose answer the target generates.

    Returns:
        Tokens emitted and rounds made. A stretch's first token is the prefill's.
    """
    tokens = rounds = 0
    for steps, wanted in zip(accepted.tolist(), learned.tolist(), strict=True):
        column, end = 0, len(wanted)
        while column < end:
            if not wanted[column]:
                column += 1
                continue
            stop = column
            while stop < end and wanted[stop]:
                stop += 1
            column += 1
            while column < stop:
                taken = min(steps[column] + 1, stop - column)
                tokens, rounds, column = tokens + taken, rounds + 1, column + taken
    return tokens, rounds
