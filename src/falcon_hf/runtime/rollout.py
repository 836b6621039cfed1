"""Masks, pairs and keys of the training forward: the relaxed causal pass, and passes over the drafter's own features.

At inference the first pass of a draft reads true features, the later ones the drafter's own. Training does the same
for every block of a text at once. Letters as in ``modeling_falcon_drafter.py``; b is the block of a column. In pass p
the pair in column c is (f^ that pass p - 1 made in column c - k, true token), which estimates the f of the same index
as the true pair it stands for. It sees what it would see in a draft that began p - 1 blocks ago:

    pairs of pass 1 (true)        of blocks up to b - (p - 1)
    pairs of pass s, 1 < s <= p   of block b - (p - s)

``tests/runtime/test_rollout.py`` holds this against drafting each block alone.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


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


def rollout_mask(
    length: int, block_size: int, offset: torch.Tensor, number: int, pair_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What pass ``number`` (2, 3, ...) sees of the pairs of passes 1 to ``number``, which lie one behind the other.

    Args:
        length: S, columns of the pair sequence.
        block_size: k.
        offset: ``[R]``, each row's block alignment.
        number: p.
        pair_mask: ``[R, S]`` bool, False for padding.

    Returns:
        ``[R, 1, S, p * S]`` bool. No row is empty: a column sees its own pair.
    """
    block = (torch.arange(length, device=offset.device)[None] + offset[:, None]) // block_size
    distance = block[:, :, None] - block[:, None, :]  # [R, query, key]
    true_pairs = distance >= number - 1
    if pair_mask is not None:
        true_pairs = true_pairs & pair_mask[:, None, :]
    own = [distance == number - earlier for earlier in range(2, number + 1)]
    return torch.cat((true_pairs, *own), dim=-1)[:, None]


def own_pairs(estimates: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[R, S, H]`` estimates of one pass -> the features of the next pass's pairs: those of k columns before."""
    return F.pad(estimates[:, :-block_size], (0, 0, block_size, 0))


class RolloutKeys:
    """Keys and values of all passes so far, pass behind pass; stands where a cache stands at inference."""

    def __init__(self, num_layers: int) -> None:
        self._held: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a pass's ``[R, heads, S, head_dim]`` and return all passes' ``[R, heads, p * S, head_dim]``."""
        held = self._held[layer]
        if held is not None:
            keys, values = torch.cat((held[0], keys), dim=2), torch.cat((held[1], values), dim=2)
        self._held[layer] = keys, values
        return keys, values

    def keep_rows(self, rows: int) -> None:
        """Keep the first ``rows`` rows."""
        self._held = [None if held is None else (held[0][:rows], held[1][:rows]) for held in self._held]
