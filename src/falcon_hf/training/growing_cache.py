"""A key-value cache that grows in place, and whose rows can be replaced: what a batch with changing rows needs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_STEP = 32


class GrowingLayer(DynamicLayer):
    """A ``DynamicLayer`` with room behind its end, so that a new token copies itself and nothing else.

    What attention gets is the whole store, empty slots at its end, which the mask hides (``get_mask_sizes``): a CPU's
    batched products of bfloat16 copy whatever is not contiguous, which costs more than the few empty slots.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _key_store: torch.Tensor | None = None
    _value_store: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, heads, S, d]`` keys and values; returns the stores ``[B, heads, slots, d]``.

        The first tokens come back alone, as masks are made for them before there are layers.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        if self._key_store is None or self._value_store is None or end > self._key_store.shape[-2]:
            self._key_store = _roomier(self.keys, key_states, used, _slots(end))
            self._value_store = _roomier(self.values, value_states, used, _slots(end))
        self._key_store[:, :, used:end] = key_states
        self._value_store[:, :, used:end] = value_states
        self.keys, self.values = self._key_store[:, :, :end], self._value_store[:, :, :end]
        return (self._key_store, self._value_store) if used else (self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that attention gets after ``query_length`` more tokens, and the offset 0."""
        used = self.get_seq_length()
        return (_slots(used + query_length) if used else query_length), 0

    def replace_rows(self, kept: torch.Tensor, first_slot: int, new: GrowingLayer | None) -> None:
        """Of one layer, what [`GrowingCache.replace_rows`] does to all."""
        used = max(self.get_seq_length() - first_slot, 0 if new is None else new.get_seq_length())
        self._key_store = _joined(self.keys[:, :, first_slot:], kept, None if new is None else new.keys, used)
        self._value_store = _joined(self.values[:, :, first_slot:], kept, None if new is None else new.values, used)
        self.keys, self.values = self._key_store[:, :, :used], self._value_store[:, :, :used]


def _slots(tokens: int) -> int:
    """Slots in a store for so many tokens: the next multiple of 32."""
    return -(-tokens // _STEP) * _STEP


def _roomier(held: torch.Tensor, like: torch.Tensor, used: int, slots: int) -> torch.Tensor:
    """Zeros ``[B, heads, slots, d]`` that begin with the ``used`` slots of ``held``."""
    store = like.new_zeros((*like.shape[:2], slots, like.shape[3]))
    if used:
        store[:, :, :used] = held
    return store


def _joined(held: torch.Tensor, kept: torch.Tensor, new: torch.Tensor | None, used: int) -> torch.Tensor:
    """A store ``[n, heads, slots, d]``: the ``kept`` rows of ``held``, then those of ``new``; all end at ``used``."""
    rows = len(kept) + (0 if new is None else new.shape[0])
    store = held.new_zeros((rows, held.shape[1], _slots(used), held.shape[3]))
    store[: len(kept), :, used - held.shape[2] : used] = held[kept]
    if new is not None:
        store[len(kept) :, :, used - new.shape[2] : used] = new
    return store


class GrowingCache(Cache):
    """Growing layers, as many as the target asks for; nothing is ever evicted, masks do what windows need."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def replace_rows(self, kept: torch.Tensor, first_slot: int, new: GrowingCache | None) -> None:
        """Drop rows and leading slots, and add the rows of another cache, whose last slots are its tokens'.

        Args:
            kept: ``[n]``, numbers of the rows that stay, in their new order.
            first_slot: the slots before it are dropped.
            new: rows to add behind them; the shorter of the two is filled up with zeros at its front. None: none.
        """
        for index, layer in enumerate(self.layers):
            layer.replace_rows(kept, first_slot, None if new is None else new.layers[index])
