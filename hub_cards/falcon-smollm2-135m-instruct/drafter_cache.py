"""The drafter's own keys and values: one growing buffer a layer, in which dropping the tail costs nothing."""

from __future__ import annotations

import torch


class DrafterCache:
    """Keys and values of the pairs seen so far. ``length`` counts the slots in use.

    Buffers are ``[B, key-value heads, capacity, head_dim]``. A write goes behind ``length``, or, after [`place`], to
    slots of each row's own: rows of a batch have different numbers of pairs, and a row's pair c lies in its slot c.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self._buffers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._slots: torch.Tensor | None = None
        self._end = 0

    def place(self, slots: torch.Tensor, end: int) -> None:
        """The next write goes to ``slots`` ``[B, S]``, all below ``end`` + S, and reads reach up to ``end``.

        Until [`advance`]. ``length`` must cover all that is to be kept when a buffer grows.
        """
        self._slots, self._end = slots, end

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put in ``[B, heads, S, head_dim]`` and return keys and values from slot 0 to the end of what is in use.

        Does not move ``length``: call [`advance`] once all layers have written.
        """
        if self._slots is None:
            end = self.length + keys.shape[2]
            kept, held = self._reserve(layer, keys, values, end)
            kept[:, :, self.length : end] = keys
            held[:, :, self.length : end] = values
        else:
            end = self._end
            kept, held = self._reserve(layer, keys, values, end + keys.shape[2])
            index = self._slots[:, None, :, None].expand_as(keys)
            kept.scatter_(2, index, keys)
            held.scatter_(2, index, values)
        return kept[:, :, :end], held[:, :, :end]

    def _reserve(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's buffers, grown if they have fewer than ``capacity`` slots."""
        buffer = self._buffers[layer]
        if buffer is None or buffer[0].shape[2] < capacity:
            shape = (*keys.shape[:2], max(2 * capacity, 256), keys.shape[3])
            grown = keys.new_zeros(shape), values.new_zeros(shape)
            if buffer is not None:
                for new, old in zip(grown, buffer, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            buffer = self._buffers[layer] = grown
        return buffer

    def advance(self, columns: int) -> None:
        """Keep what was just written: ``columns`` behind ``length``, or everything up to the end of [`place`]."""
        self.length = self.length + columns if self._slots is None else self._end
        self._slots = None

    def crop(self, length: int) -> None:
        """Forget everything from slot ``length`` on."""
        self.length = length
