"""A tree's attention on a CPU without copies of the keys, where several query heads share a key head.

Transformers' sdpa function repeats keys and values for each query head as soon as there is a mask, because kernels of
other devices want it so. The CPU's kernel does not: it reads the shared head, and its results are the same bits. A
layer of SmolLM2-135M-Instruct (9 query heads on 3 key heads, four nodes, float32, 2 threads of an AVX2 CPU), us, with
the mask converted once for all layers:

| cached tokens | 128 | 512 | 2000 |
|---|---|---|---|
| repeated, mask of bools | 155 | 303 | 1310 |
| shared, additive mask | 65 | 187 | 451 |

``tests/runtime/test_shared_heads.py`` holds that the bits are the same.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .few_rows import is_compiled


class SharedHeads:
    """While entered, masked attention of CPU models under sdpa shares heads instead of repeating them.

    The switch is in transformers' registry, so other threads' models may pass through it; they get the same bits.

    Args:
        target: nothing happens unless it is on a CPU and not compiled, and the registry has transformers' own sdpa.
    """

    def __init__(self, target: PreTrainedModel) -> None:
        self._wanted = target.device.type == "cpu" and not is_compiled(target)
        # The last mask and its additive form, in one tuple: threads may read while another writes.
        self._mask: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> None:
        if self._wanted and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = self.forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._mask = None
        if ALL_ATTENTION_FUNCTIONS["sdpa"] == self.forward:
            ALL_ATTENTION_FUNCTIONS.pop("sdpa", None)  # the local override; transformers' own shows again

    def forward(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``sdpa_attention_forward``, which still does all but masked attention with shared heads.

        Args:
            module: the attention layer.
            query: ``[B, heads, S, d]``.
            key: ``[B, key heads, T, d]``.
            value: as ``key``.
            attention_mask: bool, broadcastable to ``[B, heads, S, T]``.
            dropout: as in transformers, as are the others.
            scaling: of the products.
            kwargs: handed on.

        Returns:
            ``[B, S, heads, d]`` and None for the attention weights.
        """
        shares = (
            query.device.type == "cpu"  # the kernels of other threads' devices want repeated heads
            and attention_mask is not None
            and attention_mask.dtype == torch.bool
            and query.shape[1] > key.shape[1]
            and query.shape[2] > 1
            and key.shape[-1] == value.shape[-1]
            and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
        )
        if attention_mask is None or not shares:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        mask = self._additive(attention_mask, query.dtype)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2).contiguous(), None

    def _additive(self, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        last = self._mask
        if last is not None and last[0] is visible and last[1].dtype == dtype:
            return last[1]
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
        self._mask = visible, additive
        return additive
