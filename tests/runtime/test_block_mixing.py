"""Queries that start from their block's newest pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from falcon_hf.runtime.block_mixing import BlockMixing
from falcon_hf.runtime.drafter_context import DrafterContext

from .helpers import assert_same_text, bushy_tree, prompt_ids

VOCAB = 24


def mixing(block_size: int, size: int = 6) -> BlockMixing:
    torch.manual_seed(2)
    module = BlockMixing(block_size, size)
    module.reset(0.3)
    return module


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_it_is_its_formula_in_every_layout(block_size: int) -> None:
    module, size = mixing(block_size), 6
    fused = torch.randn(2, 12, size, generator=torch.Generator().manual_seed(1))
    offset = torch.tensor([0, block_size - 1])
    place = (torch.arange(12)[None] + offset[:, None]) % block_size
    got = module(fused, place)
    for row in range(2):
        for column in range(12):
            j = int(place[row, column])
            newest = min(column + block_size - 1 - j, 11)
            expected = module.weight[j] @ torch.cat((fused[row, column], fused[row, newest]))
            torch.testing.assert_close(got[row, column], expected)
    # Blocks that end at the last column, with and without a broken one in front.
    whole = module(fused)
    torch.testing.assert_close(whole[:1], module(fused[:1], (torch.arange(12)[None] - 12) % block_size))
    torch.testing.assert_close(module(fused[:, 1:])[:, block_size - 1 :], whole[:, block_size:])
    if block_size > 1:
        assert not torch.allclose(whole, module(fused, (torch.arange(12)[None] - 11).expand(2, -1) % block_size))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("block_size", [2, 3])
def test_a_draft_pass_equals_the_training_forward(
    tiny_target: Any, tiny_drafter: Any, block_size: int, layers: int
) -> None:
    """A first pass over the last k pairs: the columns of the same block in the training forward."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_size, "linear", block_mixing=True, num_hidden_layers=layers)
    tokens = prompt_ids(VOCAB, 9)
    features = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        context = DrafterContext(drafter, target)
        context.append(features, tokens[:, 1:])
        drafted, _ = context.first_pass()
        embeddings = target.get_input_embeddings()(tokens[:, 1:])
        columns = 8 + block_size - 1
        offset = torch.tensor([-columns % block_size])
        whole = drafter(drafter.start_pairs(features), drafter.start_pairs(embeddings), offset)
        other = drafter(drafter.start_pairs(features), drafter.start_pairs(embeddings), (offset + 1) % block_size)
    torch.testing.assert_close(drafted, whole[:, -block_size:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(drafted, other[:, -block_size:], atol=1e-3)  # the control: another alignment


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}])
def test_the_text_stays_the_targets(tiny_target: Any, tiny_drafter: Any, options: dict[str, Any]) -> None:
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_mixing=True, tree=bushy_tree(VOCAB, 3, 6))
    assert_same_text(target, drafter, prompt_ids(VOCAB, 7), max_new_tokens=20, **options)
    assert drafter.last_generation.accepted > 0
