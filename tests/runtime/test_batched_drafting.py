"""A batch drafts the trees that its rows would draft one by one, whatever each row has accepted before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from falcon_hf import FalconCandidateGenerator
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS
from falcon_hf.runtime.drafter_context import DrafterContext
from falcon_hf.runtime.fusion import FalconFusion

from .test_candidate_generator import VOCAB, committed, deep_tree, recorded_draft

# Per round, how many pairs each row appends, first the prompts; 0 for a row that has ended.
ROUNDS = [(1, 9, 4), (1, 1, 1), (4, 1, 2), (3, 3, 3), (2, 0, 5), (7, 0, 1), (1, 0, 6)]


def batch_error(drafter: Any, target: Any, rounds: list[tuple[int, ...]] = ROUNDS) -> float:
    """Largest relative difference of the passes' features between a batch and its rows alone, in float64.

    Tokens, parents and depths must agree wherever the features do.
    """
    drafter.double()
    rows = len(rounds[0])
    texts = [committed(target, sum(lengths[row] for lengths in rounds), seed=row) for row in range(rows)]
    together = FalconCandidateGenerator(drafter, target, rows=rows)
    alone = [FalconCandidateGenerator(drafter, target) for _ in range(rows)]
    ends, worst = [0] * rows, 0.0
    for lengths in rounds:
        longest = max(lengths)
        features = torch.full((rows, longest, texts[0][0].shape[-1]), 7.0, dtype=torch.float64)
        tokens = torch.zeros(rows, longest, dtype=torch.long)
        roots = []
        for row, length in enumerate(lengths):
            taken = slice(ends[row], ends[row] + length)
            features[row, :length], tokens[row, :length] = texts[row][0][0, taken], texts[row][1][0, taken]
            alone[row].append(texts[row][0][:, taken], texts[row][1][:, taken])
            ends[row] += length
            roots.append(texts[row][1][:, ends[row] - 1 : ends[row]])
        together.append(features, tokens, list(lengths))
        tree, passes = recorded_draft(together, torch.cat(roots))
        for row in range(rows):
            own, own_passes = recorded_draft(alone[row], roots[row])
            error = max(
                float((both.unflatten(0, (rows, -1))[row] - one).abs().max() / one.abs().max())
                for both, one in zip(passes, own_passes, strict=True)
            )
            worst = max(worst, error)
            if error < 1e-9:
                for name in ("tokens", "parents", "depths", "ancestors"):
                    assert torch.equal(getattr(tree, name)[row], getattr(own, name)[0])
    return worst


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_a_batch_drafts_its_rows_trees(tiny_target, tiny_drafter, block_size, fusion):
    target = tiny_target(VOCAB)
    assert batch_error(tiny_drafter(target, block_size, fusion, tree=deep_tree(block_size)), target) < 1e-9


def test_several_drafter_layers(tiny_target, tiny_drafter):
    """Cached keys of later layers depend on when they were written, so a row must not be written for another's sake."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 3, num_hidden_layers=3, tree=deep_tree(3))
    assert batch_error(drafter, target) < 1e-9


def test_long_prompts_outgrow_the_buffers(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=deep_tree(2))
    assert batch_error(drafter, target, [(300, 2), (1, 2), (1, 400), (2, 1)]) < 1e-9


def columns_of_the_longest(monkeypatch):
    """Every row is taken to be as long as the longest: other blocks, other positions."""
    plain = DrafterContext._append

    def append(self, features, embeddings, lengths):
        plain(self, features, embeddings, lengths)
        self.columns = [max(self.columns)] * self.rows

    monkeypatch.setattr(DrafterContext, "_append", append)


def all_committed_slots_visible(monkeypatch):
    plain = DrafterContext._many_rows

    def many_rows(self):
        positions, mask = plain(self)
        return positions, torch.ones_like(mask)

    monkeypatch.setattr(DrafterContext, "_many_rows", many_rows)


def states_behind_the_padding(monkeypatch):
    plain = FalconFusion.forward

    def forward(self, features, embeddings, state=None, lengths=None):
        return plain(self, features, embeddings, state)

    monkeypatch.setattr(FalconFusion, "forward", forward)


def ended_rows_states_move(monkeypatch):
    plain = DrafterContext._append

    def append(self, features, embeddings, lengths):
        moved = None if lengths is None else [max(length, 1) for length in lengths]
        plain(self, features, embeddings, moved)
        if moved is not None:
            self.columns = [c - m + n for c, m, n in zip(self.columns, moved, lengths, strict=True)]

    monkeypatch.setattr(DrafterContext, "_append", append)


@pytest.mark.parametrize(
    "break_it",
    [columns_of_the_longest, all_committed_slots_visible, states_behind_the_padding, ended_rows_states_move],
)
def test_the_comparison_sees_a_broken_batch(tiny_target, tiny_drafter, monkeypatch, break_it):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 3, tree=deep_tree(3))
    break_it(monkeypatch)
    assert batch_error(drafter, target) > 1e-4
