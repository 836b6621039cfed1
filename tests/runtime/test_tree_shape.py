"""Static trees: validation, the paper's trees by rule, and the passes' index tensors against a slow definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_hf import FalconCandidateGenerator, TreeShape
from falcon_hf.runtime.tree_shape import chain


@st.composite
def tree_paths(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Paths of a random tree, in random order; ranks may leave gaps."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 14))):
        path = (*draw(st.sampled_from(paths)), draw(st.integers(0, 3)))
        if path not in paths:
            paths.append(path)
    return draw(st.permutations(paths[1:]))


@given(tree_paths())
def test_from_paths_keeps_the_paths_and_sorts_them(paths):
    shape = TreeShape.from_paths(paths)
    assert set(shape.paths) == set(paths)
    assert list(shape.paths) == sorted(paths, key=lambda path: (len(path), path))
    assert shape.size == len(paths) + 1
    assert shape.depth == max(map(len, paths))
    nodes = [(), *shape.paths]
    for node, path in enumerate(nodes):
        assert shape.depths[node] == len(path)
        assert shape.parents[node] == (nodes.index(path[:-1]) if path else -1)
        ancestors = {nodes.index(path[:end]) for end in range(len(path) + 1)}
        assert set(shape.ancestors()[node].nonzero()[:, 0].tolist()) == ancestors


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "at least one path"),
        ([[]], "non-empty list of ranks"),
        ([[0], [-1]], "ranks from 0 on"),
        ([[0], [1.0]], "ranks from 0 on"),
        ([[0], [1], [0]], r"path \[0\] twice"),
        ([[0], [0, 1], [1, 0]], r"path \[1, 0\] but not its parent \[1\]; add the parent"),
        ([[0, 0]], r"not its parent \[0\]"),
        ([[0], [0, 0, 0]], r"not its parent \[0, 0\]"),
    ],
)
def test_impossible_paths_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        TreeShape.from_paths(paths)


@pytest.mark.parametrize(("block_size", "depth"), [(2, 8), (3, 6), (4, 8)])
def test_paper_trees(block_size, depth):
    """Depths and root children of the paper's section 4.1."""
    shape = TreeShape.paper(block_size)
    assert shape.depth == depth
    assert sum(len(path) == 1 for path in shape.paths) == 20
    assert 40 <= shape.size <= 80
    assert chain(depth).paths[-1] in shape.paths


@given(
    block_size=st.integers(1, 8),
    depth=st.integers(1, 8),
    root_children=st.integers(1, 24),
    taper=st.floats(0.8, 6, allow_nan=False),
)
def test_paper_rule(block_size, depth, root_children, taper):
    shape = TreeShape.paper(block_size, depth, root_children, taper)
    kept = set(shape.paths)
    assert shape.depth == depth
    assert {path for path in kept if len(path) == 1} == {(rank,) for rank in range(root_children)}
    assert {path for path in kept if len(path) == depth} == {(0,) * depth} or depth == 1
    for path in kept:
        assert len(path) == 1 or path[:-1] in kept, "a kept path's parent is kept"
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in kept, "a likelier sibling is kept first"
        bound = root_children ** (((depth - len(path)) / max(depth - 1, 1)) ** taper if depth > 1 else 1)
        assert math.prod(rank + 1 for rank in path) <= bound + 1e-6


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"root_children": 0}, {"taper": 0.0}, {"taper": -1.0}])
def test_paper_rule_refuses_impossible_numbers(wrong):
    with pytest.raises(ValueError, match="at least 1, and taper positive"):
        TreeShape.paper(2, **wrong)


@given(tree_paths(), st.integers(1, 6))
def test_truncate_keeps_what_is_shallow(paths, depth):
    kept = [path for path in paths if len(path) <= depth]
    assert set(TreeShape.from_paths(paths).truncate(depth).paths) == set(kept)


def test_chain_is_one_path():
    assert chain(3).paths == ((0,), (0, 0), (0, 0, 0))


def test_configs_tree_is_the_shape(tiny_target, tiny_drafter):
    from falcon_hf.runtime.candidate_generator import drafter_tree

    target = tiny_target()
    assert drafter_tree(tiny_drafter(target, 3), target) == TreeShape.paper(3)
    paths = [[0], [1], [0, 0]]
    assert drafter_tree(tiny_drafter(target, 3, tree=paths), target) == TreeShape.from_paths(paths)


def test_a_configs_tree_with_a_missing_parent_is_refused(tiny_target, tiny_drafter):
    target = tiny_target()
    with pytest.raises(ValueError, match="not its parent"):
        FalconCandidateGenerator(tiny_drafter(target, tree=[[0], [1, 0]]), target)


@given(tree_paths(), st.integers(1, 4), st.booleans())
def test_passes_against_the_definition(paths, k, corrected):
    """Each pass as the module's docstring says it, row by row and node by node."""
    shape = TreeShape.from_paths(paths)
    nodes = [(), *shape.paths]
    passes = shape.passes(k, corrected=corrected)
    assert len(passes) == math.ceil(shape.depth / k)
    seen_rows: list[tuple[tuple[int, ...], int]] = []  # (path the block hangs on, position in the block)
    previous: list[tuple[int, ...]] = []
    filled = 1
    for number, own in enumerate(passes):
        start = number * k
        new = [path for path in shape.paths if start < len(path) <= start + k]
        boundary = sorted({path[:start] for path in new}, key=lambda path: [p[:start] for p in new].index(path))
        depths = sorted({len(path) for path in new}) if corrected else [None]
        assert len(own.levels) == len(depths)
        for level, depth in zip(own.levels, depths, strict=True):
            mine = [path for path in new if depth in (None, len(path))]
            assert (level.first_node, level.end_node) == (filled, filled + len(mine))
            assert [nodes[node] for node in range(level.first_node, level.end_node)] == mine
            filled = level.end_node
            assert level.candidates == max(path[-1] for path in mine) + 1
            for path, source, rank in zip(mine, level.source.tolist(), level.rank.tolist(), strict=True):
                block, position = divmod(int(level.rows[source]), k)
                assert boundary[block] == path[:start]
                assert position == len(path) - start - 1
                assert rank == path[-1]
                if corrected and position:  # a law of the parent's own
                    assert nodes[level.parents[source]] == path[:-1]
                else:
                    assert level.parents is None
            if corrected:
                assert len(level.rows) == len({path[:-1] for path in mine})
        rows = [(path, j) for path in boundary for j in range(k)] if number else []
        all_rows = seen_rows + rows
        assert own.visible.shape == (len(rows), len(all_rows))
        for row, (path, j) in enumerate(rows):
            token_path = path[: start - k + 1 + j]
            assert nodes[own.row_nodes[row]] == token_path
            assert own.row_positions[row] == start - k + j
            block, position = divmod(int(own.row_features[row]), k)
            assert previous[block] == path[: start - k]
            assert position == j
            for key, (other, _) in enumerate(all_rows):
                assert bool(own.visible[row, key]) == (path[: len(other)] == other)
        if number:
            assert [previous[block] for block in own.parent_block.tolist()] == [path[: start - k] for path in boundary]
        else:
            assert own.row_nodes.numel() == own.row_features.numel() == own.parent_block.numel() == 0
        seen_rows, previous = all_rows, boundary
    assert filled == shape.size
    assert all(index.dtype == torch.long for index in (passes[0].levels[0].source, passes[0].levels[0].rank))
