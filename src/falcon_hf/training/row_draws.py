"""Random numbers of a training step, one stream a row: the same whatever process a row is on, and after a resume.

A row's stream is seeded with the run's seed, the optimizer step and the row's place in the global batch. So nothing has
to be saved, the global generators are left alone, and two processes draw what one would.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

_MIX = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers (splitmix64's finisher)."""
    state = 0
    for number in numbers:
        state = (state + number + _MIX) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


class RowDraws:
    """Streams of uniform draws, one a row.

    Args:
        seed: the run's.
        step: optimizer steps done.
        rows: each row's place in the global batch of the step.
        device: where the draws are made.
    """

    def __init__(self, seed: int, step: int, rows: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._seeds = [mix(seed, step, row) for row in rows]

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        """``[B, *shape]`` float32 draws in [0, 1), the same each time for a ``purpose``.

        Each purpose has streams of its own: how many draws one takes depends on padding, so on a row's neighbours.
        """
        number = zlib.crc32(purpose.encode())
        out = torch.empty(len(self._seeds), *shape, device=self._device)
        for row, seed in zip(out, self._seeds, strict=True):
            row.uniform_(generator=torch.Generator(self._device).manual_seed(mix(seed, number)))
        return out
