"""Look-up's chances by length of match, counted on texts."""

from __future__ import annotations

import pytest
import torch

from falcon_hf.runtime.suffix_lookup import SuffixLookup
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.lookup_measurement import LookupCounts, count_lookups
from falcon_hf.tuning.rank_measurement import GreedyText


def text(tokens: list[int], prompt_length: int) -> GreedyText:
    return GreedyText(torch.tensor([tokens]), prompt_length, {})


def counted(tokens: list[int], prompt_length: int) -> tuple[list[int], list[int]]:
    """By hand: for each root, the longest and latest earlier match of the text's end, and what followed it."""
    lengths = len(SuffixLookup().acceptance)
    trials, hits = [0] * lengths, [0] * lengths
    for root in range(prompt_length, len(tokens) - 1):
        best, following = 0, -1
        for place in range(root):
            length = 0
            while length < min(place + 1, lengths) and tokens[place - length] == tokens[root - length]:
                length += 1
            if length and length >= best:
                best, following = length, tokens[place + 1]
        if best:
            trials[best - 1] += 1
            hits[best - 1] += following == tokens[root + 1]
    return trials, hits


def test_counts_are_those_by_hand():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 4, (40,), generator=generator).tolist() for _ in range(3)]
    texts.append([7, 8, 9] * 8)  # long matches
    found = count_lookups([text(tokens, 5) for tokens in texts])
    by_hand = [counted(tokens, 5) for tokens in texts]
    assert list(found.trials) == [sum(column) for column in zip(*(trials for trials, _ in by_hand), strict=True)]
    assert list(found.hits) == [sum(column) for column in zip(*(hits for _, hits in by_hand), strict=True)]
    assert found.trials[-1] > 0
    assert 0 < sum(found.hits) < sum(found.trials)


def test_an_answer_of_one_token_has_nothing_to_count():
    assert not any(count_lookups([text([1, 2, 3], 2)]).trials)


def test_chances_lie_between_what_was_counted_and_the_default_and_grow():
    default = SuffixLookup().acceptance
    none, many = len(default) * (0,), len(default) * (10_000,)
    assert LookupCounts(none, none).config_entry() == {"acceptance": list(default)}
    always = LookupCounts(many, many).config_entry()["acceptance"]
    assert min(always) > 0.99
    few = LookupCounts((20, *none[1:]), (0, *none[1:])).config_entry()["acceptance"]
    assert few[0] == pytest.approx(default[0] / 2)
    assert few[1:] == pytest.approx(default[1:])
    falling = LookupCounts(many, tuple(range(10_000, 10_000 - 100 * len(default), -100))).config_entry()["acceptance"]
    assert falling == sorted(falling)
    assert SuffixLookup.from_config({"acceptance": falling}).acceptance == tuple(falling)


@pytest.mark.parametrize(
    "value",
    [None, {}, {"trials": [1], "hits": [1]}, {"trials": 12 * [1], "hits": 12 * [2]}, {"trials": "x", "hits": []}],
)
def test_damaged_counts_are_refused(value):
    with pytest.raises(TuningError, match="look-up counts are damaged"):
        LookupCounts.from_json(value)
