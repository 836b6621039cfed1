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

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold ``[B, heads, L, d]`` keys and values instead of those held so far."""
        self.lazy_initialization(keys, values)
        self._key_store = self._value_store = None
        self.update(keys, values)


def _slots(tokens: int) -> int:
    """Slots in a store for so many tokens: the next multiple of 32."""
    return -(-tokens // _STEP) * _STEP


def _roomier(held: torch.Tensor, like: torch.Tensor, used: int, slots: int) -> torch.Tensor:
    """Zeros ``[B, heads, slots, d]`` that begin with the ``used`` slots of ``held``."""
    store = like.new_zeros((*like.shape[:2], slots, like.shape[3]))
    if used:
        store[:, :, :used] = held
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
            parts = [(layer.keys[kept, :, first_slot:], layer.values[kept, :, first_slot:])]
            if new is not None:
                parts.append((new.layers[index].keys, new.layers[index].values))
            slots = max(keys.shape[2] for keys, _ in parts)
            layer.put(
                torch.cat([_lengthened(keys, slots) for keys, _ in parts]),
                torch.cat([_lengthened(values, slots) for _, values in parts]),
            )


def _lengthened(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    """``[B, heads, L, d]`` -> ``[B, heads, slots, d]``, zeros in front."""
    return torch.nn.functional.pad(tensor, (0, 0, slots - tensor.shape[2], 0))
