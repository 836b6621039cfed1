"""``DraftTree``: its invariants, and the two ways to make one that a user may take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_hf import DraftTree
from falcon_hf.runtime.tree import ancestor_mask

token_paths = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=12)


def path_to(tree: DraftTree, node: int) -> list[int]:
    """Nodes from the root to ``node``, by following parents."""
    path = [node]
    while path[0] != 0:
        path.insert(0, int(tree.parents[0, path[0]]))
    return path


@given(token_paths)
def test_token_paths_make_a_tree_with_the_invariants(paths):
    tree = DraftTree.from_token_paths(99, paths)
    prefixes = {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    assert tree.size == len(prefixes) + 1
    assert tree.tokens[0, 0] == 99
    assert (int(tree.parents[0, 0]), int(tree.depths[0, 0])) == (-1, 0)
    texts = set()
    for node in range(1, tree.size):
        assert 0 <= tree.parents[0, node] < node
        path = path_to(tree, node)
        assert tree.depths[0, node] == len(path) - 1
        assert tree.ancestors[0, node].nonzero()[:, 0].tolist() == path
        texts.add(tuple(tree.tokens[0, path[1:]].tolist()))
    assert texts == prefixes


@given(token_paths)
def test_child_finds_the_one_child_with_a_token(paths):
    tree = DraftTree.from_token_paths(99, paths)
    for node in range(tree.size):
        children = {
            int(tree.tokens[0, other]): other for other in range(1, tree.size) if int(tree.parents[0, other]) == node
        }
        for token in range(-1, 6):
            assert int(tree.child(0, node, torch.tensor(token))) == children.get(token, -1)


def test_child_looks_at_its_own_row():
    one, other = DraftTree.from_token_paths(0, [[1], [2]]), DraftTree.from_token_paths(0, [[1], [3]])
    both = DraftTree(*(torch.cat(parts) for parts in zip(*map(_tensors, (one, other)), strict=True)))
    assert int(both.child(0, 0, torch.tensor(2))) == 2
    assert int(both.child(1, 0, torch.tensor(2))) == -1


def _tensors(tree: DraftTree) -> tuple[torch.Tensor, ...]:
    return tree.tokens, tree.parents, tree.depths, tree.ancestors


def test_root_only_is_a_plain_step():
    tree = DraftTree.root_only(torch.tensor([[7], [9]]))
    assert tree.size == 1
    assert tree.tokens.tolist() == [[7], [9]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert tree.depths.tolist() == [[0], [0]]
    assert tree.ancestors.tolist() == [[[True]], [[True]]]
    assert int(tree.child(1, 0, torch.tensor(9))) == -1, "a root is nobody's child"


def test_empty_path_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        DraftTree.from_token_paths(0, [[1], []])


@pytest.mark.parametrize("parents", [[-1, 2, 0], [-1, 1], [0]])
def test_parents_must_precede_children(parents):
    with pytest.raises(ValueError, match="parents must precede children"):
        ancestor_mask(parents)


@given(st.data())
def test_ancestor_mask_is_the_closure_of_parents(data):
    size = data.draw(st.integers(1, 12))
    parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, size)]
    mask = ancestor_mask(parents)
    for node in range(size):
        path, up = set(), node
        while up >= 0:
            path.add(up)
            up = parents[up]
        assert set(mask[node].nonzero()[:, 0].tolist()) == path
