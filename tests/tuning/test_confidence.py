"""Tables of acceptance by probability."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from falcon_hf.runtime.dynamic_tree import Calibration, DynamicTree
from falcon_hf.tuning.confidence import ConfidenceCounts, ConfidenceTables
from falcon_hf.tuning.errors import TuningError

SAMPLES = 20_000


@pytest.fixture(scope="module")
def tables() -> ConfidenceTables:
    """Two candidates of 60% and 14%; the first is right half the time, the second a tenth; behind a miss nothing is."""
    generator = np.random.default_rng(0)
    ranks = generator.choice([0, 1, -1], size=(SAMPLES, 2), p=[0.5, 0.1, 0.4])
    log_probability = np.broadcast_to(np.log([0.67, 0.135]), (SAMPLES, 2, 2))  # the points -0.4 and -2.0
    counts = ConfidenceCounts(2)
    counts.add(ranks, log_probability, np.full(SAMPLES, 2))
    return counts.tables(2)


def test_chances_are_shares_of_the_candidates_whose_parent_was_accepted(tables):
    sure, unsure = (tables.log_probability.index(point) for point in (-0.4, -2.0))
    for position in (0, 1):
        table = tables.acceptance[0][position]
        assert table[sure] == pytest.approx(0.5, abs=0.02)
        assert table[unsure] == pytest.approx(0.1, abs=0.02)


def test_tables_are_monotone_chances(tables):
    for positions in tables.acceptance:
        for table in positions:
            assert all(0 <= a <= b <= 1 for a, b in itertools.pairwise(table))


def test_without_samples_the_probability_is_believed():
    table = ConfidenceCounts(1).tables(1)
    assert table.acceptance[0][0] == pytest.approx(np.exp(table.log_probability).tolist())


def test_tokens_behind_the_end_are_no_samples():
    counts = ConfidenceCounts(1)
    counts.add(np.full((9, 1), -1), np.zeros((9, 1, 1)), np.zeros(9, dtype=int))
    assert counts.tables(1) == ConfidenceCounts(1).tables(1)


def test_a_dynamic_tree_takes_them(tables):
    entry = {"kind": "dynamic", "nodes": 8, "calibration": tables.to_json()}
    assert isinstance(DynamicTree.from_config(entry, 2).calibration, Calibration)
    assert ConfidenceTables.from_json(tables.to_json()) == tables


@pytest.mark.parametrize("wrong", [{}, {"log_probability": [0], "acceptance": [[[1]]]}, {"acceptance": []}])
def test_damaged_tables_are_refused(wrong):
    with pytest.raises(TuningError, match="damaged"):
        ConfidenceTables.from_json(wrong)
