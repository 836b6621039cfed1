"""Isotonic regression against a search over all partitions, and the curves made from it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.monotone import Curve, antitonic, isotonic

values = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


def loss(fit, given_values, weights):
    return sum(weight * (a - b) ** 2 for a, b, weight in zip(fit, given_values, weights, strict=True))


@given(values, st.data())
def test_isotonic_is_the_best_monotone_fit(given_values, data):
    """The optimum is constant on blocks, each at its mean: try all ways to cut the sequence into blocks."""
    weights = data.draw(st.lists(st.floats(0.5, 3), min_size=len(given_values), max_size=len(given_values)))
    fit = isotonic(given_values, weights)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(fit))
    best = float("inf")
    for cuts in itertools.product((False, True), repeat=len(given_values) - 1):
        blocks, start = [], 0
        for end, cut in enumerate((*cuts, True), start=1):
            if cut:
                weight = sum(weights[start:end])
                mean = sum(v * w for v, w in zip(given_values[start:end], weights[start:end], strict=True)) / weight
                blocks += [mean] * (end - start)
                start = end
        if all(a <= b + 1e-12 for a, b in itertools.pairwise(blocks)):
            best = min(best, loss(blocks, given_values, weights))
    assert loss(fit, given_values, weights) <= best + 1e-9


@given(values)
def test_antitonic_is_isotonic_upside_down(given_values):
    assert antitonic(given_values) == pytest.approx([-value for value in isotonic([-value for value in given_values])])


def test_curve_averages_pools_and_interpolates():
    curve = Curve.fit([(1, 10), (1, 12), (2, 20), (4, 18), (8, 31)])
    assert curve(1) == 11
    assert curve(2) == curve(4) == 19, "20 and 18 are pooled"
    assert curve(6) == pytest.approx(25)
    assert curve(0) == 11
    assert curve(16) == pytest.approx(55), "straight on"


def test_curve_of_one_point_is_constant():
    assert Curve.fit([(4, 3.0)])(100) == 3.0


def test_curve_needs_a_point():
    with pytest.raises(TuningError, match="at least one measured point"):
        Curve.fit([])
