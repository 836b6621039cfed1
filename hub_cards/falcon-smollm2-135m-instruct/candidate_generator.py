"""From the committed text to a draft tree: keeps the drafter's own context and fills a static tree, pass by pass.

Letters as in ``modeling_falcon_drafter.py``. With tokens t_0..t_n committed the target has given f_0..f_{n-1}; pairs
0..n-1 are known, and one pass over the last k of them gives f^_n..f^_{n+k-1} and so the laws of t_{n+1}..t_{n+k}. The
next pass hangs on the boundary nodes: its pairs are (f^, drafted token) along each node's own path, as are the LSTM
states it starts from. Every pass sees the pairs of the committed text, its path's earlier pairs, and its own block.

``tests/runtime/test_candidate_generator.py`` holds a tree step against running each path alone.

Device syncs per draft: none.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .modeling_falcon_drafter import DrafterCache, FusionState
from .target import head_weight, input_embeddings
from .tree import DraftTree
from .tree_shape import DraftPass, TreeShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_falcon_drafter import FalconDrafter


class FalconCandidateGenerator:
    """Drafts for one row of one call of ``generate()``; [`for_rows`] makes one for each row of a batch.

    Args:
        drafter: the drafter; its weights are read, nothing is written to it.
        target: gives embeddings and head rows.
        shape: the static tree to fill; the config's by default, the paper's where the config has none.

    Raises:
        ValueError: if the tree asks for more candidates than the draft vocabulary has tokens.
    """

    def __init__(self, drafter: FalconDrafter, target: PreTrainedModel, shape: TreeShape | None = None) -> None:
        self.drafter = drafter
        self.target = target
        self.block_size = drafter.config.block_size
        self.shape = tree_shape(drafter) if shape is None else shape
        widest = max(path[-1] for path in self.shape.paths) + 1
        drafted_over = drafter.config.draft_vocab_size or drafter.config.vocab_size
        if widest > drafted_over:
            raise ValueError(f"The tree has {widest} siblings, but the draft vocabulary only {drafted_over} tokens.")
        self._device, self._dtype = drafter.device, drafter.dtype
        self._head = drafter.draft_head(head_weight(target)).to(self._device, self._dtype)
        self._forget()

    def for_rows(self, rows: int) -> list[FalconCandidateGenerator]:
        """This generator and as many like it as make ``rows``, each with a context of its own; they share the head."""
        others = [copy.copy(self) for _ in range(rows - 1)]
        for other in others:
            other._forget()
        return [self, *others]

    def _forget(self) -> None:
        """Start a context: nothing but the start pairs."""
        drafter = self.drafter
        self._cache = DrafterCache(len(drafter.layers))
        self._state: FusionState | None = None
        self._columns = 0
        # Fused pairs from the column the cache ends at, at least the last k of them.
        self._recent = torch.empty(1, 0, drafter.config.hidden_size, device=self._device, dtype=self._dtype)
        zeros = drafter.start_pairs(self._recent)
        self._append(zeros, zeros)

    def append(self, features: torch.Tensor, tokens: torch.Tensor) -> None:
        """Tell the drafter of committed pairs: ``[1, S, H]`` features f_i and ``[1, S]`` tokens t_{i+1}."""
        embeddings = input_embeddings(self.target, tokens)
        features = self.drafter.combine(features.to(self._device, self._dtype))
        self._append(features, embeddings.to(self._device, self._dtype))

    def _append(self, features: torch.Tensor, embeddings: torch.Tensor) -> None:
        if features.shape[1] == 0:
            return
        fused, self._state = self.drafter.fusion(features, embeddings, self._state)
        self._columns += fused.shape[1]
        wanted = max(self.block_size, self._columns - self._cache.length)
        self._recent = torch.cat((self._recent, fused), dim=1)[:, -wanted:]

    def draft(self, root: torch.Tensor, max_depth: int) -> DraftTree:
        """Draft a tree on the last committed token.

        Args:
            root: ``[1, 1]`` the last committed token; its pair must have been appended.
            max_depth: no node deeper than this; the root alone below 1.

        Returns:
            The tree, on the root's device.
        """
        plan = self._plan(min(max_depth, self.shape.depth))
        if plan is None or self._columns < self.block_size:
            return DraftTree.root_only(root)
        tokens = torch.empty(1, plan.shape.size, dtype=torch.long, device=self._device)
        tokens[:, :1] = root
        features, states = self._first_pass()
        for index, draft_pass in enumerate(plan.passes):
            if index > 0:
                features, states = self._next_pass(draft_pass, tokens, features, states)
            tokens[:, draft_pass.first_node : draft_pass.end_node] = self._candidates(features, draft_pass)
        self._cache.crop(self._columns)
        device = root.device
        return DraftTree(tokens.to(device), plan.parents.to(device), plan.depths.to(device), plan.ancestors.to(device))

    def _plan(self, depth: int) -> _FilledShape | None:
        """The tree cut at ``depth``, with its index tensors; made once a depth."""
        return _filled_shape(self.shape, depth, self.block_size, self._device) if depth >= 1 else None

    def _first_pass(self) -> tuple[torch.Tensor, FusionState | None]:
        """Query the last k committed pairs: ``[1, k, H]`` features and the state behind them."""
        fused, k = self._recent, self.block_size
        rows, start = fused.shape[1], self._columns - fused.shape[1]
        self._cache.crop(start)  # the last k are written again, because their block is another one now
        positions = torch.arange(start, self._columns, device=self._device)
        # Blocks are counted back from the newest pair; block(j) <= block(i) is the relaxed causal mask. One layer needs
        # only the queries' rows of it, more layers all new rows.
        blocks = (torch.arange(self._columns, device=self._device) - self._columns) // k
        mask = blocks <= blocks[-k if len(self.drafter.layers) == 1 else start :, None]
        features = self.drafter.decode(fused, positions[None], mask[None, None], queries=k, cache=self._cache)
        self._cache.advance(rows)
        self._recent = fused[:, -k:]
        return features, self._state

    def _next_pass(
        self, draft_pass: DraftPass, tokens: torch.Tensor, features: torch.Tensor, states: FusionState | None
    ) -> tuple[torch.Tensor, FusionState | None]:
        """Query the blocks that hang on the boundary nodes: ``[1, W * k, H]`` features and W states."""
        k, blocks = self.block_size, draft_pass.parent_block.shape[0]
        pairs = features[0, draft_pass.row_features].view(blocks, k, -1)
        embeddings = input_embeddings(self.target, tokens[0, draft_pass.row_nodes]).to(pairs.device, pairs.dtype)
        if states is not None:
            states = (states[0][:, draft_pass.parent_block], states[1][:, draft_pass.parent_block])
        fused, states = self.drafter.fusion(pairs, embeddings.view(blocks, k, -1), states)
        fused = fused.reshape(1, blocks * k, -1)
        mask = F.pad(draft_pass.visible, (self._columns, 0), value=True)
        positions = self._columns + draft_pass.row_positions
        features = self.drafter.decode(fused, positions[None], mask[None, None], cache=self._cache)
        self._cache.advance(blocks * k)
        return features, states

    def _candidates(self, features: torch.Tensor, draft_pass: DraftPass) -> torch.Tensor:
        """Tokens ``[1, M]`` of the pass's nodes: the ranked candidates of their laws."""
        logits = self.drafter.logits(features[0], self._head)  # [W * k, draft vocabulary]
        ranked = logits.topk(draft_pass.candidates, dim=-1).indices
        chosen = ranked[draft_pass.source, draft_pass.rank]
        ids = self.drafter.draft_vocab_ids
        return (chosen if ids is None else ids[chosen])[None]


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
