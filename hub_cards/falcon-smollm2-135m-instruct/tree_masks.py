"""The 4D masks of trees: which cached slot and which other node each node of a tree sees, for each kind of layer.

``tests/runtime/test_families.py`` and ``test_windows_by_place.py`` hold them by the text of targets with windows and
chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .target_attention import mask_for
from .target_slots import CachedSlots


def layer_kinds(config: Any) -> list[str]:
    """Attention kind of each layer, by the rule of transformers' ``create_masks_for_generate``."""
    layers = config.num_hidden_layers
    if getattr(config, "layer_types", None) is not None:
        return list(config.layer_types)
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"] * layers
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * layers
    return ["full_attention"] * layers


class TreeMasks:
    """Masks for one call of ``generate()``.

    Args:
        target: whose layers and attention they are for.
        cache: its key-value cache, which says what each kind of layer still holds.
    """

    def __init__(self, target: PreTrainedModel, cache: Any) -> None:
        self._target, self._cache = target, cache
        self._config = target.config.get_text_config()
        self._kinds = layer_kinds(self._config)

    def of(self, slots: CachedSlots, ancestors: torch.Tensor, positions: torch.Tensor) -> Any:
        """The mask of a tree behind the cached slots, one a layer kind where the target wants a dict.

        Args:
            slots: that hold text.
            ancestors: ``[B, N, N]`` bool, see [`DraftTree`].
            positions: ``[B, N]``, positions of the nodes.

        Returns:
            ``[B, 1, N, width]``, in the form that the target's attention takes (see [`mask_for`]).
        """
        masks: dict[str, Any] = {}
        rows, nodes = positions.shape
        for kind in dict.fromkeys(self._kinds):
            width, offset = (int(size) for size in self._cache.get_mask_sizes(nodes, self._kinds.index(kind)))
            held = slots.length - offset  # slots before the tree that a layer of this kind still holds
            visible = torch.zeros(rows, nodes, width, dtype=torch.bool, device=positions.device)
            visible[:, :, :held] = slots.valid[:, None, offset:]
            visible[:, :, held : held + nodes] = ancestors
            if kind != "full_attention":
                places = slots.places(positions)
                keys = torch.zeros(rows, width, dtype=torch.long, device=positions.device)
                keys[:, :held] = slots.place[:, offset:]
                keys[:, held : held + nodes] = places
                visible &= self._in_reach(kind, keys[:, None], places[:, :, None])
            masks[kind] = mask_for(self._target, visible[:, None])
        return masks if getattr(self._config, "layer_types", None) is not None else masks[self._kinds[0]]

    def _in_reach(self, kind: str, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Whether a sliding or chunked layer's query may look at a key, by their places."""
        if kind == "sliding_attention":
            return keys > queries - self._config.sliding_window
        size = self._config.attention_chunk_size
        return keys // size == queries // size
