"""Drafters without attention: heads over a block's own pairs, the baseline of a block without dependence."""

from __future__ import annotations

import pytest
import torch

from falcon_hf import FalconDrafter

from .helpers import assert_same_text, bushy_tree, prompt_ids

VOCAB = 24


def test_a_block_sees_its_own_pairs_and_no_others(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    features = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(3))
    changed = features.clone()
    changed[:, :4] += 1.0  # the blocks before the third
    embeddings = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(4))
    for attention in (False, True):
        drafter = tiny_drafter(target, 2, "linear", block_mixing=True, attention=attention)
        with torch.no_grad():
            one, other = (drafter(each, embeddings, torch.tensor([0])) for each in (features, changed))
        assert torch.equal(one[:, 4:], other[:, 4:]) is not attention  # with attention: the control
        assert not torch.allclose(one[:, :4], other[:, :4])


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_text_stays_the_targets(tiny_target, tiny_drafter, tmp_path, block_size):
    target = tiny_target(VOCAB)
    tree = bushy_tree(VOCAB, block_size + 1, 4)
    drafter = tiny_drafter(target, block_size, "linear", block_mixing=True, attention=False, tree=tree)
    assert not [name for name, _ in drafter.named_parameters() if "q_proj" in name]
    drafter.save_pretrained(tmp_path)
    loaded = FalconDrafter.from_pretrained(tmp_path)
    assert_same_text(target, loaded, prompt_ids(VOCAB, 7), max_new_tokens=20)
    assert loaded.last_generation.accepted > 0


def test_without_the_newest_pair_there_is_nothing_to_draft_from(tiny_target, tiny_drafter):
    with pytest.raises(ValueError, match="set block_mixing=True too"):
        tiny_drafter(tiny_target(VOCAB), 2, "linear", attention=False)
    tiny_drafter(tiny_target(VOCAB), 1, "linear", attention=False)  # k = 1: a pair is its block's newest
