"""Slots of a batch: places and positions as plain decoding counts them, whatever holes the rows have."""

from __future__ import annotations

import torch

from falcon_hf.runtime.target_slots import CachedSlots

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
ROUNDS = [[1, 3, 2], [2, 1, 0], [1, 2, 0], [3, 1, 0]]  # the last row has ended after its first round


def slots() -> CachedSlots:
    return CachedSlots.of_prompt(3, 6, MASK, None, torch.device("cpu"))


def test_a_prompts_places_and_positions():
    prompt = slots()
    assert prompt.place.tolist() == [[-2, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert prompt.next_position.tolist() == [[4], [4], [6]]
    assert prompt.places(prompt.next_position).tolist() == [[4], [6], [6]]
    assert prompt.filled == [4, 4, 6]
    assert prompt.wasted == 0
    assert prompt.without_holes() is None


def test_positions_of_the_users_are_kept_apart_from_places():
    prompt = CachedSlots.of_prompt(1, 4, None, torch.tensor([[0, 1, 5, 9]]), torch.device("cpu"))
    assert prompt.next_position.tolist() == [[10]]
    assert prompt.places(prompt.next_position).tolist() == [[4]]


def test_rows_that_advance_by_different_lengths():
    ragged = slots()
    for lengths in ROUNDS:
        ragged.add(lengths)
    taken = [sum(lengths[row] for lengths in ROUNDS) for row in range(3)]
    assert ragged.length == 6 + sum(map(max, ROUNDS))
    assert ragged.filled == [filled + more for filled, more in zip([4, 4, 6], taken, strict=True)]
    assert ragged.wasted == ragged.length - 6 - max(taken)
    for row, start in enumerate((4, 6, 6)):
        generated = ragged.place[row, 6:][ragged.valid[row, 6:]]
        assert generated.tolist() == list(range(start, start + taken[row]))

    order = ragged.without_holes()
    assert order is not None
    assert order.shape == (3, max(taken))
    for row in range(3):
        assert ragged.valid[row, 6:][order[row, : taken[row]]].all()
    filled = list(ragged.filled)
    ragged.close_holes(order)
    assert ragged.length == 6 + max(taken)
    assert ragged.filled == filled
    assert ragged.valid[:, 6:].sum(-1).tolist() == taken
    assert torch.equal(ragged.valid[:, :6], MASK.bool())
    assert ragged.wasted == 0
    assert ragged.without_holes() is None
