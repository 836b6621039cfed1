"""Attention for one new token a row, in which the query heads that share a key head go through it together.

On a CPU torch's fused kernel reads the keys once per query head and is slow at one query: 12.9 ms a layer for 128
rows of 200 tokens (9 query heads on 3 key heads, bfloat16, 2 threads) against 1.0 ms here, which doubles the rate of
a big batch. Elsewhere, and for prompts, the model keeps its own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "falcon_grouped_decoding"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention with softmax in float32; more than one query a row goes to transformers' sdpa.

    Args:
        module: the attention layer, for transformers' sdpa.
        query: ``[B, heads, S, d]``.
        key: ``[B, key heads, T, d]``; heads is a multiple of key heads.
        value: ``[B, key heads, T, v]``; v is d but in latent attention (deepseek_v3).
        attention_mask: bool, broadcastable to ``[B, 1, S, T]``; None: all visible.
        dropout: for transformers' sdpa.
        scaling: of the products; 1 / sqrt(d) by default.
        kwargs: for transformers' sdpa.

    Returns:
        ``[B, S, heads, v]`` and None for the attention weights.
    """
    rows, heads, queries, width = query.shape
    if queries != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
    products = torch.matmul(grouped, key.transpose(2, 3)).float() * (scaling or width**-0.5)
    if attention_mask is not None:
        products.masked_fill_(~attention_mask, torch.finfo(torch.float32).min)
    mixed = torch.matmul(products.softmax(-1).to(value.dtype), value)
    return mixed.view(rows, 1, heads, value.shape[-1]), None


@contextmanager
def grouped_decoding(target: PreTrainedModel) -> Iterator[None]:
    """Inside the block a CPU target with sdpa attention decodes with [`grouped_attention`]; others are left alone."""
    before = target.config._attn_implementation
    if before != "sdpa" or target.device.type != "cpu":
        yield
        return
    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    target.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        target.set_attn_implementation(before)
