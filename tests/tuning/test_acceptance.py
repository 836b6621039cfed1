"""Acceptance rates and replay against slow definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_hf import TreeShape
from falcon_hf.runtime.tree_shape import chain
from falcon_hf.tuning.acceptance import AcceptanceModel, ParametricAcceptance, RankRecord, rank_class
from falcon_hf.tuning.errors import TuningError


def record(texts, k=2, width=6):
    return RankRecord(k, width, tuple(np.array(text) for text in texts))


@st.composite
def records(draw: st.DrawFn) -> RankRecord:
    texts = [
        [
            draw(st.lists(st.sampled_from([-1, 0, 0, 1, 2]), min_size=4, max_size=4))
            for _ in range(draw(st.integers(1, 9)))
        ]
        for _ in range(draw(st.integers(1, 3)))
    ]
    return record(texts)


@st.composite
def shapes(draw: st.DrawFn) -> TreeShape:
    paths = [()]
    for _ in range(draw(st.integers(1, 10))):
        path = (*draw(st.sampled_from([path for path in paths if len(path) < 4])), draw(st.integers(0, 2)))
        if path not in paths:
            paths.append(path)
    return TreeShape.from_paths(paths[1:])


@given(records(), shapes())
def test_replay_is_the_walk_over_the_texts(own, shape):
    rounds = tokens = 0
    for text in own.ranks:
        position = 0
        while position < len(text):
            accepted = 0
            while accepted < 4 and tuple(text[position][: accepted + 1]) in shape.paths:
                accepted += 1
            emitted = min(accepted + 1, len(text) - position)
            position, rounds, tokens = position + emitted, rounds + 1, tokens + emitted
    assert own.replay(shape) == pytest.approx(tokens / rounds)


def test_replay_of_no_tree_is_plain_decoding():
    assert record([[[0, 0]]]).replay(None) == 1.0


def test_replay_refuses_a_deeper_tree():
    with pytest.raises(TuningError, match="known only to depth 2"):
        record([[[0, 0]]]).replay(chain(3))


def test_rates_are_shares_given_that_the_parent_was_accepted():
    """Many samples, so that the prior weighs little: depth 2 counts only where depth 1 hit, by the parent's class."""
    rows = [[0, 0]] * 4000 + [[0, 1]] * 4000 + [[1, 2]] * 6000 + [[-1, 0]] * 6000
    model = record([rows]).model
    assert model.rate(1, 0, 0) == pytest.approx(8 / 20, abs=1e-3)
    assert model.rate(1, 0, 1) == pytest.approx(6 / 20, abs=1e-3)
    assert model.rate(2, 0, 0) == pytest.approx(0.5, abs=1e-2), "after rank 0; the misses are no samples"
    assert model.rate(2, 1, 0) == pytest.approx(1 / 3, abs=1e-2), "after rank 1 all are rank 2: pooled over ranks 0-2"
    assert model.score((0, 0)) == pytest.approx(0.4 * 0.5, abs=1e-2)


def test_few_samples_are_drawn_to_the_coarser_estimate():
    rows = [[0, 0, 0, 0]] * 500 + [[3, 1, 0, 0]]
    model = record([rows]).model
    assert 0.8 < model.rate(2, 3, 0) < 1, "one sample of its class says rank 1; five hundred others say rank 0"


@given(records())
def test_rates_fall_with_the_rank_and_sum_to_at_most_one(own):
    for depth in own.model.rates:
        for rates in depth:
            assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates))
            assert sum(rates) <= 1 + 1e-9


def test_rank_classes():
    assert [rank_class(rank) for rank in (0, 1, 2, 3, 4, 19)] == [0, 1, 2, 2, 3, 3]


def test_json_round_trip():
    own = record([[[0, -1], [1, 5]], [[2, 2]]])
    back = RankRecord.from_json(own.to_json())
    assert [array.tolist() for array in back.ranks] == [array.tolist() for array in own.ranks]
    assert (back.block_size, back.width) == (2, 6)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"block_size": 2, "width": 3, "ranks": [[[0, 3]]]},
        {"block_size": 2, "width": 3, "ranks": [[[0, -2]]]},
        {"block_size": 2, "width": 3, "ranks": [[[0, 1]], [[0]]]},
        {"block_size": 2, "width": 3, "ranks": []},
        {"block_size": 2, "width": 3, "ranks": [[0, 1]]},
        {"block_size": 2, "width": "x", "ranks": [[[0, 1]]]},
    ],
)
def test_damaged_records_are_refused(wrong):
    with pytest.raises(TuningError, match="damaged"):
        RankRecord.from_json(wrong)


def test_parametric_model_reproduces_the_measured_table():
    """Top-1/3/10 of the first trained drafter: 41/56/69% at block position 1, 30/46/60% at position 2."""
    model = ParametricAcceptance(2, 4, 0.41, 0.73)
    for depth, tops in ((1, (0.41, 0.56, 0.69)), (2, (0.30, 0.46, 0.60)), (3, (0.41, 0.56, 0.69))):
        for count, expected in zip((1, 3, 10), tops, strict=True):
            assert sum(model.rate(depth, 0, rank) for rank in range(count)) == pytest.approx(expected, abs=0.05)


def test_nothing_is_accepted_beyond_what_is_known():
    model = AcceptanceModel(1, [[[0.5, 0.2]] * 4])
    assert model.score((0, 0)) == 0
    assert model.score((2,)) == 0
    assert model.expected_tokens(chain(3)) == 1.5


@pytest.mark.parametrize("wrong", [{"top1": 0.0}, {"top1": 1.1}, {"decay": 0.0}, {"tail": 0.0}, {"depth": 0}])
def test_parametric_model_refuses_impossible_numbers(wrong):
    with pytest.raises(TuningError, match="top1, decay and tail"):
        ParametricAcceptance(**({"block_size": 2, "depth": 2, "top1": 0.5} | wrong))
