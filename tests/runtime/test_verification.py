"""``follow`` and ``follow_greedy`` against the definition, by brute force over random trees."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_hf import DraftTree
from falcon_hf.runtime.verification import follow, follow_greedy

VOCAB = 4


@st.composite
def verifications(draw: st.DrawFn) -> tuple[DraftTree, list[list[int]]]:
    """A batch of trees of one shape, and the token the target chooses at each node of each row."""
    size = draw(st.integers(1, 14))
    rows = draw(st.integers(1, 3))
    parents = [-1]
    while len(parents) < size:
        # At most VOCAB children a node, because siblings differ.
        open_nodes = [node for node in range(len(parents)) if parents.count(node) < VOCAB]
        parents.append(draw(st.sampled_from(open_nodes)))
    tokens = []
    for _ in range(rows):
        row = [draw(st.integers(0, VOCAB - 1))]
        for node in range(1, size):
            taken = [row[other] for other in range(1, node) if parents[other] == parents[node]]
            row.append(draw(st.sampled_from([token for token in range(VOCAB) if token not in taken])))
        tokens.append(row)
    depths = [0] * size
    ancestors = torch.eye(size, dtype=torch.bool)
    for node in range(1, size):
        depths[node] = depths[parents[node]] + 1
        ancestors[node] |= ancestors[parents[node]]
    tree = DraftTree(
        tokens=torch.tensor(tokens),
        parents=torch.tensor(parents)[None].repeat(rows, 1),
        depths=torch.tensor(depths)[None].repeat(rows, 1),
        ancestors=ancestors[None].repeat(rows, 1, 1),
    )
    chosen = [[draw(st.integers(0, VOCAB - 1)) for _ in range(size)] for _ in range(rows)]
    return tree, chosen


def definition(tree: DraftTree, row: int, chosen: list[int]) -> list[int]:
    """All paths from the root that the target would have walked token by token: the longest one."""
    best = [0]
    for leaf in range(tree.size):
        path = tree.ancestors[row, leaf].nonzero()[:, 0].tolist()
        steps = itertools.pairwise(path)
        if all(int(tree.tokens[row, child]) == chosen[parent] for parent, child in steps) and len(path) > len(best):
            best = path
    return best


def logits_of(chosen: list[list[int]]) -> torch.Tensor:
    """Logits whose argmax is the chosen token, with noise below."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(chosen), VOCAB).float()
    return 2 * one_hot + torch.rand(one_hot.shape, generator=torch.Generator().manual_seed(0))


def greedy_walks(tree: DraftTree, chosen: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Visited nodes and emitted tokens of each row, by ``follow_greedy``."""
    path, tokens, visited = follow_greedy(tree, logits_of(chosen))
    return [(path[row, :count].tolist(), tokens[row, :count].tolist()) for row, count in enumerate(visited.tolist())]


def lazy_walks(tree: DraftTree, chosen: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """The same by ``follow``; also that it looks at nothing else, in order, once."""
    walks = []
    for row, tokens in enumerate(chosen):
        asked: list[int] = []

        def choose(node: int, asked: list[int] = asked, tokens: list[int] = tokens) -> tuple[torch.Tensor, ...]:
            asked.append(node)
            return torch.tensor(tokens[node]), torch.tensor(False)

        path, ended = follow(tree, row, choose)
        assert asked == path
        assert ended is False
        walks.append((path, [tokens[node] for node in path]))
    return walks


def expected_walks(tree: DraftTree, chosen: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    paths = [definition(tree, row, tokens) for row, tokens in enumerate(chosen)]
    return [(path, [tokens[node] for node in path]) for path, tokens in zip(paths, chosen, strict=True)]


@given(verifications())
def test_greedy_walk_is_the_definitions(verification):
    assert greedy_walks(*verification) == expected_walks(*verification)


@given(verifications())
def test_lazy_walk_is_the_definitions(verification):
    assert lazy_walks(*verification) == expected_walks(*verification)


@given(verifications(), st.integers(0, 13))
def test_lazy_walk_ends_where_the_text_ends(verification, stop):
    tree, chosen = verification
    whole = definition(tree, 0, chosen[0])
    count = 0

    def choose(node: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal count
        count += 1
        return torch.tensor(chosen[0][node]), torch.tensor(count == stop + 1)

    path, ended = follow(tree, 0, choose)
    assert path == whole[: stop + 1]
    assert ended == (stop < len(whole))


def test_walks_of_a_known_tree():
    """Both walks descend past a wrong sibling, and stop at the first token that is no child."""
    tree = DraftTree.from_token_paths(0, [[1], [2], [2, 1], [2, 3], [2, 3, 0]])
    chosen = [[2, 0, 3, 0, 1, 0]]  # nodes: root, 1, 2, 2-1, 2-3, 2-3-0
    assert greedy_walks(tree, chosen) == [([0, 2, 4], [2, 3, 1])]
    assert lazy_walks(tree, chosen) == [([0, 2, 4], [2, 3, 1])]


def deepest_match_without_its_parents(tree, logits):
    """A broken walk: any node that matches counts, whether its ancestors do or not."""
    chosen = logits.argmax(-1)
    matches = (tree.tokens == chosen.gather(1, tree.parents.clamp_min(0))) | (tree.depths == 0)
    deepest = torch.where(matches, tree.depths, -1).argmax(-1)
    return [tree.ancestors[row, node].nonzero()[:, 0].tolist() for row, node in enumerate(deepest.tolist())]


def own_token_instead_of_parents(tree, logits):
    """A broken walk: a node is accepted if the target chooses its token *at* it, not before it."""
    shifted = DraftTree(tree.tokens, torch.arange(tree.size)[None].expand_as(tree.parents), tree.depths, tree.ancestors)
    path, _, visited = follow_greedy(shifted, logits)
    return [row[:count] for row, count in zip(path.tolist(), visited.tolist(), strict=True)]


@pytest.mark.parametrize("broken", [deepest_match_without_its_parents, own_token_instead_of_parents])
def test_comparison_sees_a_broken_walk(broken):
    differs = []

    @given(verifications())
    def compare(verification):
        tree, chosen = verification
        expected = [path for path, _ in expected_walks(tree, chosen)]
        differs.append(broken(tree, logits_of(chosen)) != expected)

    compare()
    assert any(differs)
