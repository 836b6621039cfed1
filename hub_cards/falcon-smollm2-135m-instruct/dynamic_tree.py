"""What a dynamic tree may be: a budget of nodes, passes and blocks, and how the drafter's confidence is read.

The shape itself is found anew each round by ``tree_growth.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

KIND = "dynamic"
# A calibrated acceptance below this is this: its logarithm has to be finite.
_LEAST_ACCEPTANCE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """Maps a candidate's draft probability to its chance of acceptance given that its parent was accepted.

    A table a drafter pass and block position, linear between its points and flat beyond them.

    Attributes:
        log_probability: ascending points x_0 to x_M-1, natural logarithms of draft probabilities.
        acceptance: ``acceptance[pass][position][i]``, the chance at x_i, from 0 to 1. Passes beyond the last use it.
    """

    log_probability: tuple[float, ...]
    acceptance: tuple[tuple[tuple[float, ...], ...], ...]

    @classmethod
    def from_config(cls, entry: Any, block_size: int) -> Calibration:
        """From a config's entry of the same two fields.

        Raises:
            ValueError: if the tables do not fit together, or hold what is no chance.
        """
        if not isinstance(entry, Mapping) or set(entry) != {"log_probability", "acceptance"}:
            raise ValueError("calibration must have the fields log_probability and acceptance, and no others.")
        points = tuple(entry["log_probability"])
        passes = tuple(tuple(tuple(table) for table in positions) for positions in entry["acceptance"])
        if len(points) < 2 or any(low >= high for low, high in itertools.pairwise(points)):
            raise ValueError("calibration needs at least two ascending points of log_probability.")
        if not passes or any(len(positions) != block_size for positions in passes):
            raise ValueError(f"calibration needs {block_size} tables (the block size) for each of one or more passes.")
        for positions in passes:
            for table in positions:
                if len(table) != len(points) or not all(0 <= chance <= 1 for chance in table):
                    raise ValueError(f"A calibration table must have {len(points)} chances from 0 to 1, got {table}.")
        return cls(points, passes)

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Points ``[M]`` and tables ``[passes, k, M]``."""
        return torch.tensor(self.log_probability, device=device), torch.tensor(self.acceptance, device=device)


def calibrated(log_probability: torch.Tensor, points: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Logarithms of acceptance ``[B, W, n, b]``, at most 0, by tables ``[n, M]`` (or one, ``[1, M]``) over M points."""
    upper = torch.bucketize(log_probability.contiguous(), points).clamp(1, len(points) - 1)
    low, high = points[upper - 1], points[upper]
    share = ((log_probability - low) / (high - low)).clamp(0, 1)
    tables = tables.expand(*log_probability.shape[:3], -1)
    below, above = tables.gather(-1, upper - 1), tables.gather(-1, upper)
    return torch.lerp(below, above, share).clamp(_LEAST_ACCEPTANCE, 1).log()


@dataclass(frozen=True)
class DynamicTree:
    """A tree whose shape follows the drafter's confidence, at most ``nodes`` drafted nodes in ``passes`` passes.

    Attributes:
        nodes: N, drafted nodes kept for verification, the root not counted.
        passes: m, drafter passes a round.
        width: n, boundary nodes that each pass but the first continues.
        candidates: b, likeliest tokens of each law that may become nodes.
        continued: likeliest nodes of a block's level that get children inside the block, where each node has a law of
            its own to compute (a drafter with a correction; else all have children).
        calibration: how acceptance follows from draft probability; None to take the one for the other.
        pass_cost: the time of a drafter pass over the time of all else in a round, most of which is verification. If
            given, a pass that would not pay is left out, at one device sync a pass; None never stops early and never
            syncs.
        batch_nodes: pairs (B, N): a batch of B rows or more drafts at most N nodes a row, so that all rows' nodes
            together are not more than a verification is fast for. B rises; empty for ``nodes`` always.
    """

    nodes: int
    passes: int = 2
    width: int = 4
    candidates: int = 10
    continued: int = 5
    calibration: Calibration | None = None
    pass_cost: float | None = None
    batch_nodes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_config(cls, entry: Mapping[str, Any], block_size: int) -> DynamicTree:
        """From a config's ``tree``: ``{"kind": "dynamic", "nodes": 24, ...}``, the fields of this class.

        Raises:
            ValueError: on a missing, unknown or impossible field; the message names it.
        """
        fields = {name: value for name, value in entry.items() if name != "kind"}
        known = {field.name for field in dataclasses.fields(cls)}
        if entry.get("kind") != KIND or "nodes" not in fields or not set(fields) <= known:
            raise ValueError(
                f"a tree that is no list has kind {KIND!r} and nodes, and may have "
                f"{', '.join(sorted(known - {'nodes'}))}; got {dict(entry)}."
            )
        for name in ("nodes", "passes", "width", "candidates", "continued"):
            value = fields.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        if fields.get("calibration") is not None:
            fields["calibration"] = Calibration.from_config(fields["calibration"], block_size)
        cost = fields.get("pass_cost")
        if cost is not None and not (isinstance(cost, int | float) and 0 < cost < math.inf):
            raise ValueError(f"pass_cost must be positive or None, got {cost!r}.")
        fields["batch_nodes"] = _batch_nodes(fields.get("batch_nodes", ()))
        return cls(**fields)

    def for_rows(self, rows: int) -> DynamicTree:
        """The tree that each row of a batch of ``rows`` gets."""
        fewer = [nodes for least, nodes in self.batch_nodes if least <= rows]
        return dataclasses.replace(self, nodes=min([self.nodes, *fewer]))

    @property
    def size(self) -> int:
        """Nodes verified at most, the root included."""
        return self.nodes + 1

    def depth(self, block_size: int) -> int:
        """Depth of the deepest node there can be."""
        return self.passes * block_size


def _batch_nodes(pairs: Any) -> tuple[tuple[int, int], ...]:
    """A config's ``batch_nodes``, checked.

    Raises:
        ValueError: if they are no such pairs.
    """
    try:
        found = tuple((least, most) for least, most in pairs)
        numbers = all(type(number) is int for pair in found for number in pair)
        ordered = numbers and all(low[0] < high[0] for low, high in itertools.pairwise(((1, 0), *found)))
    except (TypeError, ValueError):
        ordered = False
    if not ordered or any(most < 1 for _, most in found):
        raise ValueError(
            "batch_nodes must be pairs [rows, nodes] with rising rows from 2 on and at least one node, such as "
            f"[[4, 3], [8, 2]]; got {pairs!r}."
        )
    return found
