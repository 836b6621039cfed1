"""From the committed text to a draft tree a row: fills a static tree, or grows a dynamic one, pass by pass.

Letters as in ``modeling_falcon_drafter.py``. With tokens t_0..t_n committed the target has given f_0..f_{n-1}; pairs
0..n-1 are known, and one pass over the last k of them gives f^_n..f^_{n+k-1} and so the laws of t_{n+1}..t_{n+k}. The
next pass hangs on the boundary nodes: its pairs are (f^, drafted token) along each node's own path, as are the LSTM
states it starts from. Every pass sees the pairs of the committed text, its path's earlier pairs, and its own block.

``tests/runtime/test_candidate_generator.py`` holds a tree step against running each path alone.

Device syncs per draft: none (``tests/runtime/test_drafting_syncs.py``), but one a pass where a dynamic tree has a
``pass_cost``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .draft_laws import DraftLaws
from .drafter_context import DrafterContext
from .dynamic_tree import DynamicTree, calibrated
from .few_rows import FewRowProducts
from .half_precision import has_dear_rows
from .machine_trees import MachineTrees
from .rejection import Proposals, SiblingDraws
from .suffix_lookup import SuffixLookup
from .tree import DraftTree
from .tree_growth import Growth, LevelLaws
from .tree_shape import DraftLevel, DraftPass, TreeShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .configuration_falcon_drafter import FalconDrafterConfig
    from .fusion import FusionState
    from .modeling_falcon_drafter import FalconDrafter


class FalconCandidateGenerator:
    """Drafts for all rows of one call of ``generate()``.

    Args:
        drafter: the drafter; its weights are read, nothing is written to it.
        target: gives embeddings and head rows.
        shape: the tree to fill or to grow; the config's by default, the paper's where the config has none.
        rows: B.

    Raises:
        ValueError: if the tree asks for more candidates than the draft vocabulary has tokens.
    """

    def __init__(
        self,
        drafter: FalconDrafter,
        target: PreTrainedModel,
        shape: TreeShape | DynamicTree | None = None,
        rows: int = 1,
    ) -> None:
        self.drafter = drafter
        self.target = target
        self.block_size = drafter.config.block_size
        self.shape = drafter_tree(drafter, target, rows) if shape is None else shape
        widest = self.shape.candidates
        drafted_over = drafter.config.draft_vocab_size or drafter.config.vocab_size
        if widest > drafted_over:
            raise ValueError(f"The tree has {widest} siblings, but the draft vocabulary only {drafted_over} tokens.")
        self.context = DrafterContext(drafter, target, rows)
        self._few_rows = FewRowProducts(drafter)
        self._draws: SiblingDraws | None = None
        calibration = self.shape.calibration if isinstance(self.shape, DynamicTree) else None
        self._calibration = None if calibration is None else calibration.tensors(self.context.device)
        self.lookup = drafter_lookup(drafter)
        if self.lookup is not None and not isinstance(self.shape, DynamicTree):
            if shape is None:
                raise ValueError(
                    "lookup joins its candidates into a dynamic tree by their scores: set the drafter config's tree to "
                    "one, such as {'kind': 'dynamic', 'nodes': 24}, or set lookup=None."
                )
            self.lookup = None  # a chain, for a target that verifies nothing else
        self._laws = DraftLaws(drafter, target)

    def append(self, features: torch.Tensor, tokens: torch.Tensor, lengths: list[int] | None = None) -> None:
        """Tell the drafter of committed pairs, see [`DrafterContext.append`]."""
        with self._few_rows:
            self.context.append(features, tokens, lengths)

    def draw_siblings(self, draws: SiblingDraws) -> None:
        """From now on draw siblings from the drafter's law, for the verifier ``rejection``, instead of ranking them.

        Raises:
            ValueError: if the tree is not one whose ranks can be the order drawn.
        """
        check_drawn_tree(self.shape)
        self._draws = draws

    def draft(self, root: torch.Tensor, max_depth: int, text: torch.Tensor | None = None) -> DraftTree:
        """Draft a tree a row on the last committed tokens.

        Args:
            root: ``[B, 1]`` the last committed tokens; their pairs must have been appended.
            max_depth: no node deeper than this; the root alone below 1.
            text: ``[B, T]`` prompt and text up to the root, -1 before shorter rows: read only if the config turns
                ``lookup`` on.

        Returns:
            The trees, on the root's device.
        """
        if max_depth < 1 or not self.context.is_ready:
            return DraftTree.root_only(root)
        own = root.to(self.context.device)
        with self._few_rows:
            if isinstance(self.shape, DynamicTree):
                tree = self._grow(own, self.shape, max_depth, text)
            else:
                tree = self._fill(own, self._plan(self.shape, min(max_depth, self.shape.depth)))
        self.context.forget_tree()
        return tree.to(root.device)

    def _fill(self, root: torch.Tensor, plan: _FilledShape) -> DraftTree:
        """A static tree: tokens for its nodes, pass by pass."""
        rows = root.shape[0]
        tokens = torch.empty(rows, plan.shape.size, dtype=torch.long, device=root.device)
        tokens[:, :1] = root
        features, states = self.context.first_pass()
        laws: list[torch.Tensor] = []
        for index, draft_pass in enumerate(plan.passes):
            if index > 0:
                features, states = self._next_pass(draft_pass, tokens, features, states)
            products = self._laws.products(features)
            for level in draft_pass.levels:
                logits = self._level_logits(products, features, level, tokens)
                tokens[:, level.first_node : level.end_node] = self._candidates(logits, level, laws)
        ids = self.drafter.draft_vocab_ids
        return DraftTree(
            proposals=Proposals(torch.cat(laws, dim=1), *plan.siblings, ids) if laws else None,
            tokens=tokens,
            parents=plan.parents.expand(rows, -1),
            depths=plan.depths.expand(rows, -1),
            ancestors=plan.ancestors.expand(rows, -1, -1),
        )

    def _grow(
        self, root: torch.Tensor, spec: DynamicTree, max_depth: int, text: torch.Tensor | None = None
    ) -> DraftTree:
        """A dynamic tree: its shape and its tokens, pass by pass."""
        k, rows, device = self.block_size, root.shape[0], root.device
        growth = Growth(rows, spec.nodes, device, None if self.drafter.correction is None else spec.continued)
        boundary = growth.root()
        row = torch.arange(rows, device=device)[:, None]
        seen = torch.ones(rows, 1, 0, dtype=torch.bool, device=device)  # [B, W, blocks of passes but the first]
        features, states = self.context.first_pass()
        for index in range(spec.passes):
            if index > 0:
                # The boundary's blocks see the blocks on their own path, and themselves.
                width = boundary.nodes.shape[1]
                own = torch.eye(width, dtype=torch.bool, device=device).expand(rows, -1, -1)
                seen = torch.cat((seen[row, boundary.blocks] if index > 1 else seen.expand(-1, width, -1), own), dim=2)
                features, states = self.context.tree_pass(
                    features.unflatten(1, (-1, k))[row, boundary.blocks].flatten(1, 2),
                    boundary.tokens.flatten(1),
                    self.context.states_of(states, boundary.blocks),
                    torch.arange((index - 1) * k, index * k, device=device).repeat(width),
                    seen.repeat_interleave(k, 1).repeat_interleave(k, 2),
                )
            start = index * k
            laws = self._level_laws(features.unflatten(1, (-1, k)), spec, index)
            last_level = growth.block_levels(boundary, laws, start, min(k, max_depth - start))
            # A tree of N nodes is no deeper than N.
            if index + 1 == spec.passes or min(max_depth, spec.nodes) <= start + k:
                break
            boundary = growth.next_boundary(*last_level, spec.width)
            if spec.pass_cost is not None and not growth.pays(boundary, index + 1, spec.pass_cost):
                break
        if self.lookup is not None and text is not None:
            chain = self.lookup.propose(text.to(device))
            growth.join(*(part[:, :max_depth] for part in chain))
        return growth.tree(root)

    def _level_laws(self, estimates: torch.Tensor, spec: DynamicTree, index: int) -> LevelLaws:
        """The laws of pass ``index`` from its estimates ``[B, W, k, H]``, for [`Growth.block_levels`]."""
        products = self._laws.products(estimates)
        if self.drafter.correction is None:  # all levels' at once
            chances, tokens = self._log_chances(products, spec, index, slice(None))
            return lambda level, _: (chances[:, :, level, None], tokens[:, :, level, None])

        def corrected(level: int, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            own = products[:, :, level, None]
            if before is not None:
                its = estimates[:, :, level, None].expand(-1, -1, before.shape[2], -1)
                own = self._laws.corrected(own, its, before)
            return self._log_chances(own, spec, index, slice(level, level + 1))

        return corrected

    def _log_chances(
        self, products: torch.Tensor, spec: DynamicTree, index: int, positions: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log chances and tokens ``[B, W, n, b]`` of the candidates of n products a block, of these positions."""
        logits = self._laws.logits(products).float()
        best, ranked = logits.topk(spec.candidates, dim=-1)
        chances = best - logits.logsumexp(-1, keepdim=True)
        if self._calibration is not None:
            points, tables = self._calibration
            chances = calibrated(chances, points, tables[min(index, len(tables) - 1), positions])
        ids = self.drafter.draft_vocab_ids
        return chances, ranked if ids is None else ids[ranked]

    def _plan(self, shape: TreeShape, depth: int) -> _FilledShape:
        """The tree cut at ``depth``, with its index tensors; made once a depth."""
        return _filled_shape(shape, depth, self.block_size, self.context.device, self.drafter.correction is not None)

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

    def _level_logits(
        self, products: torch.Tensor, features: torch.Tensor, level: DraftLevel, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Logits ``[B, L, draft vocabulary]`` of a level's laws, from its pass's features and their products."""
        if self.drafter.correction is not None:  # else the level has all laws of its pass
            products = products[:, level.rows]
        if level.parents is not None:
            products = self._laws.corrected(products, features[:, level.rows], tokens[:, level.parents])
        return self._laws.logits(products)

    def _candidates(self, logits: torch.Tensor, level: DraftLevel, laws: list[torch.Tensor]) -> torch.Tensor:
        """Tokens ``[B, M]`` of the level's nodes: the ranked, or drawn, candidates of their laws.

        Laws that were drawn from are put into ``laws``, ``[B, L, draft vocabulary]``.
        """
        if self._draws is None:
            ranked = logits.topk(level.candidates, dim=-1).indices
        else:
            ranked, law = self._draws.siblings(logits, level.candidates)
            laws.append(law)
        chosen = ranked[:, level.source, level.rank]
        ids = self.drafter.draft_vocab_ids
        return chosen if ids is None else ids[chosen]


def check_drawn_tree(shape: TreeShape | DynamicTree) -> None:
    """Refuse trees that the verifier ``rejection`` would get a wrong law from.

    Raises:
        ValueError: naming what to do.
    """
    if isinstance(shape, DynamicTree):
        raise ValueError(
            "The verifier 'rejection' needs a static tree: choosing among drawn siblings by their score would change "
            "the text's law. Set the drafter's config to verifier='follow', or give it a tree of paths."
        )
    known = set(shape.paths)
    for path in shape.paths:
        if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known:
            raise ValueError(
                "The verifier 'rejection' tries siblings in the order drawn, so their ranks must be 0, 1, 2, ...: the "
                f"tree has path {list(path)} without the sibling before it. Add it, or set verifier='follow'."
            )


@functools.lru_cache(maxsize=64)
def _filled_shape(shape: TreeShape, depth: int, block_size: int, device: torch.device, corrected: bool) -> _FilledShape:
    """A shape cut at ``depth``, filled once for all calls of ``generate()``."""
    return _FilledShape(shape.truncate(depth), block_size, device, corrected)


class _FilledShape:
    """A static tree's index tensors on one device."""

    def __init__(self, shape: TreeShape, block_size: int, device: torch.device, corrected: bool) -> None:
        self.shape = shape
        self.passes = shape.passes(block_size, device, corrected)
        self.parents = torch.tensor(shape.parents, device=device)[None]
        self.depths = torch.tensor(shape.depths, device=device)[None]
        self.ancestors = shape.ancestors().to(device)[None]
        self._device = device

    @functools.cached_property
    def siblings(self) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...]]:
        """Positions and children of all nodes, see [`Proposals`]."""
        children: list[list[int]] = [[] for _ in self.shape.parents]
        positions = [-1] * len(children)
        before = 0
        for level in (level for each in self.passes for level in each.levels):
            for node, source in zip(range(level.first_node, level.end_node), level.source.tolist(), strict=True):
                parent = self.shape.parents[node]
                children[parent].append(node)
                positions[parent] = before + source
            before += level.rows.shape[0]
        return tuple(positions), tuple(torch.tensor(nodes, dtype=torch.long, device=self._device) for nodes in children)


def drafter_lookup(drafter: FalconDrafter) -> SuffixLookup | None:
    """The second source of candidates that a drafter's config asks for, if any.

    Raises:
        ValueError: as [`SuffixLookup.from_config`].
    """
    lookup = drafter.config.lookup
    return None if lookup is None else SuffixLookup.from_config(lookup)


def config_tree(config: FalconDrafterConfig) -> TreeShape | MachineTrees:
    """The tree a config asks for: paths, dynamic trees for all machines and batches, or the paper's for its block size.

    Raises:
        ValueError: if it is none (see [`TreeShape.from_paths`] and [`MachineTrees.from_config`]).
    """
    if isinstance(config.tree, dict):
        return MachineTrees.from_config(config.tree, config.block_size)
    return TreeShape.paper(config.block_size) if config.tree is None else TreeShape.from_paths(config.tree)


def drafter_tree(drafter: FalconDrafter, target: PreTrainedModel, rows: int = 1) -> TreeShape | DynamicTree:
    """The tree that each row of a batch of ``rows`` gets with this target: of [`config_tree`], what is for it.

    Raises:
        ValueError: as [`config_tree`].
    """
    tree = config_tree(drafter.config)
    if isinstance(tree, MachineTrees):
        return tree.where(has_dear_rows(target.device, target.dtype)).for_rows(rows)
    return tree
