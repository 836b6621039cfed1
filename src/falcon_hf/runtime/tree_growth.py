"""Grows a dynamic tree a batch row by cumulative scores, with fixed shapes and no look at any value. Knows no model.

A node's score is the sum of its path's log chances of acceptance, so it never exceeds its parent's, and the N best
candidates of all are a tree (EAGLE-2's rerank; Sequoia's optimum for given scores). Where a child ties with its parent
the one that was found first is taken, and parents are found first.

Inside a block a level is the sums of the level before and the next position's candidates, of which a block keeps the N
best, more than which cannot survive. Where each node of the level before has a law of its own, only the best of them
are continued, and only the best boundary nodes by another drafter pass.

``tests/runtime/test_tree_growth.py`` holds it against brute force. Device syncs: none, except in [`Growth.pays`].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .tree import DraftTree

LevelLaws = Callable[[int, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""``laws(level, before)``: log chances, at most 0, and tokens of the candidates of a block position's laws.

``before`` are the tokens ``[B, W, n]`` of the level before, None at the first. The answer is ``[B, W, n, b]`` each, or
``[B, W, 1, b]`` for one law whatever the token before; the tokens of one law differ.
"""


@dataclass(frozen=True)
class Boundary:
    """The nodes that a pass's W blocks hang on.

    Attributes:
        scores: ``[B, W]``.
        nodes: ``[B, W]``, indices among the candidates; -1 for the root.
        blocks: ``[B, W]``, the block of the pass before in which each node lies.
        tokens: ``[B, W, k]``, the tokens of that block's path to the node.
    """

    scores: torch.Tensor
    nodes: torch.Tensor
    blocks: torch.Tensor
    tokens: torch.Tensor


class Growth:
    """All candidates of one round.

    Args:
        rows: B.
        nodes: N, how many are to be kept.
        device: where the scores live.
        continued: how many nodes of a block's level the next level of the block hangs on; None for all.
    """

    def __init__(self, rows: int, nodes: int, device: torch.device, continued: int | None = None) -> None:
        self._rows, self._nodes, self._device, self._continued = rows, nodes, device, continued
        self._scores: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._parents: list[torch.Tensor] = []
        self._depths: list[tuple[int, int]] = []  # how many candidates of which depth
        self._count = 0
        self._drafted: int | None = None  # how many of them are the drafter's, once a chain was joined
        self._block_gain: torch.Tensor | None = None

    def root(self) -> Boundary:
        """What the first pass hangs on."""
        zeros = torch.zeros(self._rows, 1, dtype=torch.long, device=self._device)
        return Boundary(zeros.float(), zeros - 1, zeros, zeros[:, :, None])

    def add(self, scores: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, depth: int) -> torch.Tensor:
        """Add candidates of one depth, each ``[B, M]``; parents by the indices that this returns, ``[1, M]``."""
        first, self._count = self._count, self._count + scores.shape[1]
        self._scores.append(scores)
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._depths.append((scores.shape[1], depth))
        return torch.arange(first, self._count, device=self._device)[None]

    def block_levels(
        self, boundary: Boundary, laws: LevelLaws, start: int, levels: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Expand a pass's blocks.

        Args:
            boundary: the W nodes they hang on.
            laws: of the blocks' positions.
            start: depth of the boundary.
            levels: how many of the k levels to expand.

        Returns:
            The last level: scores ``[B, W, n]``, candidate indices ``[1, W, n]``, path tokens ``[B, W, n, levels]``.
        """
        chances, tokens = laws(0, None)
        rows, _, _, candidates = tokens.shape
        scores = boundary.scores[:, :, None] + _at_most_certain(chances)[:, :, 0]
        history = tokens[:, :, 0, :, None]
        parents = boundary.nodes[:, :, None].expand(-1, -1, candidates)
        indices = self._add_level(scores, history, parents, start + 1)
        for level in range(1, levels):
            # The likeliest come first: by draft probability at the first level, by score further down.
            scores, indices, history = (part[:, :, : self._continued] for part in (scores, indices, history))
            chances, tokens = laws(level, history[..., -1])
            sums = (scores[:, :, :, None] + _at_most_certain(chances)).flatten(2)
            tokens = tokens.expand(-1, -1, scores.shape[2], -1).flatten(2)
            scores, best = sums.topk(min(self._nodes, sums.shape[-1]), dim=-1)
            before = best // candidates
            new = tokens.gather(2, best)
            history = history.gather(2, before[:, :, :, None].expand(-1, -1, -1, level))
            history = torch.cat((history, new[:, :, :, None]), dim=-1)
            parents = indices.expand(rows, -1, -1).gather(2, before)
            indices = self._add_level(scores, history, parents, start + level + 1)
        return scores, indices, history

    def _add_level(
        self, scores: torch.Tensor, history: torch.Tensor, parents: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Add a level of W blocks, ``[B, W, n]``; returns its candidate indices ``[1, W, n]``."""
        added = self.add(scores.flatten(1), history[..., -1].flatten(1), parents.flatten(1), depth)
        return added.view(1, scores.shape[1], -1)

    @staticmethod
    def next_boundary(scores: torch.Tensor, indices: torch.Tensor, history: torch.Tensor, width: int) -> Boundary:
        """The ``width`` best nodes of a pass's last level, given as [`block_levels`] returns it."""
        by_block = scores.shape[2]
        best_scores, best = scores.flatten(1).topk(min(width, scores.shape[1] * by_block), dim=-1)
        nodes = indices.flatten(1).expand(scores.shape[0], -1).gather(1, best)
        paths = history.flatten(1, 2)
        tokens = paths.gather(1, best[:, :, None].expand(-1, -1, paths.shape[-1]))
        return Boundary(best_scores, nodes, best // by_block, tokens)

    def join(self, tokens: torch.Tensor, scores: torch.Tensor) -> None:
        """Join a chain of another source that hangs on the root; once, after the drafter's levels.

        Where the chain runs along candidates there are already, they get the better of the two scores; where it leaves
        them its own nodes branch off. So siblings still differ and a parent's score is still at least its child's.

        Args:
            tokens: ``[B, L]``, the chain's tokens.
            scores: ``[B, L]``, the log chance of each of its nodes, falling; -inf where the chain has ended.
        """
        levels, first, self._drafted = len(self._scores), 0, self._count
        parent = torch.full_like(tokens[:, :1], -1)  # where the chain is
        for depth in range(tokens.shape[1]):
            token, score, further = tokens[:, depth, None], scores[:, depth, None], torch.full_like(parent, self._count)
            if depth < levels:  # block_levels added one entry a depth
                hits = (self._parents[depth] == parent) & (self._tokens[depth] == token)
                known, place = hits.any(1, keepdim=True), hits.int().argmax(1, keepdim=True)
                raised = torch.where(known, score, -torch.inf)
                self._scores[depth] = self._scores[depth].scatter_reduce(1, place, raised, "amax")
                score, further = torch.where(known, -torch.inf, score), torch.where(known, first + place, further)
                first += hits.shape[1]
            self.add(score, token, parent, depth + 1)
            parent = further

    def pays(self, boundary: Boundary, passes: int, pass_cost: float) -> bool:
        """Whether another pass over ``boundary`` would raise tokens per time. One device sync.

        The tree's expected tokens E are one and the sum of its nodes' chances. Another pass is taken to add what the
        first one added, times the chance that its boundary is reached, and costs ``pass_cost`` of all else in a round.
        """
        best = torch.cat(self._scores, dim=1)
        expected = best.topk(min(self._nodes, best.shape[1]), dim=1).values.exp().sum(1)
        if self._block_gain is None:
            self._block_gain = expected
        gain = (boundary.scores.exp().sum(1) * self._block_gain).mean()
        return bool(gain / pass_cost > (1 + expected.mean()) / (1 + passes * pass_cost))

    def tree(self, root: torch.Tensor) -> DraftTree:
        """The N best candidates on root tokens ``[B, 1]``, fewer if there are fewer; node ids by falling scores."""
        scores = torch.cat(self._scores, dim=1)
        # Not more than the drafter has, so that no node of a chain that has ended is ever needed.
        kept = min(self._nodes, self._drafted or self._count)
        # Stable: of a parent and a child with the same score the parent comes first.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, :kept], order[:, :kept]
        node_of = torch.zeros(self._rows, self._count + 1, dtype=torch.long, device=self._device)
        ids = torch.arange(1, kept + 1, device=self._device).expand(self._rows, -1)
        node_of.scatter_(1, order + 1, ids)  # the root is at 0
        parents = node_of.gather(1, torch.cat(self._parents, dim=1).gather(1, order) + 1)
        tokens = torch.cat(self._tokens, dim=1).gather(1, order)
        depths = torch.cat([torch.full((count,), depth, device=self._device) for count, depth in self._depths])[order]
        parents = F.pad(parents, (1, 0), value=-1)
        return DraftTree(
            tokens=torch.cat((root, tokens), dim=1),
            parents=parents,
            depths=F.pad(depths, (1, 0)),
            ancestors=ancestors_of(parents, max(depth for _, depth in self._depths)),
            scores=F.pad(scores, (1, 0)),
        )


def _at_most_certain(log_chances: torch.Tensor) -> torch.Tensor:
    """A NaN from broken weights ranks last, so that it cannot outrank its parent."""
    return log_chances.nan_to_num(nan=-torch.inf).clamp_max(0)


def ancestors_of(parents: torch.Tensor, depth: int) -> torch.Tensor:
    """``[B, N, N]`` bool, see [`DraftTree`], from ``[B, N]`` parents of nodes no deeper than ``depth``; no sync."""
    size = parents.shape[1]
    nodes = torch.arange(size, device=parents.device)
    steps = ((parents[:, :, None] == nodes) | (nodes[:, None] == nodes)).float()
    reach = 1
    while reach < depth:
        steps = (steps @ steps).clamp_max(1)  # counts ways, which would overflow in a deep tree
        reach *= 2
    return steps > 0
