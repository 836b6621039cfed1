"""What whole calls say about a round's rest, whatever the machine's slow moments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from falcon_hf.runtime.tree_shape import chain
from falcon_hf.tuning import whole_calls
from falcon_hf.tuning.rank_measurement import GreedyText


def fake_calls(monkeypatch, slow):
    """Plain tokens of 1 s; drafted calls of 5 rounds of 2 s, those numbered in ``slow`` five times as long."""
    drafted = []

    def generate_with(target, drafter, shape, prompt, max_new_tokens):
        drafted.append(shape)
        seconds = 10.0 * (5 if len(drafted) - 1 in slow else 1)
        return SimpleNamespace(
            total_seconds=seconds + 3.5, prefill_seconds=3.0, walk_seconds=0.5, rounds=5, new_tokens=10
        )

    monkeypatch.setattr(whole_calls, "generate_with", generate_with)
    monkeypatch.setattr(whole_calls, "plain_decoding", lambda target, prompt, options: (9, 9.0))
    return drafted


@pytest.mark.parametrize("slow", [(), (0,), (2, 3)])
def test_a_slow_moment_moves_nothing(monkeypatch, slow):
    drafted = fake_calls(monkeypatch, slow)
    prompts, expected = [torch.zeros(1, 4, dtype=torch.long)] * 2, {chain(2): 1.5, chain(4): 1.5}
    times = whole_calls.time_whole_calls(None, None, prompts, expected, 10)
    assert times == whole_calls.WholeCallTimes(plain_token=1.0, walked_token=0.05, round_rest=0.5)
    assert drafted == [chain(2), chain(4)] * 4


def test_slow_calls_in_the_majority_do(monkeypatch):
    """The control: the figure is the calls' own."""
    fake_calls(monkeypatch, range(6))
    times = whole_calls.time_whole_calls(None, None, [torch.zeros(1, 4)] * 2, {chain(2): 1.5, chain(4): 1.5}, 10)
    assert times.round_rest == 8.5


def test_mean_context_counts_tokens_decoded():
    texts = [GreedyText(torch.zeros(1, 14), 10, {}), GreedyText(torch.zeros(1, 22), 20, {})]
    assert whole_calls.mean_context(texts) == pytest.approx((3 * 12 + 1 * 21) / 4)
