"""The low-rank correction of an estimate by the token before it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_falcon_drafter import FalconDrafterConfig


class FalconCorrection(nn.Module):
    """Corrects an estimate for the token chosen just before: f^ + U silu(D [f^; e]), of low rank; nothing at the start.

    The k laws of a pass are independent of each other's tokens. Since head(f^ + d) = head(f^) + head(d), this is a
    low-rank bigram table on the head's rows that knows the context as well.
    """

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__()
        rank: int = config.correction_rank or 0
        self.embedding_scale = config.embedding_scale
        self.down = nn.Linear(2 * config.hidden_size, rank, bias=False)
        # No nn.Linear: those are initialised before their parent, and keep it.
        self.up = nn.Parameter(torch.zeros(config.hidden_size, rank))

    def forward(self, estimates: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` estimates f^_{i+k} and embeddings of t_{i+k} -> ``[..., H]``."""
        return estimates + F.linear(self.strengths(estimates, embeddings), self.up)

    def strengths(self, estimates: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """How much of each column of U, ``[..., rank]``; arguments as in [`forward`]."""
        pairs = torch.cat((estimates, embeddings * self.embedding_scale), dim=-1)
        return F.silu(self.down(pairs))
