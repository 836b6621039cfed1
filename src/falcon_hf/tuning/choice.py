"""Which drafter, passes m, width n and nodes N to use: those with the most predicted tokens per second.

    rate = E / (t_draft(widths of the passes) + t_verify(N) + t_rest(E))

E is the expected number of tokens of a round, the target's own included. Costs come from measurement
(``calibration.py``) or from a roofline (``roofline.py``); E from a replay of recorded ranks, or from an acceptance
model where there is none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..runtime.tree_shape import TreeShape, chain
from .acceptance import AcceptanceModel
from .errors import TuningError
from .static_tree import PricedTrees, best_nodes, widths

# Prices of a boundary node, in tokens, and caps on boundary nodes a pass: together they cover narrow and wide trees.
_PRICES = (0.01, 0.02, 0.04, 0.08, 0.16)
_WIDTH_CAPS = (1, 2, 3, 4, 6, 8)
# Rows of a batch for which a tree's size is found.
_BATCHES = (2, 4, 8, 16, 32)


class Costs(Protocol):
    """What a round costs, in seconds."""

    @property
    def plain_seconds(self) -> float:
        """One token without a drafter."""

    def draft_seconds(self, widths: Sequence[int]) -> float:
        """Drafting with passes of so many blocks each; none costs nothing."""

    def verify_seconds(self, nodes: int) -> float:
        """The target's forward over so many nodes, the root included."""

    def rest_seconds(self, tokens: float) -> float:
        """Everything else in a round that emits so many tokens."""


@dataclass(frozen=True)
class Option:
    """One drafter to choose from.

    Attributes:
        name: how the user calls it.
        model: gives scores, and so the trees that are tried.
        expected_tokens: E of a tree; the model's own by default (see [`AcceptanceModel.expected_tokens`]).
        costs: of this drafter with its target.
    """

    name: str
    model: AcceptanceModel
    costs: Costs
    expected_tokens: Callable[[TreeShape | None], float] | None = None


@dataclass(frozen=True)
class Prediction:
    """What a setting is expected to do.

    Attributes:
        drafter: the option's name.
        kind: where the tree comes from: ``tuned``, ``paper``, ``chain``, ``given``, or ``plain`` (no tree).
        block_size: k.
        shape: the tree; None for plain decoding.
        passes: m.
        width: n, the most blocks in one pass.
        nodes: N, the root included.
        tokens: E.
        round_seconds: of one round.
        tokens_per_second: E / round_seconds, the prefill left out.
        speedup: over plain decoding.
        dynamic: the config entry of a dynamic tree that is meant instead of ``shape``, which then is the static one of
            its size that E and seconds are of.
        lookup: the config's look-up beside a dynamic tree.
    """

    drafter: str
    kind: str
    block_size: int
    shape: TreeShape | None
    passes: int
    width: int
    nodes: int
    tokens: float
    round_seconds: float
    tokens_per_second: float
    speedup: float
    dynamic: dict[str, Any] | None = None
    lookup: dict[str, Any] | None = None

    @property
    def tree(self) -> Any:
        """What a drafter's config calls this tree: paths, or the entry of a dynamic one; None for plain decoding."""
        return self.dynamic or (None if self.shape is None else [list(path) for path in self.shape.paths])


def predict(option: Option, shape: TreeShape | None, kind: str) -> Prediction:
    """The prediction for one tree of one drafter; of plain decoding if ``shape`` is None."""
    k, costs = option.model.block_size, option.costs
    if shape is None:
        rate = 1.0 / costs.plain_seconds
        return Prediction(option.name, "plain", k, None, 0, 0, 1, 1.0, costs.plain_seconds, rate, 1.0)
    tokens = (option.expected_tokens or option.model.expected_tokens)(shape)
    blocks = widths(shape, k)
    seconds = costs.draft_seconds(blocks) + costs.verify_seconds(shape.size) + costs.rest_seconds(tokens)
    rate = tokens / seconds
    speedup = rate * costs.plain_seconds
    return Prediction(option.name, kind, k, shape, len(blocks), max(blocks), shape.size, tokens, seconds, rate, speedup)


def node_grid(most: int) -> list[int]:
    """Tree sizes worth trying: every one to 16, then in growing steps."""
    sizes = [*range(2, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 129, 8), *range(144, 1025, 32)]
    return [size for size in sizes if size < most] + [most] if most >= 2 else []


def tuned_trees(model: AcceptanceModel, passes: int, sizes: Sequence[int]) -> Iterator[TreeShape]:
    """The best trees of at most ``passes`` passes: for each size, unpriced, under width caps, and under prices."""
    if not sizes:
        return
    depth = min(passes * model.block_size, model.depth)
    for cap in (None, *_WIDTH_CAPS) if passes > 1 else (None,):
        nodes = [path for (_, path), _ in zip(best_nodes(model, depth, cap), range(max(sizes) - 1), strict=False)]
        yield from (TreeShape.from_paths(nodes[: size - 1]) for size in sizes if nodes)
    if passes > 1:
        for price in _PRICES:
            trees = PricedTrees(model, depth, price, max(sizes))
            yield from (tree for tree in map(trees.tree, sizes) if tree is not None)


@functools.lru_cache(maxsize=64)
def candidates(model: AcceptanceModel, max_passes: int, max_nodes: int) -> dict[TreeShape, str]:
    """All trees worth predicting for one drafter, each with its kind: tuned, chains, and the paper's.

    Tuned trees have ``max_nodes`` at most. The paper's is the rival to beat, so it is there whole whatever its size, if
    there are passes enough, and cut to fit besides. Costs play no part, so they are found once a model.
    """
    k, found = model.block_size, {}
    depth = min(max_passes * k, model.depth)
    for passes in range(1, max_passes + 1):
        found.update(dict.fromkeys(tuned_trees(model, passes, node_grid(max_nodes)), "tuned"))
    paper = TreeShape.paper(k)
    for cut in range(1, depth + 1):
        if cut == paper.depth or paper.truncate(cut).size <= max_nodes:
            found[paper.truncate(cut)] = "paper"
        if cut < max_nodes:
            found[chain(cut)] = "chain"
    return found


def choose(options: Iterable[Option], max_passes: int = 4, max_nodes: int = 64) -> list[Prediction]:
    """Predictions of all candidates of all drafters and of plain decoding, the fastest first.

    Raises:
        TuningError: if there is no drafter, or a limit is below what any tree needs.
    """
    options = list(options)
    if not options:
        raise TuningError("There is no drafter to choose from.")
    if max_passes < 1 or max_nodes < 2:
        raise TuningError("A tree needs at least 1 pass and 2 nodes.")
    found = [predict(options[0], None, "plain")]
    for option in options:
        found += [
            predict(option, shape, kind) for shape, kind in candidates(option.model, max_passes, max_nodes).items()
        ]
    return sorted(found, key=lambda prediction: -prediction.tokens_per_second)


def fitting(found: Iterable[Prediction], max_nodes: int) -> list[Prediction]:
    """Those with a tree of ``max_nodes`` at most, as a drafter may be given: the paper's may be larger. Never empty."""
    return [prediction for prediction in found if prediction.shape is not None and prediction.nodes <= max_nodes]


def batch_nodes(option: Option, best: Prediction, largest: int) -> list[list[int]]:
    """What ``DynamicTree.batch_nodes`` should say of a drafter whose best tree for one row is ``best``.

    A batch's forward is taken to cost what one row's over as many nodes does, and its first pass what one row's does.
    Batches of which that is not known, with more than ``largest`` nodes, get what the next smaller one does.
    """
    tokens: dict[int, float] = {}  # a round, by nodes
    for shape in tuned_trees(option.model, best.passes, node_grid(best.nodes)):
        expected = (option.expected_tokens or option.model.expected_tokens)(shape)
        tokens[shape.size] = max(tokens.get(shape.size, 0.0), expected)

    def rate(rows: int, size: int) -> float:
        passes = min(best.passes, -(-(size - 1) // option.model.block_size))  # a tree is no deeper than it is large
        blocks = [rows] + [rows * best.width] * (passes - 1)
        others = option.costs.draft_seconds(blocks) + option.costs.rest_seconds(rows * tokens[size])
        return tokens[size] / (others + option.costs.verify_seconds(rows * size))

    found: list[list[int]] = []
    fewest = best.nodes
    for rows in _BATCHES:
        sizes = [size for size in tokens if size <= fewest]
        if rows * fewest > largest or not sizes:
            break
        size = max(sizes, key=functools.partial(rate, rows))
        if size < fewest:
            found.append([rows, size - 1])
            fewest = size
    return found


def grid(option: Option, passes: Sequence[int], nodes: Sequence[int]) -> list[Prediction]:
    """The best tree that takes exactly m passes and N nodes, for each m and N: the settings of a sweep, in that order.

    Left out are sizes too small for so many passes; where there are not so many nodes, the tree has all there are.
    """
    found = []
    for m in passes:
        for size in nodes:
            shapes = dict.fromkeys([*tuned_trees(option.model, m, [size]), *_reaching(option.model, m, size)])
            # Trees that leave the last passes unused belong to another row of the sweep.
            full = [one for one in (predict(option, shape, "tuned") for shape in shapes) if one.passes == m]
            if full:
                found.append(max(full, key=lambda prediction: prediction.tokens_per_second))
    return found


def _reaching(model: AcceptanceModel, passes: int, nodes: int) -> Iterator[TreeShape]:
    """The best tree that has the likeliest path into the last pass, however small: none if that alone is too large."""
    path = list(chain((passes - 1) * model.block_size + 1).paths)
    if len(path) < nodes and len(path[-1]) <= model.depth:
        others = (own for _, own in best_nodes(model, min(passes * model.block_size, model.depth)) if own not in path)
        yield TreeShape.from_paths(path + list(itertools.islice(others, nodes - 1 - len(path))))
