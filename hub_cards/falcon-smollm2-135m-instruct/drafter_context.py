"""What the drafter knows of the committed text, for all rows of a batch: fused pairs, LSTM states, keys and values.

Letters as in ``modeling_falcon_drafter.py``. Rows differ in length and advance by different numbers of tokens, so a
row has its own number C of pair columns. In the drafter's cache a row's column c lies in slot c, behind the longest
row's come the drafted rows of a round, in the same slots for all. Blocks are counted back from each row's own newest
pair: block(c) = (c - C) // k. Columns that a row does not have would be in block 0 or later, so the relaxed causal
mask hides them, and no row ever sees another one's length.

``tests/runtime/test_batched_drafting.py`` holds a batch against its rows drafted one by one. One row takes the path
without gathers and scatters.

Device syncs: none, but for one in taking in a batch with an LSTM fusion, where torch copies the order of the rows. The
lengths are the host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .drafter_cache import DrafterCache
from .host_values import on_device
from .target import input_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .fusion import FusionState
    from .modeling_falcon_drafter import FalconDrafter


class DrafterContext:
    """Committed pairs of ``rows`` rows, and the drafter's passes over them.

    Attributes:
        columns: C of each row, start pairs included.
    """

    def __init__(self, drafter: FalconDrafter, target: PreTrainedModel, rows: int = 1) -> None:
        """Start with nothing but the start pairs."""
        self.drafter = drafter
        self.target = target
        self.rows = rows
        self.device, self.dtype = drafter.device, drafter.dtype
        self.columns = [0] * rows
        self._cache = DrafterCache(len(drafter.layers))
        self._cached = [0] * rows
        self._state: FusionState | None = None
        # Each row's last R fused pairs, at least k and those the cache does not have; garbage before, if a row has
        # fewer.
        self._recent = torch.empty(rows, 0, drafter.config.hidden_size, device=self.device, dtype=self.dtype)
        zeros = drafter.start_pairs(self._recent)
        self._append(zeros, zeros, None)

    @property
    def is_ready(self) -> bool:
        """Whether every row fills a block."""
        return min(self.columns) >= self.drafter.config.block_size

    def append(self, features: torch.Tensor, tokens: torch.Tensor, lengths: list[int] | None = None) -> None:
        """Take in committed pairs: ``[B, S, W]`` features f_i and ``[B, S]`` tokens t_{i+1}.

        W is H, or H times the feature layers.
        ``lengths`` says how many of the S each row has, from the first on; all of them by default.
        """
        embeddings = input_embeddings(self.target, tokens)
        features = self.drafter.combine(features.to(self.device, self.dtype))
        self._append(features, embeddings.to(self.device, self.dtype), lengths)

    def _append(self, features: torch.Tensor, embeddings: torch.Tensor, lengths: list[int] | None) -> None:
        added = features.shape[1]
        if added == 0:
            return
        if lengths is not None and min(lengths) == added:
            lengths = None
        before = self._state
        padded = None if lengths is None else [max(length, 1) for length in lengths]
        fused, self._state = self.drafter.fusion(features, embeddings, before, padded)
        if lengths is None:
            lengths = [added] * self.rows
        elif before is not None and self._state is not None and min(lengths) == 0:
            moved = on_device(lengths, self.device)[:, None] > 0
            (hidden, cell), (old_hidden, old_cell) = self._state, before
            self._state = torch.where(moved, hidden, old_hidden), torch.where(moved, cell, old_cell)
        self.columns = [columns + length for columns, length in zip(self.columns, lengths, strict=True)]
        wanted = max(self._due())
        if self.rows == 1:
            self._recent = torch.cat((self._recent, fused), dim=1)[:, -wanted:]
            return
        ends = self._recent.shape[1] + on_device(lengths, self.device)
        index = ends[:, None] - wanted + torch.arange(wanted, device=self.device)
        joined = torch.cat((self._recent, fused), dim=1)
        self._recent = joined.gather(1, index.clamp_min(0)[:, :, None].expand(-1, -1, joined.shape[2]))

    def _due(self) -> list[int]:
        """How many of its last pairs each row's next pass runs over: the last k, and all that are not in the cache."""
        k = self.drafter.config.block_size
        return [max(k, columns - cached) for columns, cached in zip(self.columns, self._cached, strict=True)]

    def first_pass(self) -> tuple[torch.Tensor, FusionState | None]:
        """Query each row's last k committed pairs: ``[B, k, H]`` features, and the states behind them."""
        fused, k = self._recent, self.drafter.config.block_size
        if self.rows == 1:
            positions, mask = self._one_row()
        else:
            positions, mask = self._many_rows()
        features = self.drafter.decode(fused, positions, mask[:, None], queries=k, cache=self._cache)
        self._cache.advance(fused.shape[1])
        self._cached = self.columns
        self._recent = fused[:, -k:]
        return features, self._state

    def _one_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions ``[1, R]`` and mask ``[1, k or R, C]`` of a first pass over one row; makes room in the cache."""
        k, (end,) = self.drafter.config.block_size, self.columns
        start = end - self._recent.shape[1]
        self._cache.crop(start)  # the last k are written again, because their block is another one now
        positions = torch.arange(start, end, device=self.device)
        # block(j) <= block(i) is the relaxed causal mask. One layer needs only the queries' rows of it, more layers
        # all new rows.
        blocks = (torch.arange(end, device=self.device) - end) // k
        mask = blocks <= blocks[-k if len(self.drafter.layers) == 1 else start :, None]
        return positions[None], mask[None]

    def _many_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions ``[B, R]`` and mask ``[B, R, longest C]`` of a first pass; says which slots it writes to."""
        k, end = self.drafter.config.block_size, max(self.columns)
        width = self._recent.shape[1]
        columns = on_device(self.columns, self.device)[:, None]
        garbage = width - on_device(self._due(), self.device)[:, None]
        offsets = torch.arange(width, device=self.device)
        positions = columns - width + offsets
        # Columns in front of those that a row is due: they are there only because other rows have more. They go where
        # nothing is read before it is written again.
        self._cache.place(torch.where(offsets < garbage, end + offsets, positions), end)
        slots = torch.arange(end, device=self.device)
        mask = ((slots - columns) // k)[:, None] <= ((offsets - width) // k)[:, None]
        # All real columns see slot 0; so do the others, because a softmax over nothing would not be finite.
        return positions.clamp_min(0), mask | (slots == 0)

    def tree_pass(
        self,
        pairs: torch.Tensor,
        tokens: torch.Tensor,
        states: FusionState | None,
        positions: torch.Tensor,
        visible: torch.Tensor,
    ) -> tuple[torch.Tensor, FusionState | None]:
        """Query W blocks a row that hang on drafted nodes.

        Args:
            pairs: ``[B, W * k, H]``, the features f^ of the blocks' pairs.
            tokens: ``[B, W * k]``, the drafted tokens of those pairs.
            states: ``[layers, B * W, H]`` each, the state that each block starts from; None without recurrence.
            positions: ``[W * k]``, the pairs' columns, counted from the first behind the committed ones.
            visible: ``[W * k, J]`` or ``[B, W * k, J]`` bool, which of the J rows of the tree's passes so far (the
                first left out, these W * k last) each row sees.

        Returns:
            ``[B, W * k, H]`` features, and the states behind the blocks, ``[layers, B * W, H]`` each.
        """
        k, size = self.drafter.config.block_size, pairs.shape[1]
        embeddings = input_embeddings(self.target, tokens).to(self.device, self.dtype)
        blocks = (self.rows * size // k, k, -1)
        fused, states = self.drafter.fusion(pairs.reshape(blocks), embeddings.reshape(blocks), states)
        fused = fused.reshape(self.rows, size, -1)
        committed = max(self.columns)
        if self.rows == 1:
            places = (committed + positions)[None]
            mask = F.pad(visible.view(1, size, -1), (committed, 0), value=True)
        else:
            columns = on_device(self.columns, self.device)[:, None]
            places = columns + positions
            own = torch.arange(committed, device=self.device) < columns
            mask = torch.cat(
                (
                    own[:, None].expand(-1, size, -1),
                    visible.view(-1, size, visible.shape[-1]).expand(self.rows, -1, -1),
                ),
                dim=-1,
            )
        features = self.drafter.decode(fused, places, mask[:, None], cache=self._cache)
        self._cache.advance(size)
        return features, states

    def states_of(self, states: FusionState | None, blocks: torch.Tensor) -> FusionState | None:
        """The states behind ``blocks`` of the pass before: ``[W]`` for all rows, or ``[B, W]``; laid out as before."""
        if states is None:
            return None
        hidden, cell = states
        return self._states_of(hidden, blocks), self._states_of(cell, blocks)

    def _states_of(self, part: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        by_row = part.view(part.shape[0], self.rows, -1, part.shape[-1])
        if blocks.dim() == 1:
            return by_row[:, :, blocks].flatten(1, 2)
        rows = torch.arange(self.rows, device=blocks.device)[:, None]
        return by_row[:, rows, blocks].flatten(1, 2)

    def forget_tree(self) -> None:
        """Drop the tree's passes from the cache."""
        self._cache.crop(max(self.columns))
