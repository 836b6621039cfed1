"""Draws of a batch: the noise that plain decoding would have given each row at each step, in any order of asking."""

from __future__ import annotations

import pytest
import torch

from falcon_hf.runtime.draws import Draws

from .helpers import bushy_tree, run
from .test_batch import VOCAB, batch

ROWS, STEPS = 3, 5


def _laws() -> torch.Tensor:
    """``[STEPS, ROWS, VOCAB]`` laws."""
    return torch.rand(STEPS, ROWS, VOCAB, generator=torch.Generator().manual_seed(3)).softmax(-1)


@pytest.mark.parametrize("order", ["by step", "by row", "ragged"])
def test_any_order_gives_plain_decodings_tokens_and_state(order):
    laws = _laws()
    torch.manual_seed(0)
    plain = torch.stack([torch.multinomial(laws[step], 1).squeeze(1) for step in range(STEPS)])
    state = torch.get_rng_state()

    steps = [(step, row) for step in range(STEPS) for row in range(ROWS)]
    if order == "by row":
        steps.sort(key=lambda at: (at[1], at[0]))
    elif order == "ragged":  # rows advance by different strides, as in rounds of different acceptance
        steps.sort(key=lambda at: (at[0] // (at[1] + 1), at[1], at[0]))
    torch.manual_seed(0)
    with Draws(ROWS) as draws:
        for step, row in steps:
            assert draws.draw(laws[step, row : row + 1], row, step).tolist() == [plain[step, row]]
    assert torch.equal(torch.get_rng_state(), state)


def test_states_that_no_row_will_ask_for_are_forgotten(tiny_target, tiny_drafter, monkeypatch):
    """However long the text, those between its slowest open row and its longest are kept."""
    target, kept, forget = tiny_target(VOCAB), [], Draws.forget_before

    def noted(self, step):
        forget(self, step)
        kept.append((step, self._last, sorted(self._states)))

    monkeypatch.setattr(Draws, "forget_before", noted)
    drafter = tiny_drafter(target, tree=bushy_tree(VOCAB, 3, 12))
    run(target, 0, batch(), assistant_model=drafter, do_sample=True, max_new_tokens=40, pad_token_id=0)
    assert kept[-1][1] == 40
    assert any(slowest < last for slowest, last, _ in kept)  # rows that differ
    assert all(states == list(range(slowest, last + 1)) for slowest, last, states in kept if slowest)


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_p": 0.9}, {"top_k": 8, "eos_token_id": 5}])
def test_a_sampled_batch_is_plain_decodings(tiny_target, tiny_drafter, options, monkeypatch):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, tree=bushy_tree(VOCAB, 3, 12))
    options = {"do_sample": True, "max_new_tokens": 24, "pad_token_id": 0, **options}
    for seed in range(3):
        plain, state = run(target, seed, batch(), **options)
        falcon, falcon_state = run(target, seed, batch(), assistant_model=drafter, **options)
        assert falcon.tolist() == plain.tolist()
        assert torch.equal(falcon_state, state)
    assert drafter.last_generation.accepted > 0

    # The control: rows that draw one after the other, each from where the last one left the generator.
    monkeypatch.setattr(Draws, "draw", lambda self, law, row, step: torch.multinomial(law, 1).squeeze(1))
    careless, _ = run(target, 2, batch(), assistant_model=drafter, **options)
    assert careless.tolist() != plain.tolist()
