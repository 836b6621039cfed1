"""The choice of passes, width, nodes and drafter, under costs made up for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_hf import TreeShape
from falcon_hf.runtime.tree_shape import chain
from falcon_hf.tuning.acceptance import AcceptanceModel, ParametricAcceptance
from falcon_hf.tuning.choice import Option, batch_nodes, choose, grid, node_grid, predict
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.static_tree import widths

from .test_static_tree import TREES, models


@dataclass(frozen=True)
class LinearCosts:
    """Seconds that grow linearly: a pass, a block in it, a node."""

    plain_seconds: float = 1.0
    each_pass: float = 0.1
    each_block: float = 0.0
    each_node: float = 0.01
    rest: float = 0.05

    def draft_seconds(self, widths: Sequence[int]) -> float:
        return sum(self.each_pass + self.each_block * width for width in widths)

    def verify_seconds(self, nodes: int) -> float:
        return self.plain_seconds + self.each_node * (nodes - 1)

    def rest_seconds(self, tokens: float) -> float:
        return self.rest + 0.001 * tokens


costs = st.builds(
    LinearCosts,
    each_pass=st.floats(0.001, 0.5),
    each_block=st.floats(0, 0.1),
    each_node=st.floats(0.0001, 0.2),
    rest=st.floats(0, 0.1),
)


@settings(max_examples=25, deadline=None)
@given(models(), costs)
def test_never_worse_than_paper_chain_or_plain(model, own):
    option = Option("d", model, own)
    best = choose([option], 3, 24)[0]
    k = model.block_size
    rivals = [chain(length) for length in range(1, min(3 * k, 4) + 1)]
    rivals += [TreeShape.paper(k).truncate(depth) for depth in range(1, min(3 * k, 4) + 1)]
    for shape in [None, *(rival for rival in rivals if rival.size <= 24)]:
        assert best.tokens_per_second >= predict(option, shape, "given").tokens_per_second - 1e-12


@settings(max_examples=25, deadline=None)
@given(models(width=2), costs)
def test_equals_brute_force_over_all_small_trees(model, own):
    """Blocks cost nothing extra, so the best rate is over all trees of at most six nodes, and plain decoding."""
    option = Option("d", model, LinearCosts(**{**own.__dict__, "each_block": 0.0}))
    best = choose([option], 4, 6)[0]
    everything = [
        predict(option, TreeShape.from_paths(tree), "given") for nodes in range(1, 6) for tree in TREES[nodes]
    ]
    expected = max([1.0, *(prediction.tokens_per_second for prediction in everything)])
    assert best.tokens_per_second == pytest.approx(expected, rel=1e-9)


def test_a_dear_block_makes_the_passes_narrow_and_a_dear_pass_makes_them_few():
    model = ParametricAcceptance(2, 8, 0.8, 0.9)
    cheap = choose([Option("d", model, LinearCosts(each_pass=0.001, each_node=0.001))])[0]
    dear_blocks = choose([Option("d", model, LinearCosts(each_pass=0.001, each_block=0.2, each_node=0.001))])[0]
    dear_passes = choose([Option("d", model, LinearCosts(each_pass=0.9, each_node=0.001))])[0]
    assert cheap.passes == 4
    assert dear_blocks.width < cheap.width
    assert 0 < dear_passes.passes < cheap.passes


def test_plain_decoding_wins_where_nothing_is_accepted():
    best = choose([Option("d", ParametricAcceptance(2, 8, 0.01), LinearCosts())])[0]
    assert (best.kind, best.speedup, best.shape) == ("plain", 1.0, None)


def test_the_better_of_several_drafters_is_chosen():
    good, bad = ParametricAcceptance(3, 12, 0.8), ParametricAcceptance(2, 8, 0.4)
    found = choose([Option("bad", bad, LinearCosts()), Option("good", good, LinearCosts())])
    assert (found[0].drafter, found[0].block_size) == ("good", 3)


def test_expected_tokens_may_come_from_elsewhere():
    option = Option("d", ParametricAcceptance(2, 4, 0.5), LinearCosts(), lambda shape: 3.0 if shape else 1.0)
    prediction = predict(option, chain(2), "chain")
    assert prediction.tokens == 3.0
    assert prediction.tokens_per_second == pytest.approx(3.0 / prediction.round_seconds)


def test_prediction_adds_up():
    own = LinearCosts(each_block=0.02)
    shape = TreeShape.paper(2, 6, 5)
    prediction = predict(Option("d", ParametricAcceptance(2, 6, 0.5), own), shape, "paper")
    blocks = widths(shape, 2)
    expected = sum(0.1 + 0.02 * width for width in blocks) + 1 + 0.01 * (shape.size - 1) + 0.05
    assert prediction.round_seconds == pytest.approx(expected + 0.001 * prediction.tokens)
    assert (prediction.passes, prediction.width, prediction.nodes) == (3, max(blocks), shape.size)


def test_batches_get_the_size_that_is_fastest_for_them():
    model = ParametricAcceptance(2, 2, 0.6, 0.8)
    option = Option("d", model, LinearCosts(each_node=0.03))
    best, *others = choose([option], 1, 16)
    all_trees = [best, *others]
    found = batch_nodes(option, best, 999)
    assert len(found) >= 2
    sizes = [best.nodes - 1] + [nodes for _, nodes in found]
    assert sizes == sorted(set(sizes), reverse=True)

    def rate(rows: int, size: int) -> float:
        tree = max((one for one in all_trees if one.nodes == size + 1), key=lambda one: one.tokens)
        seconds = 0.1 + option.costs.verify_seconds(rows * tree.nodes) + option.costs.rest_seconds(rows * tree.tokens)
        return tree.tokens / seconds

    for rows, nodes in found:
        assert max(range(1, best.nodes), key=lambda size, rows=rows: rate(rows, size)) == nodes
    assert batch_nodes(Option("d", model, LinearCosts(each_node=0)), best, 999) == []  # the control: nodes for nothing
    assert batch_nodes(option, best, 2 * best.nodes) == [pair for pair in found if pair[0] == 2]  # as far as timed
    hopeless = AcceptanceModel(2, [[[0.0, 0.0]] * 2] * 2)
    assert batch_nodes(Option("d", hopeless, option.costs), best, 999) == []


def test_batches_pay_for_the_passes_that_run():
    """A tree of two nodes is drafted in one pass of a dynamic tree that has two, so it does not pay for the second."""
    model = ParametricAcceptance(2, 4, 0.7, 0.9)
    option = Option("d", model, LinearCosts(each_block=0.02, each_node=0.03))
    best = choose([option], 2, 16)[0]
    assert (best.passes, best.width) > (1, 1)
    (rows, nodes), *_ = [pair for pair in batch_nodes(option, best, 999) if pair[1] <= 2]
    dear = Option("d", model, LinearCosts(each_block=9.0, each_node=0.03))
    assert batch_nodes(dear, best, 999)[0] == [2, 2]  # where a block costs more than all else
    assert rows > 2
    assert nodes == 2


def test_grid_has_a_setting_for_each_cell():
    option = Option("d", ParametricAcceptance(2, 8, 0.7, 0.9), LinearCosts())
    cells = [(m, nodes) for m in (1, 2, 3) for nodes in (8, 16)]
    found = grid(option, (1, 2, 3), (8, 16))
    assert [(prediction.passes, prediction.nodes) for prediction in found] == cells
    hopeless = Option("d", ParametricAcceptance(2, 8, 0.05), LinearCosts())
    assert [one.passes for one in grid(hopeless, (1, 2, 3), (8,))] == [1, 2, 3], "also where no pass but one pays"
    assert grid(option, (4,), (7,)) == [], "four passes of two need a path of seven nodes below the root"


def test_node_grid():
    assert node_grid(4) == [2, 3, 4]
    assert node_grid(19)[-3:] == [16, 18, 19]
    assert node_grid(1) == []


@pytest.mark.parametrize(("passes", "nodes"), [(0, 8), (1, 1)])
def test_impossible_limits_are_refused(passes, nodes):
    with pytest.raises(TuningError, match="1 pass and 2 nodes"):
        choose([Option("d", ParametricAcceptance(1, 1, 0.5), LinearCosts())], passes, nodes)


def test_no_drafter_is_refused():
    with pytest.raises(TuningError, match="no drafter"):
        choose([])
