"""Acceptance: how likely each node of a tree is the target's own text.

Depths count from 1; depth d is position ((d - 1) mod k) + 1 of pass (d - 1) // k. A *rank record* holds, for every
position of the target's greedy texts, at which rank each of the next D tokens stood in the drafter's laws when those
were drafted along the text itself (see ``rank_measurement.py``). From it come

* the *rates* p_d(r | c): the chance that the child of rank r at depth d is the target's token given that its parent was
  accepted and had rank class c. Inside a block the laws do not depend on the parent, but whether the parent was a
  likely token says how easy the text is here, so the class matters;
* the *scores* f(v) = product of the rates along v's path, and E(T) = 1 + sum of f(v), the expected tokens of a round;
* *replay*: the rounds that a given tree would have made over the recorded texts, exactly. Rounds start where the last
  one ended, so they meet hard places more often than a mean over all positions does; replay knows, scores do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..runtime.tree_shape import Path, TreeShape
from .errors import TuningError
from .monotone import antitonic

MISS = -1
"""In a rank record: the token was not among the W likeliest, or the text had ended."""

# Parents of ranks 0, 1, 2-3 and 4 on: enough to tell sure from unsure, few enough to have samples. The root is of 0.
_CLASS_STARTS = (0, 1, 2, 4)
# A class's rate is drawn to its depth's, a depth's to its position's over all passes, by so many samples' weight.
_PRIOR_WEIGHT = 20.0


def rank_class(rank: int) -> int:
    """Class of a parent's rank: 0, 1, 2-3 or 4 on."""
    return sum(rank >= start for start in _CLASS_STARTS) - 1


class AcceptanceModel:
    """The rates p_d(r | c) of one drafter: ``rates[d - 1][c]`` is a non-increasing list over ranks, of sum at most 1.

    Attributes:
        block_size: k.
        depth: D, the deepest depth it knows.
        width: W, ranks it knows; a child of a higher rank is never accepted.
    """

    def __init__(self, block_size: int, rates: Sequence[Sequence[Sequence[float]]]) -> None:
        self.block_size = block_size
        self.rates = rates
        self.depth = len(rates)
        self.width = len(rates[0][0])

    def rate(self, depth: int, parent_rank: int, rank: int) -> float:
        """p_d(r | class of the parent's rank); 0 beyond what is known."""
        if depth > self.depth or rank >= self.width:
            return 0.0
        return self.rates[depth - 1][rank_class(parent_rank)][rank]

    def score(self, path: Path) -> float:
        """The score f of the node at the end of ``path``: the chance that it is accepted."""
        product, parent = 1.0, 0
        for depth, rank in enumerate(path, start=1):
            product *= self.rate(depth, parent, rank)
            parent = rank
        return product

    def expected_tokens(self, shape: TreeShape | None) -> float:
        """E: tokens of a round, the target's own included; 1 without a tree."""
        return 1.0 + (sum(self.score(path) for path in shape.paths) if shape else 0.0)


class ParametricAcceptance(AcceptanceModel):
    """A family of models with three numbers, for planning where nothing was measured.

    The chance that the token is among the r + 1 likeliest is 1 - (1 - a_j)^((r + 1)^s) at block position j, with
    a_j = top1 * decay^(j - 1); the same in every pass and for every parent. With a = 0.41 and 0.30 and s = 0.4 it
    reproduces a trained drafter's measured top-1/3/10 of 41/56/69% and 30/46/60% to five points.
    """

    def __init__(
        self, block_size: int, depth: int, top1: float, decay: float = 0.75, tail: float = 0.4, width: int = 20
    ) -> None:
        """``top1`` is a_1, ``decay`` its factor a block position, ``tail`` is s.

        Raises:
            TuningError: on a number out of range.
        """
        if not (0 < top1 <= 1 and 0 < decay <= 1 and 0 < tail <= 1 and block_size >= 1 and depth >= 1 and width >= 1):
            raise TuningError("top1, decay and tail lie in (0, 1], sizes are at least 1.")
        rates = []
        for d in range(depth):
            first = top1 * decay ** (d % block_size)
            known = [1 - (1 - first) ** ((rank + 1) ** tail) for rank in range(width)]
            own = antitonic([known[0], *(b - a for a, b in itertools.pairwise(known))])
            rates.append([own] * len(_CLASS_STARTS))
        super().__init__(block_size, rates)


@dataclass(frozen=True)
class RankRecord:
    """Ranks along the target's greedy texts, one array a text.

    Attributes:
        block_size: k of the drafter.
        width: W, ranks recorded; everything beyond is a MISS.
        ranks: one ``[positions, D]`` integer array a text; row i is a round whose root is the text's token i.
    """

    block_size: int
    width: int
    ranks: tuple[np.ndarray, ...]

    @property
    def depth(self) -> int:
        """D."""
        return int(self.ranks[0].shape[1])

    @cached_property
    def samples(self) -> np.ndarray:
        """``[all positions, D]``."""
        return np.concatenate(self.ranks)

    @cached_property
    def model(self) -> AcceptanceModel:
        """The rates, each drawn to the next coarser estimate where samples are few, and made monotone in the rank."""
        k, width = self.block_size, self.width
        counts = np.zeros((self.depth, len(_CLASS_STARTS), width))
        trials = np.zeros((self.depth, len(_CLASS_STARTS)))
        alive = np.ones(len(self.samples), dtype=bool)
        classes = np.zeros(len(self.samples), dtype=np.int64)
        for d in range(self.depth):
            rank = self.samples[:, d]
            for c in range(len(_CLASS_STARTS)):
                own = alive & (classes == c)
                trials[d, c] = own.sum()
                counts[d, c] = np.bincount(rank[own & (rank >= 0)], minlength=width)[:width]
            alive &= rank >= 0
            classes = np.searchsorted(_CLASS_STARTS, rank.clip(0), side="right") - 1
        rates = []
        for d in range(self.depth):
            position = slice(d % k, None, k)
            coarse = _shares(counts[position].sum((0, 1)), trials[position].sum(), None)
            middle = _shares(counts[d].sum(0), trials[d].sum(), coarse)
            rates.append([_shares(counts[d, c], trials[d, c], middle).tolist() for c in range(len(_CLASS_STARTS))])
        return AcceptanceModel(k, rates)

    def replay(self, shape: TreeShape | None) -> float:
        """Tokens a round that greedy decoding with this tree makes over the recorded texts; exact, no model.

        Raises:
            TuningError: if the tree is deeper than the record.
        """
        if shape is None:
            return 1.0
        if shape.depth > self.depth:
            raise TuningError(f"The tree has depth {shape.depth}, but ranks are known only to depth {self.depth}.")
        child = np.full((shape.size + 1, self.width + 1), shape.size)  # the last node is "none", and has no child
        for node, (path, parent) in enumerate(zip(shape.paths, shape.parents[1:], strict=True), start=1):
            if path[-1] < self.width:
                child[parent, path[-1]] = node
        rounds = tokens = 0
        for ranks in self.ranks:
            reached = np.zeros(len(ranks), dtype=np.int64)
            accepted = np.zeros(len(ranks), dtype=np.int64)
            for d in range(shape.depth):
                reached = child[reached, ranks[:, d]]  # MISS is -1, the column that no child fills
                accepted += reached < shape.size
            at, steps = 0, accepted.tolist()
            while at < len(steps):
                at += steps[at] + 1
                rounds += 1
            tokens += min(at, len(steps))  # the last round emits nothing behind the end
        return tokens / rounds

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        return {"block_size": self.block_size, "width": self.width, "ranks": [own.tolist() for own in self.ranks]}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> RankRecord:
        """From [`to_json`]'s.

        Raises:
            TuningError: if it is something else.
        """
        try:
            given: Iterable[object] = value["ranks"]  # type: ignore[assignment]
            ranks = tuple(np.asarray(own, dtype=np.int64) for own in given)
            record = cls(int(value["block_size"]), int(value["width"]), ranks)  # type: ignore[call-overload]
        except (KeyError, TypeError, ValueError) as error:
            raise TuningError(f"The calibration's rank record is damaged: {error}.") from error
        sizes = {own.shape[1] if own.ndim == 2 else 0 for own in ranks}
        inside = all(own.size and own.min() >= MISS and own.max() < record.width for own in ranks)
        if len(sizes) != 1 or 0 in sizes or not inside:
            raise TuningError(
                "The calibration's rank record is damaged: ranks are [positions, depth] from -1 to width."
            )
        return record


def _shares(counts: np.ndarray, trials: float, prior: np.ndarray | None) -> np.ndarray:
    """Share of each rank, drawn to ``prior``; non-increasing."""
    weight = 0.0 if prior is None else _PRIOR_WEIGHT
    shares = (counts + (0.0 if prior is None else weight * prior)) / max(trials + weight, 1.0)
    return np.asarray(antitonic(shares.tolist()))
