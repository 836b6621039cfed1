"""Fusion of pairs (feature, embedding of the next token): two LSTM layers, or one matrix."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .configuration_falcon_drafter import FalconDrafterConfig

FusionState = tuple[torch.Tensor, torch.Tensor]
"""LSTM state (h, c), each ``[layers, B, H]``; of zero layers for a fusion without state."""


class FalconFusion(nn.Module):
    """Fuses a pair (feature, embedding), 2H, into one vector, H, carrying state along the sequence if it is an LSTM."""

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__()
        self.kind = config.fusion
        self.embedding_scale = config.embedding_scale
        size = config.hidden_size
        if self.kind == "linear":
            self.linear = nn.Linear(2 * size, size, bias=config.fusion_bias)
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
        if self.embedding_scale != 1.0:
            embeddings = embeddings * self.embedding_scale
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
