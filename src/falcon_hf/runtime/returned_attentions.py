"""The attentions that plain decoding would have returned, from the attentions of a verified tree.

A node's attention row has a column for each cached slot and one for each node of its tree; plain decoding's row at that
token has one for each slot of the text so far. So the columns of the text and of the node's own path are gathered, in
order; all others are zeros, because the mask hid them. Layers that hold a window only, and static layers, give plain
decoding rows of another width: [`PlainRows`] notes the widths from the cache that ``generate()`` made, before Falcon
takes another one with room for a tree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin, StaticLayer


class PlainRows:
    """How wide plain decoding's attention rows are, layer by layer."""

    def __init__(self, cache: Any, layers: int) -> None:
        """Note the layout of ``cache``, as ``generate()`` made it, for ``layers`` layers."""
        # A dynamic cache may make its layers on the way; those hold everything. Convolutions have no attentions.
        known = [_layout(layer) for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
        self._layouts = known or [(None, None)] * layers

    def prompt(self, attentions: Any) -> Any:
        """The prefill's attentions ``[B, heads, P, width]`` a layer, without the columns of a tree's room.

        Rows of padding say nothing: they are uniform over the cache, whose width differs from plain decoding's.
        """
        if not attentions:
            return attentions  # sdpa computes none, and plain decoding returns empty tuples
        return tuple(
            layer if static is None else self._static_prompt(layer, window, static)
            for layer, (window, static) in zip(attentions, self._layouts, strict=True)
        )

    def _static_prompt(self, layer: torch.Tensor, window: int | None, static: int) -> torch.Tensor:
        """A static sliding layer shows a prompt longer than its window whole, all others their full width."""
        return layer[..., : static if window is None else max(static, layer.shape[2])]

    def token(self, attentions: Any, row: int, node: int, columns: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One node's rows ``[1, heads, 1, width]`` a layer, as wide as plain decoding's.

        Args:
            attentions: the verification's, ``[B, heads, N, columns]`` a layer.
            row: the batch row.
            node: the node.
            columns: for each layer, the columns of the row's text and of the node's path, in order.
        """
        if not attentions:
            return ()
        rows = []
        for layer, chosen, (window, static) in zip(attentions, columns, self._layouts, strict=True):
            attention = layer[row : row + 1, :, node : node + 1, chosen.to(layer.device)]
            if window is not None:
                attention = attention[..., -window:]
            if static is not None:
                attention = F.pad(attention, (0, static - attention.shape[-1]))
            rows.append(attention)
        return tuple(rows)


def _layout(layer: Any) -> tuple[int | None, int | None]:
    """(window or None, static width or None) of a cache layer."""
    static = layer.max_cache_len if isinstance(layer, StaticLayer) else None
    if not getattr(layer, "is_sliding", False):
        return None, static
    return static if static is not None else layer.sliding_window, static
