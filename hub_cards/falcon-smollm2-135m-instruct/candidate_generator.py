"""From the committed text to a draft tree: keeps the drafter's own context and fills a static tree, pass by pass.

Letters as in ``modeling_falcon_drafter.py``. With tokens t_0..t_n committed the target has given f_0..f_{n-1}; pairs
0..n-1 are known, and one pass over the last k of them gives f^_n..f^_{n+k-1} and so the laws of t_{n+1}..t_{n+k}. The
next pass hangs on the boundary nodes: its pairs are (f^, drafted token) along each node's own path, as are the LSTM
states it starts from. Every pass sees the pairs of the committed text, its path's earlier pairs, and its own block.

``tests/runtime/test_candidate_generator.py`` holds a tree step against running each path alone.

Device syncs per draft: none.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .drafter_context import DrafterContext
from .target import head_weight
from .tree import DraftTree
from .tree_shape import DraftPass, TreeShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_falcon_drafter import FalconDrafter, FusionState


class FalconCandidateGenerator:
    """Drafts for all rows of one call of ``generate()``.

    Args:
        drafter: the drafter; its weights are read, nothing is written to it.
        target: gives embeddings and head rows.
        shape: the static tree to fill; the config's by default, the paper's where the config has none.
        rows: B.

    Raises:
        ValueError: if the tree asks for more candidates than the draft vocabulary has tokens.
    """

    def __init__(
        self, drafter: FalconDrafter, target: PreTrainedModel, shape: TreeShape | None = None, rows: int = 1
    ) -> None:
        self.drafter = drafter
        self.target = target
        self.block_size = drafter.config.block_size
        self.shape = tree_shape(drafter) if shape is None else shape
        widest = max(path[-1] for path in self.shape.paths) + 1
        drafted_over = drafter.config.draft_vocab_size or drafter.config.vocab_size
        if widest > drafted_over:
            raise ValueError(f"The tree has {widest} siblings, but the draft vocabulary only {drafted_over} tokens.")
        self.context = DrafterContext(drafter, target, rows)
        self._head = drafter.draft_head(head_weight(target)).to(drafter.device, drafter.dtype)

    def append(self, features: torch.Tensor, tokens: torch.Tensor, lengths: list[int] | None = None) -> None:
        """Tell the drafter of committed pairs, see [`DrafterContext.append`]."""
        self.context.append(features, tokens, lengths)

    def draft(self, root: torch.Tensor, max_depth: int) -> DraftTree:
        """Draft a tree a row on the last committed tokens.

        Args:
            root: ``[B, 1]`` the last committed tokens; their pairs must have been appended.
            max_depth: no node deeper than this; the root alone below 1.

        Returns:
            The trees, on the root's device.
        """
        plan = self._plan(min(max_depth, self.shape.depth))
        if plan is None or not self.context.is_ready:
            return DraftTree.root_only(root)
        rows, device = root.shape[0], self.context.device
        tokens = torch.empty(rows, plan.shape.size, dtype=torch.long, device=device)
        tokens[:, :1] = root
        features, states = self.context.first_pass()
        for index, draft_pass in enumerate(plan.passes):
            if index > 0:
                features, states = self._next_pass(draft_pass, tokens, features, states)
            tokens[:, draft_pass.first_node : draft_pass.end_node] = self._candidates(features, draft_pass)
        self.context.forget_tree()
        device = root.device
        return DraftTree(
            tokens=tokens.to(device),
            parents=plan.parents.to(device).expand(rows, -1),
            depths=plan.depths.to(device).expand(rows, -1),
            ancestors=plan.ancestors.to(device).expand(rows, -1, -1),
        )

    def _plan(self, depth: int) -> _FilledShape | None:
        """The tree cut at ``depth``, with its index tensors; made once a depth."""
        return _filled_shape(self.shape, depth, self.block_size, self.context.device) if depth >= 1 else None

    def _next_pass(
        self, draft_pass: DraftPass, tokens: torch.Tensor, features: torch.Tensor, states: FusionState | None
    ) -> tuple[torch.Tensor, FusionState | None]:
        """Query the blocks that hang on the boundary nodes: ``[B, W * k, H]`` features and B * W states."""
        return self.context.tree_pass(
            features[:, draft_pass.row_features],
            tokens[:, draft_pass.row_nodes],
            self.context.states_of(states, draft_pass.parent_block),
            draft_pass.row_positions,
            draft_pass.visible,
        )

    def _candidates(self, features: torch.Tensor, draft_pass: DraftPass) -> torch.Tensor:
        """Tokens ``[B, M]`` of the pass's nodes: the ranked candidates of their laws."""
        logits = self.drafter.logits(features, self._head)  # [B, W * k, draft vocabulary]
        ranked = logits.topk(draft_pass.candidates, dim=-1).indices
        chosen = ranked[:, draft_pass.source, draft_pass.rank]
        ids = self.drafter.draft_vocab_ids
        return chosen if ids is None else ids[chosen]


@functools.lru_cache(maxsize=64)
def _filled_shape(shape: TreeShape, depth: int, block_size: int, device: torch.device) -> _FilledShape:
    """A shape cut at ``depth``, filled once for all calls of ``generate()``."""
    return _FilledShape(shape.truncate(depth), block_size, device)


class _FilledShape:
    """A static tree's index tensors on one device."""

    def __init__(self, shape: TreeShape, block_size: int, device: torch.device) -> None:
        self.shape = shape
        self.passes = shape.passes(block_size, device)
        self.parents = torch.tensor(shape.parents, device=device)[None]
        self.depths = torch.tensor(shape.depths, device=device)[None]
        self.ancestors = shape.ancestors().to(device)[None]


def tree_shape(drafter: FalconDrafter) -> TreeShape:
    """The static tree a drafter's config asks for.

    Raises:
        ValueError: if the config's paths are not a tree (see [`TreeShape.from_paths`]).
    """
    paths = drafter.config.tree
    return TreeShape.paper(drafter.config.block_size) if paths is None else TreeShape.from_paths(paths)
