"""Whole numbers that the host knows, as tensors of a device that is at work.

``torch.tensor(numbers, device="cuda")`` and an index that is a list wait until the device has done all it was given,
because memory that may be swapped out is copied by way of the driver. From pinned memory the copy is queued like any
other work. ``tests/runtime/test_drafting_syncs.py`` holds that a round copies numbers in no other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """``numbers`` as an int64 tensor of the same shape on ``device``, without waiting for it."""
    host = torch.from_numpy(numpy.asarray(numbers, dtype=numpy.int64))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
