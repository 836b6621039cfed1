"""Each part of CSGD, and what they are together."""

from __future__ import annotations

import pytest
import torch

from falcon_hf.training.csgd import (
    choose_glanced,
    draw_block_offsets,
    feature_noise,
    glance_count,
    glance_lambda,
    hamming_distance,
    replace_coupled,
)
from falcon_hf.training.row_draws import RowDraws, mix


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_offsets_are_all_alignments_evenly():
    offsets = draw_block_offsets(uniform(3000), 3)
    assert offsets.bincount().tolist() == pytest.approx([1000] * 3, abs=90)
    assert draw_block_offsets(torch.tensor([0.0, 0.999999, 1.0]), 4).tolist() == [0, 3, 3]


def test_noise_is_uniform_and_centred():
    noise = feature_noise(uniform(20000), 0.1)
    assert float(noise.min()) == pytest.approx(-0.1, abs=1e-3)
    assert float(noise.max()) == pytest.approx(0.1, abs=1e-3)
    assert abs(float(noise.mean())) < 2e-3
    assert float(noise.std()) == pytest.approx(0.2 / 12**0.5, rel=0.02)


def test_lambda_falls_in_a_line_to_zero():
    assert [glance_lambda(progress) for progress in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    assert glance_lambda(0.25, 0.8) == pytest.approx(0.6)


def test_distance_counts_wrong_tokens_of_counted_columns():
    drafted = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    said = torch.tensor([[1, 9, 3, 9], [0, 0, 0, 8]])
    counted = torch.tensor([[True, True, True, False], [True, False, True, True]])
    assert hamming_distance(drafted, said, counted).tolist() == [1, 2]


def test_count_is_lambda_times_distance_rounded():
    assert glance_count(torch.tensor([0, 1, 2, 10]), 0.3).tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("longest", [None, 1, 2])
def test_glanced_columns_are_n_and_runs_within_blocks(block_size, longest):
    rows, columns = 64, 41
    offset = torch.arange(rows) % block_size
    candidates = uniform(rows, columns, seed=1) < 0.8
    counts = torch.arange(rows) % 9
    draws = uniform(rows, columns // block_size + 2, 3, seed=2)
    chosen = choose_glanced(counts, candidates, offset, block_size, draws, longest)
    assert not (chosen & ~candidates).any()
    assert (chosen.sum(-1) <= counts).all()
    whole = choose_glanced(torch.full((rows,), columns), candidates, offset, block_size, draws, longest)
    assert torch.equal(chosen.sum(-1), counts.minimum(whole.sum(-1)))  # N, unless the runs hold fewer
    assert not (chosen & ~whole).any()
    for row in range(rows):
        picked = chosen[row].nonzero()[:, 0]
        block = (picked + offset[row]) // block_size
        for number in block.unique():
            run = picked[block == number]
            assert len(run) <= (longest or block_size)
            between = torch.arange(run[0], run[-1] + 1)
            # Consecutive: only columns that may not be replaced lie between.
            assert not (candidates[row, between] & ~chosen[row, between]).any()


def test_glanced_columns_are_spread_over_places_and_blocks():
    rows, columns = 4000, 21
    ones = torch.ones(rows, columns, dtype=torch.bool)
    offset = torch.zeros(rows, dtype=torch.long)
    chosen = choose_glanced(torch.full((rows,), 3), ones, offset, 2, uniform(rows, 12, 3), 1).sum(0)
    # 10 whole blocks and one of a single column, whose run misses it half the time
    assert chosen[:20].float().mean() == pytest.approx(3 * rows / 21, rel=0.08)
    assert (chosen[:20] - chosen[:20].float().mean()).abs().max() < 0.15 * rows * 3 / 21


@pytest.mark.parametrize("block_size", [2, 3, 4, 8])
def test_every_place_of_a_block_is_replaced_as_often(block_size):
    rows = 20_000
    ones, offset = torch.ones(rows, block_size, dtype=torch.bool), torch.zeros(rows, dtype=torch.long)
    all_of_them = torch.full((rows,), block_size)
    draws = uniform(rows, 3, 3, seed=5)
    shares = choose_glanced(all_of_them, ones, offset, block_size, draws, block_size - 1).float().mean(0)
    assert shares.max() / shares.min() < 1.06
    # Runs that begin inside the block leave its first places out, as this test would see.
    begin = (draws[:, 0, 1, None] * block_size).long()
    end = begin + 1 + (draws[:, 0, 2, None] * (block_size - begin)).long()
    place = torch.arange(block_size)[None]
    naive = ((place >= begin) & (place < end)).float().mean(0)
    assert naive.max() / naive.min() > 1.3


def test_rows_do_not_depend_on_each_other():
    candidates = uniform(6, 17, seed=3) < 0.7
    offset, counts, draws = torch.arange(6) % 3, torch.arange(6), uniform(6, 8, 3, seed=4)
    together = choose_glanced(counts, candidates, offset, 3, draws)
    for row in range(6):
        part = slice(row, row + 1)
        assert torch.equal(choose_glanced(counts[part], candidates[part], offset[part], 3, draws[part]), together[part])


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_replacement_is_the_pair_one_block_ahead_of_both(block_size):
    features, tokens = torch.randn(2, 9, 3), torch.arange(18).view(2, 9)
    replaced = torch.zeros(2, 9, dtype=torch.bool)
    replaced[0, 2] = replaced[1, 4] = True
    seen, said = replace_coupled(features, replaced, block_size), replace_coupled(tokens, replaced, block_size)
    assert torch.equal(seen[0, 2], features[0, 2 + block_size])
    assert torch.equal(seen[1, 4], features[1, 4 + block_size])
    assert said[0, 2] == tokens[0, 2 + block_size]
    assert said[1, 4] == tokens[1, 4 + block_size]
    assert torch.equal(seen[~replaced], features[~replaced])
    assert torch.equal(said[~replaced], tokens[~replaced])


def test_draws_are_a_rows_own():
    """The same whatever rows share a process and however they are padded; others in another step or under a seed."""
    device = torch.device("cpu")
    both = RowDraws(7, 3, range(0, 4), device)
    second = RowDraws(7, 3, range(2, 4), device)
    for shape in ((), (5, 2), (3,)):
        assert torch.equal(both.uniform("noise", *shape)[2:], second.uniform("noise", *shape))
    assert torch.equal(both.uniform("noise", 9, 4)[:, :5], both.uniform("noise", 5, 4))
    again = RowDraws(7, 3, range(0, 4), device).uniform("noise", 8)
    assert again.unique().numel() == 32
    assert not torch.equal(again, both.uniform("glance", 8))
    assert not torch.equal(again, RowDraws(7, 4, range(0, 4), device).uniform("noise", 8))
    assert not torch.equal(again, RowDraws(8, 3, range(0, 4), device).uniform("noise", 8))
    state = torch.get_rng_state()
    both.uniform("noise", 3)
    assert torch.equal(state, torch.get_rng_state())


def test_mixed_seeds_differ():
    seeds = {mix(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
