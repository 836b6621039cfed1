"""Monotone curves through measured points: isotonic regression, and straight lines between the fitted points.

Costs cannot fall with size, nor acceptance rise with rank; what measured points say against it is noise, and pooling
neighbours that violate the order is the least-squares answer (Robertson, Wright and Dykstra, "Order Restricted
Statistical Inference", 1988, section 1.2).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import TuningError


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The non-decreasing sequence closest to ``values`` in weighted least squares (pool adjacent violators).

    Args:
        values: in order.
        weights: one positive weight a value; all 1 by default.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, values pooled
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        mean, total, count = float(value), float(weight), 1
        while blocks and blocks[-1][0] > mean:
            other, other_weight, other_count = blocks.pop()
            mean = (mean * total + other * other_weight) / (total + other_weight)
            total, count = total + other_weight, count + other_count
        blocks.append((mean, total, count))
    return [mean for mean, _, count in blocks for _ in range(count)]


def antitonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The non-increasing sequence closest to ``values``; as [`isotonic`]."""
    return isotonic(list(values)[::-1], None if weights is None else list(weights)[::-1])[::-1]


@dataclass(frozen=True)
class Curve:
    """A non-decreasing, piecewise linear function: constant before its first point, straight on after its last.

    Attributes:
        xs: ascending.
        ys: the fitted values there.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """Through measured (x, y); several y of one x are averaged.

        Raises:
            TuningError: if there is no point.
        """
        if not points:
            raise TuningError("A cost curve needs at least one measured point.")
        measured: dict[float, list[float]] = {}
        for x, y in points:
            measured.setdefault(float(x), []).append(float(y))
        xs = sorted(measured)
        means = [sum(measured[x]) / len(measured[x]) for x in xs]
        return cls(tuple(xs), tuple(isotonic(means, [len(measured[x]) for x in xs])))

    def __call__(self, x: float) -> float:
        """The value at ``x``."""
        if x <= self.xs[0] or len(self.xs) == 1:
            return self.ys[0]
        right = min(bisect.bisect_left(self.xs, x), len(self.xs) - 1)
        left = right - 1
        slope = (self.ys[right] - self.ys[left]) / (self.xs[right] - self.xs[left])
        return self.ys[left] + slope * (x - self.xs[left])
