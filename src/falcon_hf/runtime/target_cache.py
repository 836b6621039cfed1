"""Key-value caches that a tree can live in: room for its nodes, and no eviction while rows of a batch are ragged."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticLayer


def fitting_cache(cache: Any, rows: int, slots: int) -> Any:
    """The cache itself if a tree fits in, else one of the same kind that fits, if it was ``generate()`` who made it.

    A static cache is made for the text alone; verification wants the tree's nodes beside it, in layers that keep
    everything, sliding ones too (the masks hold the window). Sliding dynamic layers count slots, so that the holes
    between the rows of a batch would make them drop tokens that are still in the window.

    Args:
        cache: as ``generate()`` prepared it.
        rows: B.
        slots: what a static cache must hold: the longest text and one tree.

    Raises:
        ValueError: if the cache is the user's, or holds something already, and does not fit.
    """
    replaceable = not getattr(cache, "_is_user_defined", False) and int(cache.get_seq_length()) == 0
    static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    if any(layer.is_sliding or layer.max_cache_len < slots for layer in static):
        if not all(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
            raise ValueError(
                "A static cache with convolution states in it has no room for drafts: drop cache_implementation, or "
                "generate without assistant_model."
            )
        if replaceable:
            layers = [StaticLayer(max_cache_len=slots) for _ in cache.layers]
            return Cache(layers=layers, offloading=getattr(cache, "offloading", False))
        raise ValueError(
            f"The static cache is too small for the text and a draft tree: make it "
            f"Cache(layers=[StaticLayer(max_cache_len={slots}), ...]), one layer per layer of the target, or drop it."
        )
    if rows > 1 and not static and any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        if replaceable:
            return DynamicCache(offloading=getattr(cache, "offloading", False))
        raise ValueError(
            "More than one row does not go with a sliding-window cache that is already in use or was given: pass "
            "past_key_values=DynamicCache(), or generate the rows one by one."
        )
    return cache
