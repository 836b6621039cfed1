"""A draft tree: candidate continuations of the committed text that share their beginnings. Knows no model.

Node 0 is the root, the last committed token; it is verified like every other node but was never drafted. Invariants,
held by ``tests/runtime/test_tree.py``:

* parents precede children, so ascending node ids along a path are ascending depths;
* siblings carry different tokens, so at most one child continues any given text;
* ``ancestors[v, u]`` is True iff u lies on the path from the root to v, both ends included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .rejection import Proposals


@dataclass(frozen=True)
class DraftTree:
    """One tree a batch row, all rows of the same number of nodes N (root included).

    Attributes:
        tokens: ``[B, N]`` long.
        parents: ``[B, N]`` long; the root's is -1.
        depths: ``[B, N]`` long; the root's is 0.
        ancestors: ``[B, N, N]`` bool; row v marks the path from the root to v.
        scores: ``[B, N]`` float, the log chance of each node's path in a dynamic tree; None in a static one.
        proposals: the laws that siblings were drawn from, on the drafter's device; None if they were not drawn.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    scores: torch.Tensor | None = None
    proposals: Proposals | None = None

    @property
    def size(self) -> int:
        """N, the root included."""
        return self.tokens.shape[1]

    def to(self, device: torch.device) -> DraftTree:
        """The same on another device."""
        if self.tokens.device == device:
            return self
        return DraftTree(
            tokens=self.tokens.to(device),
            parents=self.parents.to(device),
            depths=self.depths.to(device),
            ancestors=self.ancestors.to(device),
            scores=None if self.scores is None else self.scores.to(device),
            proposals=self.proposals,
        )

    @classmethod
    def root_only(cls, tokens: torch.Tensor) -> DraftTree:
        """The tree without drafts: tokens ``[B, 1]``. Verifying it is a plain decoding step."""
        zeros = torch.zeros_like(tokens)
        ones = torch.ones(*tokens.shape, 1, dtype=torch.bool, device=tokens.device)
        return cls(tokens, zeros - 1, zeros, ones)

    @classmethod
    def from_token_paths(
        cls, root: int, paths: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> DraftTree:
        """The tree of one row (B = 1) whose nodes are the prefixes of ``paths``, tokens below the root.

        Raises:
            ValueError: if a path is empty.
        """
        if any(len(path) == 0 for path in paths):
            raise ValueError("A path needs at least one token below the root.")
        prefixes = {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}
        nodes = [(), *sorted(prefixes, key=lambda prefix: (len(prefix), prefix))]
        index = {prefix: node for node, prefix in enumerate(nodes)}
        parents = [-1, *(index[prefix[:-1]] for prefix in nodes[1:])]
        tokens = [root, *(prefix[-1] for prefix in nodes[1:])]
        parent_row = torch.tensor(parents, device=device)
        return cls(
            tokens=torch.tensor([tokens], device=device),
            parents=parent_row[None],
            depths=torch.tensor([[len(prefix) for prefix in nodes]], device=device),
            ancestors=ancestor_mask(parents).to(device)[None],
        )

    def child(self, row: int, node: int, token: torch.Tensor) -> torch.Tensor:
        """The child of ``node`` in ``row`` that carries ``token`` (a scalar tensor), -1 if none; a scalar, no sync."""
        hits = (self.parents[row] == node) & (self.tokens[row] == token)
        return torch.where(hits.any(), hits.int().argmax(), -1)


def ancestor_mask(parents: Sequence[int]) -> torch.Tensor:
    """``[N, N]`` bool for parents that precede their children (-1 for the root): row v marks root to v, v included.

    Raises:
        ValueError: if a parent does not precede its child.
    """
    size = len(parents)
    mask = torch.eye(size, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= node:
            raise ValueError(f"Node {node} comes before its parent {parent}; parents must precede children.")
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask
