"""One generation's hold on its target: prefill, verification of a tree in one forward, and the cache.

Invariant, held by ``tests/runtime/test_final_cache.py``: after [`TargetSession.keep`] the cache holds the committed
tokens but the last, each with the keys and values that decoding one token at a time would have left.

A cached token is a *slot*; its *position* is what the rotary embedding sees. They differ with left padding, and inside
a tree, where siblings share a position. Masks go by positions.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .tree import DraftTree

# Prepared anew for every forward of ours, or meaningless there.
_OWN_KWARGS = frozenset(
    {"attention_mask", "position_ids", "cache", "past_key_values", "cache_position", "logits_to_keep", "use_cache"}
    | {"output_hidden_states", "output_attentions", "inputs_embeds", "return_dict"}
)


def cache_key(target: PreTrainedModel) -> str:
    """The keyword of the cache: ``cache``, or ``past_key_values`` before transformers 5.20."""
    parameters = inspect.signature(target.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


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


class TargetSession:
    """The target during one call of ``generate()``.

    Attributes:
        cache: the target's key-value cache, as ``generate()`` prepared it.
        prompt_features: ``[B, F, H]`` last hidden states of the last F prompt positions, set by [`prefill`]; fewer
            than the prompt has where it was prefilled in chunks or partly cached before.
    """

    def __init__(self, target: PreTrainedModel, model_kwargs: dict[str, Any]) -> None:
        """``model_kwargs`` as ``generate()`` hands them to a decoding method.

        Raises:
            ValueError: if there is no cache, or a tensor among the keywords that verification could not honour.
        """
        self.target = target
        self.config = target.config.get_text_config()
        self.model_kwargs = model_kwargs
        self._cache_key = cache_key(target)
        self.cache: Any = model_kwargs.get(self._cache_key)
        if self.cache is None:
            raise ValueError(
                "Falcon needs a key-value cache; do not pass use_cache=False together with assistant_model."
            )
        self._extra = {name: value for name, value in model_kwargs.items() if name not in _OWN_KWARGS}
        for name, value in self._extra.items():
            if isinstance(value, torch.Tensor):
                raise ValueError(
                    f"Falcon cannot carry the model input {name!r} through a tree; drop it or assistant_model."
                )
        self._kinds = layer_kinds(self.config)

    def prefill(self, input_ids: torch.Tensor, generation_config: Any) -> Any:
        """Run the prompt through the target, as ``generate()`` would; returns its outputs.

        Raises:
            ValueError: if the cache cannot give up rejected drafts.
        """
        self.cache.activate_past_recording()
        kwargs = {**self.model_kwargs, "output_hidden_states": self._wanted_states(generation_config)}
        outputs = self.target._prefill(input_ids, generation_config, kwargs)
        if not self.cache.is_croppable:
            raise ValueError(
                f"{type(self.cache).__name__} cannot give up rejected drafts; drop cache_implementation, or pass "
                "transformers.DynamicCache(), or generate without assistant_model."
            )
        # Sliding layers held everything for a rollback that a prefill never needs.
        self.cache.crop(0)
        features = outputs.hidden_states[-1]
        self._note_slots(features.device)
        real = int(self._valid.sum())  # one sync, once: padding has no features worth drafting from
        self.prompt_features = features[:, -real:]
        return outputs

    def _note_slots(self, device: torch.device) -> None:
        """Which slots hold real tokens, and at which positions: ``[1, L]`` each, L cached slots."""
        length = int(self.cache.get_seq_length())
        mask = self.model_kwargs.get("attention_mask")
        valid = torch.ones(1, length, dtype=torch.bool, device=device) if mask is None else mask.to(device).bool()
        positions = self.model_kwargs.get("position_ids")
        if positions is None or positions.shape[-1] != length:
            positions = (valid.long().cumsum(-1) - 1).clamp_min(0)
        self._valid = valid[:, -length:]
        self._positions = positions.to(device)
        self.next_position = self._positions[:, -1:] + 1

    def _wanted_states(self, generation_config: Any) -> bool | list[int]:
        """What to ask for as ``output_hidden_states``: all if the user wants them back, else little but the last.

        The last state is number L of L layers; transformers before 5.20 counted it L - 1.
        """
        layers = self.config.num_hidden_layers
        return True if generation_config.output_hidden_states else [layers - 1, layers]

    @property
    def length(self) -> int:
        """L, the slots in use."""
        return self._valid.shape[1]

    def check_room(self, max_length: int, tree_size: int) -> None:
        """Raise ValueError if a static cache is too small for ``max_length`` tokens and a tree beside them."""
        wanted = max_length + tree_size
        for layer in self.cache.layers:
            if isinstance(layer, StaticLayer) and layer.max_cache_len < wanted:
                raise ValueError(
                    f"The static cache holds {layer.max_cache_len} tokens, but max_length={max_length} and a tree of "
                    f"{tree_size} nodes need {wanted}: pass max_cache_len={wanted}, or drop cache_implementation."
                )

    def verify(self, tree: DraftTree, generation_config: Any) -> Any:
        """One forward over the tree's nodes, the root included; its rows are appended to the cache.

        Returns the target's outputs: logits ``[B, N, V]``, ``hidden_states[-1]`` ``[B, N, H]``.
        """
        device = self.next_position.device
        positions = self.next_position + tree.depths.to(device)
        outputs = self.target(
            input_ids=tree.tokens.to(device),
            position_ids=positions,
            attention_mask=self.masks(tree.ancestors.to(device), positions),
            use_cache=True,
            output_hidden_states=self._wanted_states(generation_config),
            return_dict=True,
            **{self._cache_key: self.cache},
            **self._extra,
        )
        self._node_positions = positions
        return outputs

    def masks(self, ancestors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The 4D mask of a tree behind the cached slots, one a layer kind where the target wants a dict.

        Args:
            ancestors: ``[B, N, N]`` bool.
            positions: ``[B, N]``, positions of the nodes.

        Returns:
            ``[B, 1, N, width]``: bool, or additive in the target's dtype for eager attention, which adds it.
        """
        masks: dict[str, torch.Tensor] = {}
        rows, nodes = positions.shape
        for kind in dict.fromkeys(self._kinds):
            width, offset = (int(size) for size in self.cache.get_mask_sizes(nodes, self._kinds.index(kind)))
            held = self.length - offset  # slots before the tree that a layer of this kind still holds
            visible = torch.zeros(rows, nodes, width, dtype=torch.bool, device=positions.device)
            visible[:, :, :held] = self._valid[:, None, offset:]
            visible[:, :, held : held + nodes] = ancestors
            if kind != "full_attention":
                keys = torch.zeros(rows, width, dtype=torch.long, device=positions.device)
                keys[:, :held] = self._positions[:, offset:]
                keys[:, held : held + nodes] = positions
                visible &= self._in_reach(kind, keys[:, None], positions[:, :, None])
            visible = visible[:, None]
            if self.target.config._attn_implementation == "eager":
                dtype = self.target.dtype
                blocked = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
                visible = blocked.masked_fill(~visible, torch.finfo(dtype).min)
            masks[kind] = visible
        return masks if getattr(self.config, "layer_types", None) is not None else masks[self._kinds[0]]

    def _in_reach(self, kind: str, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Whether a sliding or chunked layer's query position may look at a key position."""
        if kind == "sliding_attention":
            return keys > queries - self.config.sliding_window
        size = self.config.attention_chunk_size
        return keys // size == queries // size

    def keep(self, path: list[int], nodes: int) -> None:
        """Keep the verified nodes ``path`` (ascending, from the root on) of a tree of ``nodes``, drop the others."""
        kept = len(path)
        if path != list(range(kept)):  # else they lie where they belong
            self._gather(torch.tensor(path, device=self._positions.device), nodes)
        self.cache.crop(kept - nodes)
        positions = self._node_positions[:, path]
        self._valid = torch.cat((self._valid, torch.ones_like(positions, dtype=torch.bool)), dim=1)
        self._positions = torch.cat((self._positions, positions), dim=1)
        self.next_position = positions[:, -1:] + 1

    def _gather(self, path: torch.Tensor, nodes: int) -> None:
        """Move the rows of the nodes ``path`` ``[n]`` to the front of the tree's ``nodes`` slots, in every layer."""
        for layer in self.cache.layers:
            if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized or layer.keys is None:
                continue  # shared keys and values: another layer holds them
            start = self.length if isinstance(layer, StaticLayer) else layer.keys.shape[-2] - nodes
            for tensor in (layer.keys, layer.values):
                # Advanced indexing copies before the assignment, so overlapping rows are safe.
                tensor[:, :, start : start + path.shape[0]] = tensor[:, :, start + path.to(tensor.device)]
