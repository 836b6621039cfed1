"""The training forward's further passes, held against drafting each block of a text alone."""

from __future__ import annotations

import pytest
import torch

from falcon_hf.runtime.rollout import RolloutKeys, own_pairs, relaxed_causal_mask, rollout_mask
from falcon_hf.runtime.target import input_embeddings

from .test_candidate_generator import committed, path_features

VOCAB = 24


def forward(drafter, target, features, tokens, offset, passes, **more):
    """All passes over one text, every column wanted: ``[S, H]`` each."""
    embeddings = drafter.start_pairs(input_embeddings(target, tokens).to(drafter.dtype))
    pairs = drafter.start_pairs(features.to(drafter.dtype))
    columns = torch.arange(pairs.shape[1])
    with torch.no_grad():
        first, *others = drafter(
            pairs,
            embeddings,
            torch.tensor([offset]),
            rollout_embeddings=embeddings,
            rollout_selects=[columns] * (passes - 1),
            **more,
        )
    return [first[0], *others]


@pytest.mark.parametrize("fusion", ["linear", "lstm_stateless"])
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_a_pass_is_what_a_draft_of_that_block_would_be(tiny_target, tiny_drafter, block_size, fusion):
    """Pass p at a block, against a draft that began p - 1 blocks before it along the text's own tokens."""
    k, target = block_size, tiny_target(VOCAB)
    drafter = tiny_drafter(target, k, fusion).double()
    features, tokens = committed(target, 4 * k + 3)
    compared = 0
    for offset in range(k):
        passes = forward(drafter, target, features, tokens, offset, 3)
        for number, estimates in enumerate(passes, start=1):
            for start in range(-offset % k, features.shape[1] + k - 1, k):  # first column of each whole block
                known = start + k - (number - 1) * k - (k - 1)  # pairs committed when the draft began
                if known < 1 or start + k > features.shape[1] + k - 1:
                    continue
                drafted = tokens[0, known : known + (number - 1) * k].tolist()
                alone = path_features(drafter, target, features[:, :known], tokens[:, :known], drafted)
                assert torch.allclose(estimates[start : start + k], alone, rtol=1e-9, atol=1e-9), (
                    offset,
                    number,
                    start,
                )
                compared += 1
    assert compared > 6 * k


def test_true_features_of_the_draft_itself_are_not_seen(tiny_target, tiny_drafter):
    """The control: a pass over the true features, which a draft does not have, differs."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "linear").double()
    features, tokens = committed(target, 11)
    changed = features.clone()
    changed[:, 7:] += 1.0
    first, second = (forward(drafter, target, of, tokens, 0, 3) for of in (features, changed))
    # Pair 7 is in column 8, block 4. Pass p of block b reads true pairs of blocks up to b - (p - 1).
    assert torch.equal(first[0][:8], second[0][:8])
    assert not torch.allclose(first[0][8], second[0][8])
    assert torch.equal(first[1][8:10], second[1][8:10])
    assert not torch.allclose(first[1][10], second[1][10])
    assert torch.equal(first[2][10:], second[2][10:])


def test_selected_outputs_are_those_of_the_whole(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "linear", num_hidden_layers=2).double()
    features, embeddings = torch.randn(2, 3, 9, 64, dtype=torch.double)
    offset, real = torch.tensor([0, 1, 1]), torch.ones(3, 9, dtype=torch.bool)
    real[1, 6:] = False
    select = torch.tensor([0, 5, 9, 14, *range(18, 27)])
    with torch.no_grad():
        whole = drafter(features, embeddings, offset, real).flatten(0, 1)
        assert torch.allclose(drafter(features, embeddings, offset, real, select=select), whole[select])
        everything = torch.arange(27)
        wanted = torch.tensor([2, 7, 12])
        one, two, three = drafter(features, embeddings, offset, real, everything, embeddings[:2], [wanted, wanted])
        assert torch.allclose(one, whole)
        dense = drafter(features, embeddings, offset, real, None, embeddings[:2], [torch.arange(18)] * 2)
        assert torch.allclose(two, dense[1][wanted])
        assert torch.allclose(three, dense[2][wanted])


def test_gradients_flow_through_the_passes(tiny_target, tiny_drafter):
    drafter = tiny_drafter(tiny_target(VOCAB), 2, "linear")
    features = torch.randn(1, 8, 64, requires_grad=True)
    embeddings = torch.randn(1, 8, 64)
    out = drafter(features, embeddings, torch.tensor([0]), None, None, embeddings, [torch.tensor([6])])
    out[1].sum().backward()
    # Column 6 reads the estimate of column 4, which read pairs up to column 5.
    assert features.grad[0, :6].abs().amax(-1).min() > 0
    assert features.grad[0, 6:].abs().max() == 0


def test_masks_have_no_empty_row_and_hide_padding():
    offset = torch.tensor([0, 1])
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, 4:] = False
    for number in (2, 3, 4):
        mask = rollout_mask(7, 2, offset, number, real)
        assert mask.shape == (2, 1, 7, 7 * number)
        assert mask.any(-1).all()
        assert not mask[0, 0, :, 4:7].any()
    assert relaxed_causal_mask(7, 2, offset).shape == (2, 1, 7, 7)


def test_own_pairs_come_from_the_block_before():
    estimates = torch.arange(10.0).view(1, 5, 2)
    moved = own_pairs(estimates, 2)
    assert moved.shape == estimates.shape
    assert moved[0, :2].abs().max() == 0
    assert torch.equal(moved[0, 2:], estimates[0, :3])


def test_keys_lie_pass_behind_pass():
    keys = RolloutKeys(1)
    first, second = torch.randn(2, 3, 1, 4, 5)
    assert torch.equal(keys.write(0, first, -first)[0], first)
    keys.keep_rows(2)
    both, values = keys.write(0, second[:2], -second[:2])
    assert torch.equal(both, torch.cat((first[:2], second[:2]), dim=2))
    assert torch.equal(values, -both)


def test_a_recurrent_fusion_is_refused(tiny_target, tiny_drafter):
    drafter = tiny_drafter(tiny_target(VOCAB), 2, "lstm")
    embeddings = torch.randn(1, 6, 64)
    with pytest.raises(ValueError, match="linear"):
        drafter(torch.randn(1, 6, 64), embeddings, torch.tensor([0]), None, None, embeddings, [torch.tensor([4])])
