"""What training steps note between two logs: means of values, positions seen and their speed."""

from __future__ import annotations

import time
from typing import Any

import torch


class TrainingNotes:
    """Sums on the device, so that a step waits for none of its values.

    Attributes:
        positions_seen: positions with a loss that this process has seen, those before a resume included.
    """

    def __init__(self, device: torch.device) -> None:
        self.positions_seen = 0
        self._began = time.perf_counter()
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}  # sum and count
        self._since = (time.perf_counter(), 0)  # when the last log was, and the positions seen by then

    def add(self, **values: torch.Tensor) -> None:
        """Add scalars to what the next log averages."""
        for name, value in values.items():
            value = value.detach().to(self._device, torch.float32)
            entry = torch.stack([value, torch.ones_like(value)])
            self._sums[name] = entry if name not in self._sums else self._sums[name] + entry

    @property
    def seconds(self) -> float:
        """Since the start, and before a resume up to its checkpoint."""
        return time.perf_counter() - self._began

    def so_far(self) -> dict[str, float]:
        """What a checkpoint's log has to hold for [`resume`]."""
        return {"positions_seen": self.positions_seen, "seconds": round(self.seconds, 1)}

    def resume(self, log: list[dict[str, Any]]) -> None:
        """Go on from the run whose log this is."""
        self.positions_seen = int(max((entry.get("positions_seen", 0) for entry in log), default=0))
        self._began -= max((entry.get("seconds", 0.0) for entry in log), default=0.0)
        self._since = (time.perf_counter(), self.positions_seen)

    def leave_out(self, seconds: float) -> None:
        """Take ``seconds`` that were no training out of the speed."""
        then, seen = self._since
        self._since = (then + seconds, seen)

    def take(self) -> dict[str, float]:
        """Means since the last log, positions seen, and positions a second; begins anew."""
        then, seen = self._since
        now = time.perf_counter()
        means = {name: float(total / count) for name, (total, count) in self._sums.items()}
        speed = (self.positions_seen - seen) / max(now - then, 1e-9)
        self._sums, self._since = {}, (now, self.positions_seen)
        return {**means, "positions_seen": self.positions_seen, "positions_per_second": round(speed, 1)}
