"""What a block position starts from: its own pair and its block's newest, through a matrix of its own.

Beyond the paper. In the plain relaxed causal layer the pair at block position j < k - 1 learns of its block's newest
pair, the best hint there is at the token it drafts, through attention only: through the values of a few key-value
heads, and after it has found the place by rotary position alone. Here its query and residual start from

    x'_j = W_j [x_j; x_newest]

Keys and values stay those of x, so that a cached pair serves in whatever block it is queried.
"""

from __future__ import annotations

import torch
from torch import nn

from .few_rows import few_row_linear


class BlockMixing(nn.Module):
    """k matrices ``[H, 2H]``, one a block position.

    Args:
        block_size: k.
        hidden_size: H.
    """

    def __init__(self, block_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block_size, hidden_size, 2 * hidden_size))

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Start near: a quarter of the own pair and three quarters of the newest."""
        size = self.weight.shape[1]
        nn.init.normal_(self.weight, std=std)
        identity = torch.eye(size, dtype=self.weight.dtype, device=self.weight.device)
        self.weight[:, :, :size] += 0.25 * identity
        self.weight[:, :, size:] += 0.75 * identity

    def forward(self, fused: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, S, H]`` fused pairs -> ``[B, S, H]``, what their queries and residuals start from.

        Args:
            fused: ``[B, S, H]``.
            place: ``[B, S]``, position of each column in its block, 0 to k - 1; by default blocks end at S.
        """
        block_size, (rows, columns, size) = self.weight.shape[0], fused.shape
        weight = self.weight.to(fused.dtype)
        if place is None and columns % block_size == 0:
            blocks = fused.view(rows, -1, block_size, size)
            pairs = torch.cat((blocks, blocks[:, :, -1:].expand_as(blocks)), dim=-1)
            own = [few_row_linear(pairs[:, :, position], weight[position]) for position in range(block_size)]
            return torch.stack(own, dim=2).view(rows, columns, size)
        if place is None:
            place = ((torch.arange(columns, device=fused.device) - columns) % block_size).expand(rows, -1)
        newest = (torch.arange(columns, device=fused.device) + block_size - 1 - place).clamp_max(columns - 1)
        pairs = torch.cat((fused, fused.gather(1, newest[:, :, None].expand(-1, -1, size))), dim=-1)
        mixed = nn.functional.linear(pairs, weight[0])
        for position in range(1, block_size):
            mixed = torch.where(place[:, :, None] == position, nn.functional.linear(pairs, weight[position]), mixed)
        return mixed
