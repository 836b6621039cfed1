"""The drafter's decoder layer: attention under a relaxed causal mask, and an MLP, both as in Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from .configuration_falcon_drafter import FalconDrafterConfig
from .drafter_cache import DrafterCache
from .rollout import RolloutKeys


class FalconAttention(nn.Module):
    """Grouped-query attention with rotary positions; the mask is the caller's, queries are the last columns."""

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__()
        self.head_dim: int = config.head_dim or 0  # the config has filled both in
        groups: int = config.num_key_value_heads or 0
        size, heads = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(size, groups * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, groups * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, size, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        queries: int,
        layer: int,
        cache: DrafterCache | RolloutKeys | None,
        select: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B, S, H]`` -> ``[B, queries, H]`` for the last ``queries`` columns; mask ``[B, 1, queries, T]``.

        With ``select`` ``[M]``, flat indices into ``[B * queries]``, only those: ``[M, H]``. Queries come from
        ``start`` ``[B, queries, H]`` if it is given, keys and values always from ``hidden``.
        """
        batch, columns, _ = hidden.shape
        cos, sin = (table[:, None] for table in rotary)  # [B, 1, S, head_dim]

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, -1, projected.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

        first = columns - queries
        query = heads(self.q_proj(hidden[:, first:] if start is None else start))
        query = query * cos[:, :, first:] + rotate_half(query) * sin[:, :, first:]
        keys, values = heads(self.k_proj(hidden)), heads(self.v_proj(hidden))
        keys = keys * cos + rotate_half(keys) * sin
        if cache is not None:
            keys, values = cache.write(layer, keys, values)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        out = out.transpose(1, 2).reshape(batch, queries, -1)
        return self.o_proj(out if select is None else out.flatten(0, 1).index_select(0, select))


class FalconDecoderLayer(nn.Module):
    """One pre-norm decoder layer; its residual stream carries the fused pair."""

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__()
        self.input_norm = (
            LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.input_norm else nn.Identity()
        )
        self.attention = FalconAttention(config) if config.attention else None
        self.mlp_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        queries: int,
        select: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        **attention: Any,
    ) -> torch.Tensor:
        """``[B, S, H]`` -> ``[B, queries, H]``, or ``[M, H]`` with ``select``; see [`FalconAttention.forward`].

        ``start`` ``[B, S or queries, H]`` is what queries and residuals come from, ``hidden`` by default.
        """
        start = None if start is None else start[:, start.shape[1] - queries :]
        attended = None
        if self.attention is not None:
            attended = self.attention(
                self.input_norm(hidden),
                queries=queries,
                select=select,
                start=None if start is None else self.input_norm(start),
                **attention,
            )
        hidden = hidden[:, hidden.shape[1] - queries :] if start is None else start
        if select is not None:
            hidden = hidden.flatten(0, 1).index_select(0, select)
        hidden = hidden if attended is None else hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden))
