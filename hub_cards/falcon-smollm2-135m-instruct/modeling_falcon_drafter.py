"""The Falcon drafter: a semi-autoregressive (SAR) head over the target's last hidden states (arXiv 2412.12639).

Letters. Tokens t_i, features f_i (the target's last hidden state at position i, after the final norm), block size k,
hidden size H. *Pair* i is (f_i, embedding of t_{i+1}), and the drafter's output at pair i is the estimate of f_{i+k}:

    x_i   = Fusion(f_i, e(t_{i+1}))                      two LSTM layers, or one matrix; 2H -> H
    y     = x + Attention(Norm(x))                       relaxed causal mask: i sees j iff block(j) <= block(i)
    f^_{i+k} = y_i + MLP(Norm(y_i))                      head(f^_{i+k}) is the draft law of token t_{i+k+1}

So one pass over the last k pairs gives k new features and k token laws. Every sequence starts with k - 1 *start
pairs* of zeros, so that even a one-token prompt fills a block; column c of a pair sequence is therefore pair
c - (k - 1), sits at rotary position c, and estimates f_{c+1}.

With one layer, the keys and values of a pair do not depend on the mask, so cached pairs stay valid whatever block
they were queried in. With more layers they are an approximation from the second layer on: quality, never correctness.

Embedding and LM head are the target's; they are arguments here, never modules, so they are never saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from .configuration_falcon_drafter import FalconDrafterConfig
from .drafter_cache import DrafterCache
from .routing import install
from .statistics import GenerationStatistics
from .tree import DraftTree

FusionState = tuple[torch.Tensor, torch.Tensor]
"""LSTM state (h, c), each ``[layers, B, H]``; of zero layers for a fusion without state."""


def relaxed_causal_mask(length: int, block_size: int, offset: torch.Tensor) -> torch.Tensor:
    """The relaxed causal mask of the paper (section 3.2): column i sees column j iff block(j) <= block(i).

    Args:
        length: S, columns of the pair sequence.
        block_size: k.
        offset: ``[B]`` in [0, k): block(c) = (c + offset) // k, the alignment of each row's blocks.

    Returns:
        ``[B, 1, S, S]`` bool, True where the query (row) sees the key (column).
    """
    block = (torch.arange(length, device=offset.device)[None] + offset[:, None]) // block_size
    return block[:, None, None, :] <= block[:, None, :, None]


class FalconFusion(nn.Module):
    """Fuses a pair (feature, embedding), 2H, into one vector, H, carrying state along the sequence if it is an LSTM."""

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__()
        self.kind = config.fusion
        size = config.hidden_size
        if self.kind == "linear":
            self.linear = nn.Linear(2 * size, size, bias=False)
        else:
            self.lstm = nn.LSTM(2 * size, size, num_layers=config.fusion_layers, batch_first=True)

    @property
    def is_recurrent(self) -> bool:
        """Whether the output at a pair depends on the pairs before it."""
        return self.kind == "lstm"

    def forward(
        self,
        features: torch.Tensor,
        embeddings: torch.Tensor,
        state: FusionState | None = None,
        lengths: list[int] | None = None,
    ) -> tuple[torch.Tensor, FusionState | None]:
        """``[B, S, H]`` features and embeddings -> ``[B, S, H]`` fused, and the state after the last pair.

        ``state`` is the state before the first pair, None for zeros; a fusion without recurrence returns None.
        ``lengths`` of at least 1 say how many pairs each row has, if not all have S; the rest of a row is garbage.
        """
        pairs = torch.cat((features, embeddings), dim=-1)
        if self.kind == "linear":
            return self.linear(pairs), None
        if self.kind == "lstm_stateless":
            fused, _ = self.lstm(pairs.flatten(0, 1)[:, None])
            return fused.view_as(features), None
        if lengths is not None:
            packed = pack_padded_sequence(pairs, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
            outputs, state = self.lstm(packed, state)
            return pad_packed_sequence(outputs, batch_first=True, total_length=pairs.shape[1])[0], state
        fused, state = self.lstm(pairs, state)
        return fused, state


class FalconAttention(nn.Module):
    """Grouped-query attention with rotary positions; the mask is the caller's, queries are the last columns."""

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__()
        self.head_dim: int = config.head_dim or 0  # the config has filled both in
        groups: int = config.num_key_value_heads or 0
        size, heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, size, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        queries: int,
        layer: int,
        cache: DrafterCache | None,
    ) -> torch.Tensor:
        """``[B, S, H]`` -> ``[B, queries, H]`` for the last ``queries`` columns; mask ``[B, 1, queries, T]``."""
        batch, columns, _ = hidden.shape
        cos, sin = (table[:, None] for table in rotary)  # [B, 1, S, head_dim]

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, -1, projected.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

        first = columns - queries
        query = heads(self.q_proj(hidden[:, first:]))
        query = query * cos[:, :, first:] + rotate_half(query) * sin[:, :, first:]
        keys, values = heads(self.k_proj(hidden)), heads(self.v_proj(hidden))
        keys = keys * cos + rotate_half(keys) * sin
        if cache is not None:
            keys, values = cache.write(layer, keys, values)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, queries, -1))


class FalconDecoderLayer(nn.Module):
    """One pre-norm decoder layer; its residual stream carries the fused pair."""

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__()
        self.input_norm = (
            LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.input_norm else nn.Identity()
        )
        self.attention = FalconAttention(config)
        self.mlp_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden: torch.Tensor, *, queries: int, **attention: Any) -> torch.Tensor:
        """``[B, S, H]`` -> ``[B, queries, H]``; see [`FalconAttention.forward`]."""
        attended = self.attention(self.input_norm(hidden), queries=queries, **attention)
        hidden = hidden[:, hidden.shape[1] - queries :] + attended
        return hidden + self.mlp(self.mlp_norm(hidden))


class FalconDrafter(PreTrainedModel):
    """The drafter: fusion and relaxed causal decoder layers. Give it to ``target.generate(assistant_model=drafter)``.

    Attributes:
        draft_vocab_ids: buffer ``[draft_vocab_size]``, ascending ids of the reduced draft vocabulary, or None.
        last_generation: statistics of the last finished call of ``generate()`` with this drafter, None before it.
        on_round: called after each round with its tree and the visited nodes of each row, root first; None for nothing.
    """

    config_class = FalconDrafterConfig
    config: FalconDrafterConfig
    base_model_prefix = "drafter"
    main_input_name = "features"
    supports_gradient_checkpointing = False
    _no_split_modules = ["FalconDecoderLayer"]
    _supports_sdpa = True

    draft_vocab_ids: torch.Tensor | None
    last_generation: GenerationStatistics | None = None
    on_round: Callable[[DraftTree, list[list[int]]], None] | None = None

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__(config)
        self.fusion = FalconFusion(config)
        self.layers = nn.ModuleList(FalconDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.rotary = LlamaRotaryEmbedding(config)
        ids = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab_ids", ids)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that the checkpoint lacks are an error, not random numbers and a warning.

        Raises:
            ValueError: naming the weights that are missing or have another shape.
        """
        drafter, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
        if wrong:
            raise ValueError(
                f"The drafter's weights are incomplete: {', '.join(sorted(wrong)[:3])} ({len(wrong)} in all)."
            )
        return (drafter, info) if output_loading_info else drafter

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    nn.init.normal_(parameter, std=self.config.hidden_size**-0.5)
                else:
                    nn.init.zeros_(parameter)

    def start_pairs(self, pairs: torch.Tensor) -> torch.Tensor:
        """Put the k - 1 start pairs of zeros before ``[B, S, H]`` features or embeddings: ``[B, S + k - 1, H]``."""
        return F.pad(pairs, (0, 0, self.config.block_size - 1, 0))

    def decode(
        self,
        fused: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        queries: int | None = None,
        cache: DrafterCache | None = None,
    ) -> torch.Tensor:
        """Run the decoder layers over fused pairs.

        Args:
            fused: ``[B, S, H]``.
            positions: ``[B, S]``, rotary position (column) of each pair.
            mask: ``[B, 1, S, T]`` bool, True where visible; T counts the cached columns and these S.
            queries: how many of the last columns want an output; all by default.
            cache: written at its end; its length is left as it was, so advance it to keep the columns.

        Returns:
            ``[B, queries, H]``, the estimates f^.
        """
        rotary = self.rotary(fused, positions)
        queries = fused.shape[1] if queries is None else queries
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # Only the last layer can leave columns out: the others' outputs are the next one's keys.
            wanted = queries if index == last else fused.shape[1]
            fused = layer(fused, queries=wanted, rotary=rotary, mask=mask[:, :, -wanted:], layer=index, cache=cache)
        return fused

    def forward(
        self,
        features: torch.Tensor,
        embeddings: torch.Tensor,
        block_offset: torch.Tensor,
        pair_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The training forward: a whole pair sequence at once.

        Args:
            features: ``[B, S, H]``, column c holds f_{c-k+1}; start pairs included (see [`start_pairs`]).
            embeddings: ``[B, S, H]``, column c holds the embedding of t_{c-k+2}.
            block_offset: ``[B]`` in [0, k), each row's block alignment (see [`relaxed_causal_mask`]).
            pair_mask: ``[B, S]`` bool, False for padding; all True by default.

        Returns:
            ``[B, S, H]``; column c is the estimate of f_{c+1}.
        """
        columns = features.shape[1]
        fused, _ = self.fusion(features, embeddings)
        mask = relaxed_causal_mask(columns, self.config.block_size, block_offset)
        if pair_mask is not None:
            # A padded column sees itself, so that no softmax row is empty.
            mask = mask & (pair_mask[:, None, None] | torch.eye(columns, dtype=torch.bool, device=mask.device))
        positions = torch.arange(columns, device=features.device)[None].expand(features.shape[0], -1)
        return self.decode(fused, positions, mask)

    def logits(self, features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` features -> ``[..., draft vocabulary]`` through the target's head rows (see [`draft_head`])."""
        logits = F.linear(features, head) * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def draft_head(self, head_weight: torch.Tensor) -> torch.Tensor:
        """Rows of the target's LM head ``[V, H]`` that the drafter drafts over: ``[draft vocabulary, H]``."""
        return head_weight if self.draft_vocab_ids is None else head_weight[self.draft_vocab_ids.to(head_weight.device)]

    def _falcon_validate(self, target: PreTrainedModel, *args: Any) -> Any:
        """What the routing calls first: refuse what cannot work (see ``generation.validate``)."""
        from .generation import validate  # imports this module

        return validate(target, self, *args)

    def _falcon_decode(self, target: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """What the routing calls instead of stock assisted decoding (see ``generation.decode``)."""
        from .generation import decode  # imports this module

        return decode(target, self, *args, **kwargs)


# Loading a drafter is all a user does, from a Hub repo too, so this is where the routing is installed.
install()
