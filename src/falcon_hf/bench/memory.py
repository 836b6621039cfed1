"""Peak memory of a stretch of work: the accelerator's where the target is on one, else the process's."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> bool:
    """Start a new peak; False where this system cannot (no CUDA device, and not Linux or a sandbox)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5", encoding="ascii")  # Linux: sets the high-water mark to the present size
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """Peak since [`reset_peak`]: bytes that torch allocated on a CUDA device, or the process's resident bytes.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return None
