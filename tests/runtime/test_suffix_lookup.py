"""The second source of candidates: the search by its definition, the join, and losslessness."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_hf import FalconCandidateGenerator, FalconDrafterConfig
from falcon_hf.runtime.suffix_lookup import SuffixLookup
from falcon_hf.runtime.tree_growth import Growth

from .helpers import assert_same_text, break_masks, prompt_ids
from .test_batch import ENDING, GREEDY, batch, both
from .test_candidate_generator import VOCAB, committed
from .test_dynamic_tree import SAMPLED, SPEC, paths_of
from .test_tree_growth import CANDIDATES, is_tree, ranked

LOOKUP = SuffixLookup(length=5, min_match=2, acceptance=(0.3, 0.5, 0.9))


def by_definition(text: list[int], lookup: SuffixLookup) -> list[tuple[int, float]]:
    """Token and log chance of each node of the chain."""
    longest = lookup.min_match + len(lookup.acceptance) - 1
    best, place = 0, -1
    for end in range(len(text) - 1):
        match = 0
        while match < longest and match <= end and text[end - match] == text[-1 - match]:
            match += 1
        if match >= best:
            best, place = match, end
    if best < lookup.min_match:
        return []
    chain, score = [], 0.0
    for step, token in enumerate(itertools.islice(itertools.cycle(text[place + 1 :]), lookup.length)):
        known = min(best + step - lookup.min_match, len(lookup.acceptance) - 1)
        score += math.log(lookup.acceptance[known])
        chain.append((token, score))
    return chain


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=3))
def test_search_is_the_definitions(texts):
    longest = max(map(len, texts))
    padded = torch.tensor([[-1] * (longest - len(text)) + text for text in texts])
    tokens, chances = LOOKUP.propose(padded)
    assert tokens.shape == chances.shape == (len(texts), LOOKUP.length)
    for row, text in enumerate(texts):
        found = [(token, score) for token, score in zip(tokens[row].tolist(), chances[row].tolist(), strict=True)]
        expected = by_definition(text, LOOKUP)
        assert [token for token, _ in found[: len(expected)]] == [token for token, _ in expected]
        assert [score for _, score in found[: len(expected)]] == pytest.approx([score for _, score in expected])
        assert all(score == -math.inf for _, score in found[len(expected) :])


def test_a_period_goes_on():
    """Text that repeats its last tokens is continued for the whole length, however short the period."""
    for period in ([5], [5, 6], [5, 6, 7]):
        repeated = period * 30
        tokens, chances = LOOKUP.propose(torch.tensor([repeated[:17]]))
        assert tokens[0].tolist() == repeated[17:][: LOOKUP.length]
        assert chances.isfinite().all()


def growths(seed: int, rows: int = 2, nodes: int = 9) -> tuple[Growth, Growth]:
    """The same random growth twice; tokens are the candidates' ranks."""
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(seed)
        growth = Growth(rows, nodes, torch.device("cpu"))
        boundary = growth.root()
        for index, width in enumerate((1, 3)):
            chances = torch.rand(rows, width, 2, CANDIDATES, generator=generator).log().sort(-1, descending=True).values
            boundary = growth.next_boundary(*growth.block_levels(boundary, ranked(chances), index * 2, 2), 3)
        made.append(growth)
    return made[0], made[1]


def joined_by_definition(own: dict[tuple, float], chain: list[tuple[int, float]], nodes: int) -> dict[tuple, float]:
    """The best nodes of both sources, each path once with the better of its scores."""
    paths = dict(own)
    path: tuple = ()
    for token, score in chain:
        path = (*path, token)
        paths[path] = max(paths.get(path, -math.inf), score)
    return dict(sorted(paths.items(), key=lambda item: -item[1])[:nodes])


chains = st.lists(
    st.lists(st.tuples(st.integers(0, CANDIDATES), st.floats(0.05, 1)), max_size=6), min_size=2, max_size=2
)


@given(st.integers(0, 50), chains)
def test_join_is_the_best_of_both(seed, links):
    """Over many candidates: the whole growth against the definition."""
    everything, growth = growths(seed, nodes=10**6)[0], growths(seed)[0]
    root = torch.zeros(2, 1, dtype=torch.long)
    chains = [
        list(zip((t for t, _ in row), itertools.accumulate(math.log(c) for _, c in row), strict=True)) for row in links
    ]
    tokens = torch.tensor([[t for t, _ in row] + [0] * (6 - len(row)) for row in chains])
    scores = torch.tensor([[s for _, s in row] + [-math.inf] * (6 - len(row)) for row in chains])
    growth.join(tokens, scores)
    tree, own = growth.tree(root), everything.tree(root)
    for row in range(2):
        expected = joined_by_definition(paths_of(own, row), chains[row], 9)
        got = paths_of(tree, row)
        # With ties at the edge other nodes are as good.
        assert sorted(got.values()) == pytest.approx(sorted(expected.values()), abs=1e-5)
        edge = min(expected.values()) + 1e-5
        assert {p for p, s in got.items() if s > edge} == {p for p, s in expected.items() if s > edge}


def test_without_a_match_the_tree_is_the_drafters():
    plain, joined = growths(3)
    root = torch.zeros(2, 1, dtype=torch.long)
    joined.join(torch.zeros(2, 6, dtype=torch.long), torch.full((2, 6), -torch.inf))
    one, other = plain.tree(root), joined.tree(root)
    for name in ("tokens", "parents", "depths", "ancestors", "scores"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_join_that_knows_no_candidates_is_seen():
    """The control: the chain added as it is makes siblings of one token."""
    growth, _ = growths(3)
    assert is_tree(growth)
    first = growth.tree(torch.zeros(2, 1, dtype=torch.long)).tokens[:, 1:2]
    growth.add(torch.full((2, 1), -1e-3), first, torch.full((2, 1), -1), 1)
    assert not is_tree(growth)


def drafted(drafter: Any, target: Any, text: torch.Tensor) -> dict[tuple, float]:
    features, tokens = committed(target, 6)
    generator = FalconCandidateGenerator(drafter, target)
    generator.append(features, tokens)
    with torch.no_grad():
        return paths_of(generator.draft(text[:, -1:], max_depth=9, text=text))


def test_a_repeated_text_is_in_the_tree(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    text = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 3, 4, 5]])
    lookup = {"length": 4, "min_match": 2, "acceptance": [0.9, 0.95]}
    own = drafted(tiny_drafter(target, 2, tree=SPEC), target, text)
    both_sources = drafted(tiny_drafter(target, 2, tree=SPEC, lookup=lookup), target, text)
    chain = [(6,), (6, 7), (6, 7, 8), (6, 7, 8, 9)]
    assert not set(chain) <= set(own)
    assert set(chain) <= set(both_sources)
    assert len(own) == len(both_sources) == 16
    assert both_sources[6, 7, 8, 9] == pytest.approx(4 * math.log(0.95))
    # A chain that is hardly ever right takes no node from the drafter.
    timid = drafted(tiny_drafter(target, 2, tree=SPEC, lookup=lookup | {"acceptance": [1e-9]}), target, text)
    assert timid == own


REPETITIVE = {"lookup": {"length": 6, "min_match": 1, "acceptance": [0.6, 0.8, 0.9]}}


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_text_is_plain_text(tiny_target, tiny_drafter, block_size):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_size, tree=SPEC, **REPETITIVE)
    for options in ({"do_sample": False}, SAMPLED):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6).repeat(1, 3), max_new_tokens=40, **options)
        assert drafter.last_generation.accepted > 0


@pytest.mark.parametrize("options", [{}, ENDING, ENDING | {"repetition_penalty": 1.2}], ids=str)
def test_batch_text_is_plain_text(tiny_target, tiny_drafter, options):
    target = tiny_target(VOCAB)
    both(target, tiny_drafter(target, 2, tree=SPEC, **REPETITIVE), batch((12, 30, 7, 1)), **(GREEDY | options))


def test_lookup_raises_acceptance_on_repetitive_text(tiny_target, tiny_drafter):
    """A target that loops: its own text is the best source."""
    target = tiny_target(VOCAB, initializer_range=0.05)
    taus = []
    for further in ({}, REPETITIVE):
        drafter = tiny_drafter(target, 2, tree=SPEC, **further)
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=60, do_sample=False)
        taus.append(drafter.last_generation.tau)
    assert taus[1] > 1.5 * taus[0] + 0.1


def test_a_wrong_mask_changes_the_text(tiny_target, tiny_drafter, monkeypatch):
    """The control of the comparison: joined nodes that see every node before them."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=SPEC, **REPETITIVE)
    break_masks(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6).repeat(1, 3), max_new_tokens=40, do_sample=False)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tree": [[0]], "lookup": {}}, "dynamic"),
        ({"tree": SPEC, "lookup": {"lenght": 3}}, "lenght"),
        ({"tree": SPEC, "lookup": {"length": 0}}, "length"),
        ({"tree": SPEC, "lookup": {"acceptance": []}}, "acceptance"),
        ({"tree": SPEC, "lookup": {"acceptance": [0.5, 1.5]}}, "acceptance"),
    ],
)
def test_impossible_lookups_are_errors(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        FalconDrafterConfig(**fields)


def test_a_tree_without_scores_is_refused(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=SPEC, lookup={})
    drafter.config.tree = [[0], [1]]
    with pytest.raises(ValueError, match="dynamic"):
        target.generate(prompt_ids(VOCAB, 6), assistant_model=drafter, max_new_tokens=4)
