"""How the chance of acceptance follows from the drafter's own probability: what dynamic trees need.

A dynamic tree scores a candidate by the drafter's probability for it. That probability is not the chance that the
target agrees; along recorded texts both are known. For each pass and block position, candidates whose parent was
accepted are counted by the logarithm of their probability, accepted or not; the chance is the share accepted, made
monotone. The tables are what ``runtime/dynamic_tree.py`` takes as ``calibration``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.dynamic_tree import Calibration
from .errors import TuningError
from .monotone import isotonic

# Log probabilities at which the chance is kept: unlikelier candidates are rarely drafted, and few.
_POINTS = np.array([-8, -7, -6, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.7, -0.4, -0.2, -0.1, 0.0])
# A chance is drawn to its position's over all passes, that to the probability itself, by so many candidates' weight.
_PRIOR_WEIGHT = 20.0


@dataclass(frozen=True)
class ConfidenceTables:
    """``acceptance[pass][position][i]``: the chance of acceptance at ``log_probability[i]``, parent accepted."""

    log_probability: tuple[float, ...]
    acceptance: tuple[tuple[tuple[float, ...], ...], ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values, which are also a dynamic tree's ``calibration`` in a drafter's config."""
        return {
            "log_probability": list(self.log_probability),
            "acceptance": [[list(table) for table in positions] for positions in self.acceptance],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ConfidenceTables:
        """From [`to_json`]'s.

        Raises:
            TuningError: if it is something else.
        """
        try:
            found = Calibration.from_config(value, len(value["acceptance"][0]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TuningError(f"The calibration's confidence tables are damaged: {error}") from error
        return cls(found.log_probability, found.acceptance)


class ConfidenceCounts:
    """Candidates by depth and log probability: how many there were, how many were accepted."""

    def __init__(self, depth: int) -> None:
        self._trials = np.zeros((depth, len(_POINTS)))
        self._hits = np.zeros((depth, len(_POINTS)))

    def add(self, ranks: np.ndarray, log_probability: np.ndarray, known: np.ndarray) -> None:
        """Count one text.

        Args:
            ranks: ``[positions, D]``, of the true tokens, -1 for none of the candidates.
            log_probability: ``[positions, D, W]`` of the candidates.
            known: ``[positions]``, how many tokens of the text are left.
        """
        nearest = np.abs(log_probability[..., None] - _POINTS).argmin(-1)
        alive = np.ones(len(ranks), dtype=bool)
        for d in range(ranks.shape[1]):
            alive &= d < known
            self._trials[d] += np.bincount(nearest[alive, d].ravel(), minlength=len(_POINTS))
            alive &= ranks[:, d] >= 0
            accepted = nearest[alive, d, ranks[alive, d]]
            self._hits[d] += np.bincount(accepted, minlength=len(_POINTS))

    def tables(self, block_size: int) -> ConfidenceTables:
        """The tables of a drafter of block size k, one a depth."""
        passes = len(self._trials) // block_size
        rows = []
        for position in range(block_size):
            every = slice(position, None, block_size)
            pooled = _chances(self._hits[every].sum(0), self._trials[every].sum(0), np.exp(_POINTS))
            rows.append(
                [
                    _chances(self._hits[d], self._trials[d], pooled)
                    for d in range(position, passes * block_size, block_size)
                ]
            )
        acceptance = tuple(tuple(tuple(rows[j][m].tolist()) for j in range(block_size)) for m in range(passes))
        return ConfidenceTables(tuple(_POINTS.tolist()), acceptance)


def _chances(hits: np.ndarray, trials: np.ndarray, prior: np.ndarray) -> np.ndarray:
    weights = trials + _PRIOR_WEIGHT
    return np.asarray(isotonic(((hits + _PRIOR_WEIGHT * prior) / weights).tolist(), weights.tolist()))
