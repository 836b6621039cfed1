"""Best trees against a search over all trees, on small cases."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_hf import TreeShape
from falcon_hf.runtime.tree_shape import chain
from falcon_hf.tuning.acceptance import AcceptanceModel
from falcon_hf.tuning.static_tree import PricedTrees, best_nodes, best_tree, widths


@st.composite
def models(draw: st.DrawFn, depth: int = 4, width: int = 3) -> AcceptanceModel:
    """Any rates that fall with the rank and sum to at most 1, different for each depth and parent."""
    k = draw(st.integers(1, 3))
    rates = []
    for _ in range(depth):
        classes = []
        for _ in range(4):
            weights = sorted(draw(st.lists(st.floats(0, 1), min_size=width, max_size=width)), reverse=True)
            total = max(sum(weights), 1.0)
            classes.append([weight / total for weight in weights])
        rates.append(classes)
    return AcceptanceModel(k, rates)


def all_trees(width: int, depth: int, nodes: int) -> list[frozenset]:
    """All trees of so many nodes below the root."""
    found = {frozenset()}
    for _ in range(nodes):
        grown = set()
        for tree in found:
            for parent in ((), *tree):
                if len(parent) < depth:
                    grown |= {tree | {(*parent, rank)} for rank in range(width) if (*parent, rank) not in tree}
        found = grown
    return list(found)


TREES = {nodes: all_trees(2, 4, nodes) for nodes in range(1, 6)}


def boundaries(tree, k) -> int:
    return len({path[:end] for path in tree for end in range(k, len(path), k)})


@settings(max_examples=60)
@given(models(width=2), st.integers(1, 5))
def test_best_tree_equals_brute_force(model, nodes):
    found = best_tree(model, nodes + 1, 4)
    best = max(sum(map(model.score, tree)) for tree in TREES[nodes])
    assert (model.expected_tokens(found) - 1) == pytest.approx(best, abs=1e-9)
    assert found is None or found.size <= nodes + 1


@settings(max_examples=60)
@given(models(width=2), st.integers(1, 5), st.floats(0, 0.5))
def test_priced_tree_equals_brute_force(model, nodes, price):
    trees = PricedTrees(model, 4, price, 8)

    def worth(tree) -> float:
        return sum(map(model.score, tree)) - price * boundaries(tree, model.block_size)

    # Of at most so many nodes: brute force has nodes of score 0 too, which the pool leaves out.
    best = max(worth(tree) for size in range(1, nodes + 1) for tree in TREES[size])
    assert max(trees.value(size + 1) for size in range(1, nodes + 1)) == pytest.approx(max(best, 0), abs=1e-9)
    found = trees.tree(nodes + 1)
    if found is not None:
        assert worth(found.paths) == pytest.approx(trees.value(nodes + 1), abs=1e-9), "the value's own tree"


def test_a_price_scaled_by_acceptance_would_be_wrong():
    """The control: charging price * f(v) instead of the price would choose another tree."""
    model = AcceptanceModel(1, [[[0.6, 0.25]] * 4] * 2)
    price = 0.15
    assert PricedTrees(model, 2, price, 3).tree(3).paths == ((0,), (1,))
    assert model.score((0, 0)) - price < model.score((1,)) < model.score((0, 0)) - price * model.score((0,))


@given(models(), st.integers(2, 14))
def test_never_worse_than_paper_or_chain(model, nodes):
    best = model.expected_tokens(best_tree(model, nodes, 4))
    for other in (chain(min(nodes - 1, 4)), TreeShape.paper(model.block_size, 4, 3)):
        if other.size <= nodes:
            assert best >= model.expected_tokens(other) - 1e-12


@given(models())
def test_best_nodes_come_in_order_and_parents_first(model):
    seen = {(): 1.0}
    previous = 1.0
    for score, path in best_nodes(model, 4):
        assert score == pytest.approx(model.score(path))
        assert score <= previous + 1e-12
        assert path[:-1] in seen
        seen[path] = previous = score
    everything = itertools.chain.from_iterable(itertools.product(range(3), repeat=d) for d in range(1, 5))
    assert len(seen) - 1 == sum(model.score(path) > 0 for path in everything)


@given(models(), st.integers(1, 3), st.integers(2, 20))
def test_width_caps_the_blocks_of_every_pass(model, cap, nodes):
    paths = [path for (_, path), _ in zip(best_nodes(model, 4, cap), range(nodes), strict=False)]
    if paths:
        assert max(widths(TreeShape.from_paths(paths), model.block_size)) <= cap


def test_widths_are_those_of_the_drafter_passes():
    shape = TreeShape.paper(2)
    assert widths(shape, 2) == tuple(
        1 if index == 0 else draft_pass.parent_block.shape[0] for index, draft_pass in enumerate(shape.passes(2))
    )
