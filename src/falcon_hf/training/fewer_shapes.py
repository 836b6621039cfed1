"""Fewer shapes for a CPU in half precision, whose kernels are machine code made for one shape each.

oneDNN generates a product's code when it first meets a shape, and keeps 1,024 of them. A batch has as many columns as
its longest dialogue and as many positions with a loss as it happens to have, so most products of a step were new ones:
30% of a step's time on 2 threads of a CPU with AMX. So columns, positions and the head's rows are rounded up here; what
fills them has no loss (``tests/training/test_fewer_shapes.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..runtime.half_precision import HALF_PRECISION

COLUMNS = 32
POSITIONS = 128
ROWS = 64


def makes_code_by_shape(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products there are worth fewer shapes; in float32 a CPU has kernels for all shapes, as a GPU has."""
    return device.type == "cpu" and dtype in HALF_PRECISION


def widened(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch ``[B, L, ...]`` with padding up to the next multiple of ``COLUMNS``; its lengths stay as they are."""
    missing = -batch["input_ids"].shape[1] % COLUMNS
    if missing == 0:
        return batch
    return {
        name: F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing)) if value.ndim > 1 else value
        for name, value in batch.items()
    }


def filled(wanted: torch.Tensor) -> torch.Tensor:
    """``[R, S]`` bool: ``wanted`` and, as far as there are, others that make them a multiple of ``POSITIONS``."""
    flat = wanted.flatten()
    missing = -int(flat.sum()) % POSITIONS
    spare = (~flat).nonzero()[:missing, 0]
    return flat.index_fill(0, spare, True).view_as(wanted)


def padded_rows(rows: torch.Tensor) -> torch.Tensor:
    """``[n, H]`` with rows of zeros up to the next multiple of ``ROWS``."""
    missing = -rows.shape[0] % ROWS
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
