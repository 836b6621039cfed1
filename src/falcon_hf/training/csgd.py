"""Coupled Sequential Glancing Distillation (CSGD; paper, section 3.3), each part a function of its own.

A first pass says how far the drafter is from the text; in proportion to that, some pairs are shown what they are asked
for: feature AND token of their column (coupled) are replaced by the true pair one block ahead, in runs of consecutive
columns within a block (sequential). As training goes on, fewer are.

Letters: B rows, S columns of pairs, block size k; column c holds pair c - (k - 1) and estimates f_{c+1} (see
``modeling_falcon_drafter.py``). All functions take any B and k and have no loop over rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def draw_block_offsets(uniform: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[B]`` draws in [0, 1) -> ``[B]`` block alignments in [0, k), so that training meets what inference will."""
    return (uniform * block_size).long().clamp_max(block_size - 1)


def feature_noise(uniform: torch.Tensor, amplitude: float) -> torch.Tensor:
    """Draws in [0, 1) -> noise U(-amplitude, amplitude) for input features (the paper: 0.1)."""
    return uniform.mul(2 * amplitude).sub_(amplitude)


def glance_lambda(progress: float, start: float = 0.4) -> float:
    """The schedule lambda = start * (1 - progress), progress 0 to 1 (the paper: 0.4 * (ep_t - ep_c) / ep_t)."""
    return start * (1.0 - min(max(progress, 0.0), 1.0))


def hamming_distance(drafted: torch.Tensor, said: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """How many of the counted tokens were drafted wrong, row by row.

    Args:
        drafted: ``[B, S]``, the first pass's likeliest tokens.
        said: ``[B, S]``, the target's.
        counted: ``[B, S]`` bool, columns with a loss.

    Returns:
        ``[B]`` long.
    """
    return ((drafted != said) & counted).sum(-1)


def glance_count(distance: torch.Tensor, weight: float) -> torch.Tensor:
    """N = lambda * d, rounded: ``[B]`` distances -> ``[B]`` long."""
    return (distance * weight + 0.5).long()


def choose_glanced(
    counts: torch.Tensor,
    candidates: torch.Tensor,
    block_offset: torch.Tensor,
    block_size: int,
    uniform: torch.Tensor,
    longest_run: int | None = None,
) -> torch.Tensor:
    """Which columns are replaced: N a row, in runs of consecutive columns, one run in each block that has any.

    Blocks come in random order, each with a run, until N columns are chosen; the last run is cut. A run's length is
    uniform, and so is its begin, from where its end just reaches the block to the block's last place, so that every
    place of a block is as likely to be replaced. A row whose runs hold fewer than N columns gets those.

    Args:
        counts: ``[B]``, N.
        candidates: ``[B, S]`` bool, columns that may be replaced.
        block_offset: ``[B]`` in [0, k).
        block_size: k.
        uniform: ``[B, S // k + 2, 3]`` draws in [0, 1): each block's place in the order, its run's begin and length.
        longest_run: at most so many columns of a block; k by default. With k - 1, no block is shown all its answers.

    Returns:
        ``[B, S]`` bool.
    """
    columns = candidates.shape[1]
    longest = block_size if longest_run is None else min(longest_run, block_size)
    placed = torch.arange(columns, device=candidates.device)[None] + block_offset[:, None]
    block, place = placed // block_size, placed % block_size
    length = 1 + (uniform[..., 2] * longest).long().clamp_max(longest - 1)
    begins = block_size + length - 1
    begin = (uniform[..., 1] * begins).long().clamp_max(begins - 1) - (length - 1)
    end = begin + length
    in_run = candidates & (place >= begin.gather(1, block)) & (place < end.gather(1, block))
    per_block = torch.zeros_like(uniform[..., 0], dtype=torch.long).scatter_add_(1, block, in_run.long())
    order = uniform[..., 0].argsort(dim=1)
    ordered = per_block.gather(1, order)
    before = torch.empty_like(per_block).scatter_(1, order, ordered.cumsum(1) - ordered)
    # Place of a column among the chosen ones: those of earlier blocks in the order, and those before it in its run.
    first_in_block = per_block.cumsum(1) - per_block  # columns of runs in blocks to the left
    rank = in_run.long().cumsum(1) - 1 - first_in_block.gather(1, block) + before.gather(1, block)
    return in_run & (rank < counts[:, None])


def replace_coupled(pairs: torch.Tensor, replaced: torch.Tensor, block_size: int) -> torch.Tensor:
    """Put the true pair one block ahead into the replaced columns.

    To be called for features and for tokens with the same ``replaced``: that is the coupling.

    Args:
        pairs: ``[B, S, H]`` features or ``[B, S]`` tokens.
        replaced: ``[B, S]`` bool; the k last columns have nothing ahead of them and get zeros.
        block_size: k.
    """
    if pairs.ndim == 3:
        return torch.where(replaced[..., None], F.pad(pairs[:, block_size:], (0, 0, 0, block_size)), pairs)
    return torch.where(replaced, F.pad(pairs[:, block_size:], (0, block_size)), pairs)
