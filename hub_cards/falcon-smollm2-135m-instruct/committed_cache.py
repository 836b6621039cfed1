"""What the target's cache holds of the committed text: a round's tokens kept, its other nodes dropped, errors undone.

Invariant, held by ``tests/runtime/test_final_cache.py``: after [`CommittedCache.keep`] the cache holds, for each row,
the committed tokens but the last, each with the keys and values that decoding one token at a time would have left.

Masks go by the validity and the places of slots (see ``target_slots.py``), so holes cost room and nothing else;
[`CommittedCache.compact`] closes them when they are many, and at the end. Device syncs: none in a round of one row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .host_values import on_device
from .target_slots import CachedSlots

# Holes beyond this share of a batch's slots are closed; closing costs a copy of the generated part of the cache.
_WASTE_SHARE = 0.25
# So the slots of a batch are at most this many times its longest row's.
HOLES = 2


class CommittedCache:
    """The cache of a batch, behind its prompt.

    Attributes:
        cache: the target's, of transformers.
        slots: which of its slots hold text.
    """

    def __init__(self, cache: Any, slots: CachedSlots) -> None:
        self.cache, self.slots = cache, slots

    def keep(self, paths: list[list[int]], nodes: int) -> None:
        """Keep the verified nodes of each row (ascending, from the root on) of a tree of ``nodes``, drop the others.

        A finished row has an empty path: it adds nothing valid, and its position stays.
        """
        lengths = [len(path) for path in paths]
        kept = max(lengths)
        if any(path != list(range(len(path))) for path in paths):  # else they lie where they belong
            padded = [path + [0] * (kept - len(path)) for path in paths]
            self._gather(self.slots.length + nodes, nodes, on_device(padded, self.slots.valid.device))
        self.cache.crop(kept - nodes)
        self.slots.add(lengths)

    @contextlib.contextmanager
    def whole_on_error(self) -> Iterator[None]:
        """Around a round, to the end of [`keep`]: an error in it leaves all layers as they were before.

        Wherever it comes: when some layers have the tree already and others not, or some have dropped it.
        """
        # A convolution's states are replaced, not written to, while drafts may have to be dropped.
        states = [(layer, dict(layer.conv_states)) for layer in self.cache.layers if hasattr(layer, "conv_states")]
        try:
            yield
        except BaseException:
            self._cut(self.slots.length)
            for layer, before in states:
                layer.conv_states.update(before)
            raise

    def _cut(self, length: int) -> None:
        """Leave no attention layer with more than ``length`` slots."""
        for layer in self.cache.layers:
            ahead = int(layer.get_seq_length()) - length if isinstance(layer, CacheLayerMixin) else 0
            if ahead > 0:
                layer.crop(-ahead)

    def make_room(self, nodes: int) -> None:
        """Compact a batch whose holes waste a quarter of its slots, or a static cache that a tree would overflow."""
        if len(self.slots.filled) == 1:
            return  # no holes
        static = [layer.max_cache_len for layer in self.cache.layers if isinstance(layer, StaticLayer)]
        tight = any(room < self.slots.length + nodes for room in static)
        if tight or self.slots.wasted > self.slots.length * _WASTE_SHARE:
            self.compact()

    def compact(self) -> None:
        """Close the holes behind the prompt: each row's tokens one behind the other, as plain decoding lays them."""
        order = self.slots.without_holes()
        if order is None:
            return
        region = self.slots.length - self.slots.prompt
        try:
            self._gather(self.slots.length, region, order)
            self.cache.crop(order.shape[1] - region)
        except BaseException:
            self._cut(self.slots.prompt)  # some layers have other slots than the rest, but all have the prompt
            raise
        self.slots.close_holes(order)

    def _gather(self, slots: int, region: int, index: torch.Tensor) -> None:
        """In the last ``region`` of the cache's ``slots``, put those at ``index`` ``[B, n]`` (from its start) first."""
        prefetched = getattr(self.cache, "prefetch_stream", None)
        if prefetched is not None:  # an offloaded cache: the first layer is on its way back
            torch.cuda.current_stream(index.device).wait_stream(prefetched)
        for layer in self.cache.layers:
            if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized or layer.keys is None:
                continue  # shared keys and values: another layer holds them
            # Sliding layers hold the last slots only, static ones have more than are used.
            used = slots if isinstance(layer, StaticLayer) else layer.keys.shape[-2]
            start = used - region
            for tensor in (layer.keys, layer.values):  # [B, heads, slots, width]
                rows = (start + index.to(tensor.device))[:, None, :, None]
                rows = rows.expand(-1, tensor.shape[1], -1, tensor.shape[-1])
                # Gathering copies before the assignment, so overlapping slots are safe.
                tensor[:, :, start : start + index.shape[1]] = tensor.gather(2, rows)
