"""``Growth``: trees that stay trees when scores tie or are broken, and ancestors by squaring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_hf.runtime import tree_growth
from falcon_hf.runtime.tree import ancestor_mask
from falcon_hf.runtime.tree_growth import Growth, LevelLaws, ancestors_of

ROWS, WIDTH, BLOCK, CANDIDATES, NODES = 2, 3, 2, 4, 9


def grown(chances: list[torch.Tensor]) -> Growth:
    """A growth over passes whose log chances are ``[B, W, k, b]``; tokens are the candidates' ranks."""
    growth = Growth(ROWS, NODES, torch.device("cpu"))
    boundary = growth.root()
    for index, each in enumerate(chances):
        boundary = growth.next_boundary(*growth.block_levels(boundary, ranked(each), index * BLOCK, BLOCK), WIDTH)
    return growth


def ranked(chances: torch.Tensor) -> LevelLaws:
    """Laws of log chances ``[B, W, k, b]``, whatever the token before; tokens are the candidates' ranks."""
    tokens = torch.arange(chances.shape[-1]).expand(chances.shape)
    return lambda level, _: (chances[:, :, level, None], tokens[:, :, level, None])


def is_tree(growth: Growth) -> bool:
    """Whether parents come first, one depth higher, and siblings differ."""
    tree = growth.tree(torch.zeros(ROWS, 1, dtype=torch.long))
    assert tree.size == NODES + 1
    for row in range(ROWS):
        parents, depths = tree.parents[row].tolist(), tree.depths[row].tolist()
        if any(parent >= node for node, parent in enumerate(parents)):
            return False
        if any(depths[node] != depths[parents[node]] + 1 for node in range(1, tree.size)):
            return False
        if len(set(zip(parents, tree.tokens[row].tolist(), strict=True))) < tree.size:
            return False
        assert torch.equal(tree.ancestors[row], ancestor_mask(parents))
    return True


values = st.sampled_from([0.0, 0.0, -0.0, -1e-9, -1.0, -2.5, -1e4, float("nan"), float("-inf"), 0.5])


@given(st.data())
def test_always_a_tree(data):
    chances = [
        torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view(ROWS, -1, BLOCK, CANDIDATES)
        for size in (ROWS * BLOCK * CANDIDATES, ROWS * WIDTH * BLOCK * CANDIDATES)
    ]
    assert is_tree(grown(chances))


def test_ties_need_the_stable_order(monkeypatch):
    """The control: with all scores equal, another order among equals separates children from their parents."""
    chances = [torch.zeros(ROWS, width, BLOCK, CANDIDATES) for width in (1, WIDTH)]
    assert is_tree(grown(chances))
    plain = torch.Tensor.sort

    def last_first(self, **options):
        values, order = plain(self.flip(1), **options)
        return values, self.shape[1] - 1 - order

    monkeypatch.setattr(torch.Tensor, "sort", last_first)
    with pytest.raises((AssertionError, ValueError)):
        assert is_tree(grown(chances))


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=12))
def test_ancestors_by_squaring(shares):
    parents = [-1, *(int(share * (node + 1)) for node, share in enumerate(shares))]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    assert torch.equal(ancestors_of(torch.tensor([parents]), max(depths))[0], ancestor_mask(parents))
    assert tree_growth.ancestors_of is ancestors_of


def test_ancestors_of_a_deep_chain():
    """Ways to an ancestor are many; counted without bound they overflow, and the mask is wrong (depths above 256)."""
    parents = torch.arange(-1, 63)[None]
    for depth in (63, 257, 1000):
        assert torch.equal(ancestors_of(parents, depth)[0], torch.ones(64, 64).tril().bool())
