"""Spread, agreement, and the gap at a first difference, against values worked out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from falcon_hf.metrics import DifferenceGap, difference_gap, first_difference, spread

IDS = torch.tensor([[3, 7, 1, 7, 3]])


def test_spread_of_five_values() -> None:
    found = spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.count, found.median, found.min, found.max) == (5, 3.0, 1.0, 5.0)
    assert (found.lower_quartile, found.upper_quartile) == (2.0, 4.0)


def test_spread_interpolates() -> None:
    found = spread([1.0, 2.0])
    assert (found.lower_quartile, found.median, found.upper_quartile) == (1.25, 1.5, 1.75)


def test_spread_of_one_value() -> None:
    found = spread([1.5])
    assert {found.median, found.lower_quartile, found.upper_quartile, found.min, found.max} == {1.5}


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_spread_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError, match="spread"):
        spread(values)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([4], [5], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([], [1], 0),
    ],
)
def test_first_difference(a: list[int], b: list[int], expected: int | None) -> None:
    assert first_difference(a, b) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gap_is_the_logits(tiny_target: Callable[..., Any], dtype: torch.dtype) -> None:
    target = copy.deepcopy(tiny_target()).to(dtype)
    with torch.no_grad():
        logits = target(IDS).logits[0, -1].float()
    found = difference_gap(target, IDS, 4, 9)
    assert found.gap == pytest.approx(float(logits[4] - logits[9]), rel=1e-5)
    assert found.unit == pytest.approx(torch.finfo(dtype).eps * float(logits[[4, 9]].abs().max()), rel=1e-5)
    assert difference_gap(target, IDS, 9, 4).gap == -found.gap
    assert found.units == pytest.approx(abs(found.gap) / found.unit)


def test_a_tie_has_no_gap_and_another_token_a_large_one(tiny_target: Callable[..., Any]) -> None:
    target = copy.deepcopy(tiny_target())
    with torch.no_grad():
        best = int(target(IDS).logits[0, -1].argmax())
        twin = (best + 1) % 24
        target.lm_head.weight[twin] = target.lm_head.weight[best]
    assert difference_gap(target, IDS, best, twin).units <= 4
    assert difference_gap(target, IDS, best, (best + 2) % 24).units > 1000


def test_processors_count(tiny_target: Callable[..., Any]) -> None:
    target = tiny_target()
    with torch.no_grad():
        logits = target(IDS).logits[0, -1]
    seen = float(logits[7])
    penalised = seen / 2 if seen > 0 else seen * 2
    found = difference_gap(target, IDS, 7, 9, repetition_penalty=2.0)
    assert found.gap == pytest.approx(penalised - float(logits[9]), rel=1e-5)


def test_a_forbidden_token_has_an_infinite_gap(tiny_target: Callable[..., Any]) -> None:
    # After "3 7 ... 3", a second "3 7" is forbidden.
    found = difference_gap(tiny_target(), IDS, 9, 7, no_repeat_ngram_size=2)
    assert found.gap == math.inf
    assert found.units == math.inf
    assert 0 < found.unit < 1


def test_length_and_sampling_options_are_left_out(tiny_target: Callable[..., Any]) -> None:
    options = {"max_new_tokens": 50, "forced_eos_token_id": 9, "do_sample": True, "temperature": 0.5, "top_p": 0.1}
    assert difference_gap(tiny_target(), IDS, 4, 9, **options) == difference_gap(tiny_target(), IDS, 4, 9)


@pytest.mark.parametrize(
    ("options", "before", "forbidden"),
    [
        ({"min_new_tokens": 3}, 2, True),
        ({"min_new_tokens": 3}, 3, False),
        ({"min_length": IDS.shape[1] + 1}, 2, True),
        ({"min_length": IDS.shape[1]}, 2, False),
        ({"begin_suppress_tokens": [4]}, 0, True),
        ({"begin_suppress_tokens": [4]}, 1, False),
    ],
)
def test_options_that_count_from_the_prompts_end(
    tiny_target: Callable[..., Any], options: dict[str, Any], before: int, forbidden: bool
) -> None:
    """An end that comes too early is an error, not a tie."""
    found = difference_gap(tiny_target(), IDS, 4, 9, before, eos_token_id=4, **options)
    own = difference_gap(tiny_target(), IDS, 4, 9)
    assert found.gap == (-math.inf if forbidden else own.gap)


def test_a_length_penalty_counts_from_the_prompts_end(tiny_target: Callable[..., Any]) -> None:
    with torch.no_grad():
        logits = tiny_target()(IDS).logits[0, -1]
    for before, power in ((2, 0), (5, 2)):
        found = difference_gap(
            tiny_target(), IDS, 4, 9, before, eos_token_id=4, exponential_decay_length_penalty=(3, 1.5)
        )
        end = float(logits[4]) + abs(float(logits[4])) * (1.5**power - 1)
        assert found.gap == pytest.approx(end - float(logits[9]), rel=1e-4)


@pytest.mark.parametrize("ids", [torch.tensor([1, 2]), torch.ones(2, 3, dtype=torch.long), torch.ones(1, 0)])
def test_gap_refuses_other_shapes(tiny_target: Callable[..., Any], ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"one non-empty row"):
        difference_gap(tiny_target(), ids, 1, 2)


def test_units_where_the_scores_are_zero() -> None:
    assert DifferenceGap(0.0, 0.0).units == 0.0
    assert DifferenceGap(1.0, 0.0).units == math.inf
