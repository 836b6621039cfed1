"""Verification by ``follow``: the target's own choice walks the tree. Lossless by construction, knows no model.

The root is visited first. At each visited node the target's (processed) law at that node chooses the next token, by
argmax or by one draw; while that token is a child, the walk descends. So every emitted token was chosen from exactly
the law that decoding one token at a time would have used, with exactly one draw each, in the same order; the tree only
decides how many fit in one target forward. Proof and alternatives: SpecInfer's and Sequoia's rejection rules need the
proposal's law, ``follow`` does not, and is optimal for a fixed set of children.

``tests/runtime/test_verification.py`` holds both functions against the definition, by enumeration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .tree import DraftTree


def follow_greedy(tree: DraftTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The greedy walk of all rows at once, by tensor operations; no device sync.

    Args:
        tree: N nodes, the root included.
        logits: ``[B, N, V]``, the target's, unprocessed.

    Returns:
        ``path`` ``[B, N]``: visited nodes from the root on, filled up with N;
        ``tokens`` ``[B, N]``: the token emitted at each visited node, garbage beyond;
        ``visited`` ``[B]``: how many nodes were visited, which is the accepted drafts and one.
    """
    chosen = logits.max(-1).indices  # [B, N]; the first of equals, as argmax, which takes a CPU three times as long
    parents = tree.parents.clamp_min(0)
    matches = (tree.tokens == chosen.gather(1, parents)) | (tree.depths == 0)
    # A node is accepted iff it and all its ancestors match; those nodes are one path, because siblings differ.
    accepted = ~(tree.ancestors & ~matches[:, None]).any(-1)
    deepest = torch.where(accepted, tree.depths, -1).argmax(-1)  # [B]
    on_path = tree.ancestors[torch.arange(tree.tokens.shape[0], device=deepest.device), deepest]  # [B, N]
    nodes = torch.arange(tree.size, device=deepest.device)
    path = torch.where(on_path, nodes, tree.size).sort(-1).values
    tokens = chosen.gather(1, path.clamp_max(tree.size - 1))
    return path, tokens, on_path.sum(-1)


def follow(
    tree: DraftTree, row: int, choose: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[list[int], bool]:
    """The lazy walk of one row: each visited node is chosen from once, in order, and no other node is looked at.

    Args:
        tree: the tree.
        row: the batch row.
        choose: called with a visited node; returns the token chosen there (a scalar tensor) and whether the text
            ends with it (a scalar bool tensor). It sees the nodes in the order of the text.

    Returns:
        The visited nodes, root first, and whether the text has ended. One device sync a visited node.
    """
    path, node, over = [], 0, False
    while node >= 0 and not over:
        path.append(node)
        token, ended = choose(node)
        child = tree.child(row, node, token.to(tree.tokens.device))
        node, over = torch.stack((child, ended.to(child))).tolist()
    return path, bool(over)
