"""One generation's hold on its target: the prefill, and verification of a tree in one forward.

What stays of it in the cache is in ``committed_cache.py``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .cache_room import CacheRoom
from .committed_cache import HOLES, CommittedCache
from .few_rows import FewRowProducts, is_compiled
from .host_values import on_device
from .native_products import has_native_products
from .returned_attentions import PlainRows
from .shared_heads import SharedHeads
from .target import family
from .target_attention import attention_of
from .target_cache import fitting_cache
from .target_slots import CachedSlots
from .tree import DraftTree
from .tree_graphs import TreeGraphs
from .tree_masks import TreeMasks

# Prepared anew for every forward of ours, or meaningless there.
_OWN_KWARGS = frozenset(
    {"attention_mask", "position_ids", "cache", "past_key_values", "cache_position", "logits_to_keep", "use_cache"}
    | {"output_hidden_states", "output_attentions", "inputs_embeds", "return_dict"}
)


def cache_key(target: PreTrainedModel) -> str:
    """The keyword of the cache: ``cache``, or ``past_key_values`` in older transformers (5.17)."""
    parameters = inspect.signature(target.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _returns_attentions(generation_config: Any) -> bool:
    return bool(generation_config.return_dict_in_generate and generation_config.output_attentions)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


class TargetSession:
    """The target during one call of ``generate()``.

    Attributes:
        cache: the target's key-value cache, as ``generate()`` prepared it.
        committed: what it holds of the text, set by [`prefill`].
        prompt_features: one ``[1, F, W]`` a row, [`features`] of its last F prompt tokens, set by [`prefill`];
            fewer than the prompt has where it was prefilled in chunks or partly cached before.
        prompt_attentions: the prefill's attentions as plain decoding returns them, or None where not asked for.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        rows: int,
        slots: int,
        room: int,
        model_kwargs: dict[str, Any],
        feature_layers: list[int] | None = None,
    ) -> None:
        """Take over the target for a batch of ``rows``; generates nothing.

        Args:
            target: the target.
            rows: B.
            slots: what a static cache must hold: the longest text and one tree.
            room: nodes of the largest tree, the root included.
            model_kwargs: as ``generate()`` hands them to a decoding method.
            feature_layers: hidden states that make a feature, side by side; the last alone by default.

        Raises:
            ValueError: if there is no cache, none that fits, or one that cannot give up rejected drafts; for a tensor
                among the keywords that verification could not honour (an image's features), or more rows than the
                family can have.
        """
        self.target = target
        self.rows = rows
        self.config = target.config.get_text_config()
        self._cache_key = cache_key(target)
        self.cache: Any = model_kwargs.get(self._cache_key)
        if self.cache is None:
            raise ValueError(
                "Falcon needs a key-value cache; do not pass use_cache=False together with assistant_model."
            )
        self._plain_rows = PlainRows(self.cache, self.config.num_hidden_layers)
        self.cache = fitting_cache(self.cache, rows, slots)
        # Convolutions can say after the prefill only; all others before it fills the user's cache.
        self._check_croppable([layer for layer in self.cache.layers if not hasattr(layer, "conv_states")])
        self._static = any(isinstance(layer, StaticLayer) for layer in self.cache.layers)
        self._room = room
        self._is_compiled = is_compiled(target)
        # Rows of a batch leave holes. What is compiled would trace the appending, and be made anew for it.
        most = slots if rows == 1 else HOLES * slots
        self._cache_room: Any = contextlib.nullcontext() if self._is_compiled else CacheRoom(self.cache, most)
        self._forward: Any = target
        self._few_rows: Any = FewRowProducts(target)
        self._shared_heads: Any = SharedHeads(target)
        self.model_kwargs = {**model_kwargs, self._cache_key: self.cache}
        self._extra = {name: value for name, value in model_kwargs.items() if name not in _OWN_KWARGS}
        for name, value in self._extra.items():
            if _holds_tensors(value):
                raise ValueError(
                    f"Falcon cannot carry the model input {name!r} through a tree; drop it or assistant_model."
                )
        self._masks = TreeMasks(target, self.cache)
        self._feature_layers = feature_layers
        support = family(target)
        self._causal = support is not None and support.drafts == "chain"
        if rows > 1 and support is not None and support.why_one_row:
            raise ValueError(
                f"Falcon cannot draft for several rows of {type(target).__name__} at once: {support.why_one_row}; "
                "generate the rows one by one, or without assistant_model."
            )

    def prefill(self, input_ids: torch.Tensor, generation_config: Any) -> Any:
        """Run the prompt through the target, as ``generate()`` would; returns its outputs.

        Raises:
            ValueError: if the cache cannot give up rejected drafts, or the target would return wrong attentions.
        """
        if self._static:
            self._compile(generation_config)
        kwargs = {**self.model_kwargs, "output_hidden_states": self._wanted_states(generation_config)}
        kwargs.pop("output_attentions", None)
        if _returns_attentions(generation_config):
            kwargs["output_attentions"] = True
        outputs = self.target._prefill(input_ids, generation_config, kwargs)
        # Not before: a prefill is never rolled back, and in chunks it would keep the whole prompt in sliding layers.
        self.cache.activate_past_recording()
        self._check_croppable(self.cache.layers)
        wanted = _returns_attentions(generation_config)
        if wanted and outputs.attentions and attention_of(self.target) != "eager":
            raise ValueError(
                f"{type(self.target).__name__} computes the attentions it returns with a mask made for another "
                "implementation: call model.set_attn_implementation('eager') first, or drop output_attentions."
            )
        self.prompt_attentions = self._plain_rows.prompt(outputs.attentions) if wanted else None
        features = self.features(outputs)
        mask, positions = (self.model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
        length = int(self.cache.get_seq_length())
        slots = CachedSlots.of_prompt(self.rows, length, mask, positions, features.device)
        self.committed = CommittedCache(self.cache, slots)
        # Padding has no features worth drafting from.
        self.prompt_features = [features[row : row + 1, -real:] for row, real in enumerate(slots.filled)]
        return outputs

    def _check_croppable(self, layers: list[Any]) -> None:
        if not all(layer.is_croppable for layer in layers):
            raise ValueError(
                f"{type(self.cache).__name__} cannot give up rejected drafts; drop cache_implementation, or pass "
                "transformers.DynamicCache(), or generate without assistant_model."
            )

    def _compile(self, generation_config: Any) -> None:
        """Verify by a compiled forward where plain decoding would compile: static caches, on a GPU or when asked to."""
        # Installed on first use otherwise, under a lock, which breaks the graph. Once only, or states are kept twice.
        if not any(getattr(module, "_output_capturing_hooks_installed", False) for module in self.target.modules()):
            maybe_install_capturing_hooks(self.target)
        compiled = self._is_compiled
        if self.target._valid_auto_compile_criteria(self.model_kwargs, generation_config):
            self._forward = self.target.get_compiled_call(generation_config.compile_config)
            compiled |= self._forward != self.target.__call__  # llama4 gives that
        if compiled:
            # A graph is made once, so it is rewritten instead.
            self._few_rows = TreeGraphs(self.target.device)
            self._shared_heads = contextlib.nullcontext()

    def _wanted_states(self, generation_config: Any) -> bool | list[int]:
        """What to ask for as ``output_hidden_states``: all if the user wants them back, else little but the last.

        The last state is number L of L layers; older transformers (5.17) count it L - 1.
        """
        layers = self.config.num_hidden_layers
        if generation_config.output_hidden_states or self._feature_layers is not None:
            return True
        return [layers - 1, layers]

    def features(self, outputs: Any) -> torch.Tensor:
        """``[B, S, W]``, what the drafter reads of a forward: the last hidden state, or several side by side."""
        if self._feature_layers is None:
            return outputs.hidden_states[-1]
        states = [outputs.hidden_states[layer] for layer in self._feature_layers]
        return torch.cat([state.to(states[-1].device) for state in states], dim=-1)

    def verify(self, tree: DraftTree, budgets: list[int], generation_config: Any) -> Any:
        """One forward over the tree's nodes, the root included; their keys and values go to the cache's end.

        Args:
            tree: N nodes a row.
            budgets: how many more tokens each row may emit. Nodes from that depth on cannot be, and are kept from
                positions that the target may not have.
            generation_config: says which hidden states the user wants.

        Returns:
            The target's outputs: logits ``[B, N, V]``, ``hidden_states[-1]`` ``[B, N, H]``.
        """
        nodes, tree = tree.size, self._fixed_size(tree)
        self.committed.make_room(tree.size)
        slots = self.committed.slots
        device = slots.valid.device
        deepest = on_device(budgets, device)[:, None] - 1
        positions = slots.next_position + tree.depths.to(device).minimum(deepest.clamp_min(0))
        plain = self._is_plain(tree)
        with contextlib.ExitStack() as helped:
            for help_with_trees in self._helps(plain):
                helped.enter_context(help_with_trees)
            outputs = self._forward(
                input_ids=tree.tokens.to(device),
                **self._places(tree.ancestors.to(device), positions, self._causal or plain),
                use_cache=True,
                output_hidden_states=self._wanted_states(generation_config),
                return_dict=True,
                **({"output_attentions": True} if _returns_attentions(generation_config) else {}),
                **{self._cache_key: self.cache},
                **self._extra,
            )
        if self._static:
            self.cache.crop(nodes - tree.size)
            # Copies, because a CUDA graph writes its outputs to the same place every time.
            outputs.logits = outputs.logits[:, :nodes].clone()
            outputs.hidden_states = tuple(
                None if state is None else state[:, :nodes].clone() for state in outputs.hidden_states
            )
        return outputs

    def _fixed_size(self, tree: DraftTree) -> DraftTree:
        """With a static cache every tree gets the full size, by nodes that see themselves alone.

        So a compiled target has one graph for all rounds, those near the end of the text too.
        """
        missing = self._room - tree.size if self._static else 0
        if missing <= 0:
            return tree
        ancestors = F.pad(tree.ancestors, (0, missing, 0, missing))
        ancestors |= torch.eye(self._room, dtype=torch.bool, device=ancestors.device)
        tokens, parents, depths = (F.pad(x, (0, missing)) for x in (tree.tokens, tree.parents, tree.depths))
        return DraftTree(tokens, parents, depths, ancestors)

    def _helps(self, plain: bool) -> tuple[Any, ...]:
        """What makes a verification faster; of one token that is nothing but products of our own."""
        if plain:
            return (self._few_rows,) if self.target.device.type == "cpu" and has_native_products() else ()
        return self._few_rows, self._shared_heads, self._cache_room

    def _is_plain(self, tree: DraftTree) -> bool:
        """Whether this is the forward of plain decoding, one token of one text, which no mask or cache makes faster.

        Of SmolLM2-135M-Instruct in float32 on 2 threads of an AVX2 CPU it takes 66 ms so, and 72 as a tree.
        """
        one = tree.tokens.numel() == 1 and not self._static
        return one and attention_of(self.target) in ("eager", "sdpa")

    def _places(self, ancestors: torch.Tensor, positions: torch.Tensor, causal: bool) -> dict[str, Any]:
        """What tells the target where the nodes are: masks and positions, as for a tree in [`TreeMasks`].

        A chain (``causal``) needs what plain decoding gives, a mask ``[B, L + N]`` of the slots, and positions where
        the target takes any. So does one plain token, or no mask where no slot is empty: transformers would look at it,
        at a device sync.
        """
        slots = self.committed.slots
        if not causal:
            return {"position_ids": positions, "attention_mask": self._masks.of(slots, ancestors, positions)}
        if not self._causal and slots.filled == [slots.length]:
            return {"position_ids": positions, "attention_mask": None}
        mask = torch.cat((slots.valid, torch.ones_like(positions, dtype=torch.bool)), dim=1).long()
        if self._static:  # some build their biases from the mask, for all slots
            mask = F.pad(mask, (0, int(self.cache.get_max_length()) - mask.shape[1]))
        takes_positions = "position_ids" in inspect.signature(self.target.forward).parameters
        return {"attention_mask": mask} | ({"position_ids": positions} if takes_positions else {})

    def attentions(self, tree: DraftTree, outputs: Any, row: int, node: int) -> tuple[torch.Tensor, ...]:
        """What the token chosen at ``node`` of ``row`` attended to, as plain decoding returns it: one tensor a layer.

        To be asked before [`CommittedCache.keep`]. One device sync, and one more where layers hold the last slots only.
        """
        slots = self.committed.slots
        text = slots.valid[row].clone()
        text[: slots.prompt] = True  # padding before the prompt has columns too, of zeros
        path = tree.ancestors[row, node].to(text.device)
        columns = torch.cat((text, path)).nonzero()[:, 0]
        # Sliding layers hold the last slots only.
        offsets = [slots.length + tree.size - layer.shape[-1] for layer in outputs.attentions]
        offsets = [0 if self._static else offset for offset in offsets]
        held = {offset: columns if offset == 0 else columns[columns >= offset] - offset for offset in set(offsets)}
        return self._plain_rows.token(outputs.attentions, row, node, [held[offset] for offset in offsets])

    def close(self) -> None:
        """Let sliding layers drop again what is behind their window, as in the cache that plain decoding returns."""
        for layer in self.cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def idle(self, token: torch.Tensor, generation_config: Any) -> None:
        """A forward that leaves no trace, for the sake of other devices that wait for it: ``[1, 1]`` any token."""
        root = DraftTree.root_only(token.expand(self.rows, 1))
        self.verify(root, [1] * self.rows, generation_config)
        self.cache.crop(-1)
