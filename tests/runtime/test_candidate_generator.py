"""A tree step equals running each path alone through the drafter's training forward."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from falcon_hf import FalconCandidateGenerator, TreeShape
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS
from falcon_hf.runtime.fusion import FalconFusion
from falcon_hf.runtime.target import head_weight, input_embeddings
from falcon_hf.runtime.tree_shape import chain

from .helpers import bushy_tree, with_correction

VOCAB = 24
PASSES = 3


def deep_tree(block_size: int) -> list[list[int]]:
    """Three passes of k, several blocks in each: ranks 0 to 3 near the root, then 0 and 1, then 0."""
    paths, level = [], [()]
    for depth in range(1, PASSES * block_size + 1):
        width = 4 if depth == 1 else 2 if depth in (block_size, block_size + 1, 2 * block_size + 1) else 1
        level = [(*path, rank) for path in level for rank in range(width)]
        paths += level
    return [list(path) for path in paths]


def committed(target: Any, pairs: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Committed pairs of a random text: features ``[1, pairs, H]`` and the tokens one ahead ``[1, pairs]``."""
    ids = torch.randint(VOCAB, (1, pairs + 1), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        hidden = target(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
    return hidden, ids[:, 1:]


def recorded_draft(
    generator: FalconCandidateGenerator, root: torch.Tensor, depth: int = 99
) -> tuple[Any, list[torch.Tensor]]:
    """A draft, and the features ``[W * k, H]`` of each of its passes."""
    features: list[torch.Tensor] = []
    laws = generator._laws
    plain = laws.products

    def products(of: torch.Tensor) -> torch.Tensor:
        features.append(of.flatten(0, 1))
        return plain(of)

    laws.products = products  # an instance attribute, taken away below
    try:
        with torch.no_grad():
            return generator.draft(root, max_depth=depth), features
    finally:
        del laws.products


def path_features(drafter: Any, target: Any, features: torch.Tensor, tokens: torch.Tensor, drafted: list[int]) -> Any:
    """The definition: features ``[k, H]`` of the block behind ``drafted`` (a multiple of k), this path alone.

    The whole sequence of pairs goes through the training forward, once a block, without any cache.
    """
    k = drafter.config.block_size
    embedded = input_embeddings(target, tokens).to(drafter.dtype)
    pairs = drafter.start_pairs(features.to(drafter.dtype)), drafter.start_pairs(embedded)
    for start in range(0, len(drafted) + 1, k):
        offset = torch.tensor([-pairs[0].shape[1] % k])
        with torch.no_grad():
            block = drafter(*pairs, block_offset=offset)[:, -k:]
        if start == len(drafted):
            return block[0]
        embedded = input_embeddings(target, torch.tensor([drafted[start : start + k]])).to(drafter.dtype)
        pairs = torch.cat((pairs[0], block), dim=1), torch.cat((pairs[1], embedded), dim=1)


def expected_draft(
    drafter: Any, target: Any, features: torch.Tensor, tokens: torch.Tensor, shape: TreeShape
) -> tuple[list[int], dict[tuple[int, ...], torch.Tensor]]:
    """Tokens of all nodes but the root, and the features of the block behind each boundary path."""
    k, head = drafter.config.block_size, head_weight(target).to(drafter.dtype)
    token_of: dict[tuple[int, ...], int] = {}
    blocks: dict[tuple[int, ...], torch.Tensor] = {}
    for path in shape.paths:
        boundary = path[: (len(path) - 1) // k * k]
        if boundary not in blocks:
            drafted = [token_of[boundary[:end]] for end in range(1, len(boundary) + 1)]
            blocks[boundary] = path_features(drafter, target, features, tokens, drafted)
        estimate = blocks[boundary][len(path) - 1 - len(boundary)]
        if drafter.correction is not None and len(path) - 1 > len(boundary):
            before = input_embeddings(target, torch.tensor(token_of[path[:-1]])).to(drafter.dtype)
            estimate = drafter.correct(estimate, before)
        law = estimate @ head.T
        token_of[path] = int(law.argsort(descending=True)[path[-1]])
    return [token_of[path] for path in shape.paths], blocks


def tree_step_error(drafter: Any, target: Any, pairs: int) -> tuple[float, bool]:
    """Largest relative difference of the passes' features from the definition's, and whether all tokens agree.

    In float64, so that rounding is far below any mistake.
    """
    features, tokens = committed(target, pairs)
    drafter.double()
    generator = FalconCandidateGenerator(drafter, target)
    generator.append(features, tokens)
    tree, passes = recorded_draft(generator, tokens[:, -1:])
    nodes, blocks = expected_draft(drafter, target, features, tokens, generator.shape)
    own, expected = torch.cat(passes), torch.cat(list(blocks.values()))
    assert own.shape == expected.shape
    error = float((own - expected).abs().max() / expected.abs().max())
    return error, tree.tokens[0, 1:].tolist() == nodes


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_tree_step_is_each_path_alone(tiny_target, tiny_drafter, block_size, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_size, fusion, tree=deep_tree(block_size))
    for pairs in range(1, 2 * block_size + 2):  # shorter than a block, and every alignment
        error, same_tokens = tree_step_error(drafter, target, pairs)
        assert error < 1e-9
        assert same_tokens


@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_paper_tree_is_each_path_alone(tiny_target, tiny_drafter, block_size):
    target = tiny_target(VOCAB)
    error, same_tokens = tree_step_error(tiny_drafter(target, block_size), target, pairs=7)
    assert error < 1e-9
    assert same_tokens


@pytest.mark.parametrize("fusion", ["linear", "lstm"])
@pytest.mark.parametrize("block_size", [2, 3])
def test_corrected_laws_know_the_token_before(tiny_target, tiny_drafter, block_size, fusion):
    """Each node is ranked by the law of its own parent; the control leaves the correction out of the definition."""
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 7)
    tree = deep_tree(block_size)
    drafter = with_correction(tiny_drafter(target, block_size, fusion, tree=tree, correction_rank=8)).double()
    generator = FalconCandidateGenerator(drafter, target)
    generator.append(features, tokens)
    with torch.no_grad():
        drafted = generator.draft(tokens[:, -1:], max_depth=99).tokens[0, 1:].tolist()
        assert drafted == expected_draft(drafter, target, features, tokens, generator.shape)[0]
        drafter.correction.up.zero_()
        assert drafted != expected_draft(drafter, target, features, tokens, generator.shape)[0]


def another_blocks_states(monkeypatch):
    plain = FalconFusion.forward

    def forward(self, features, embeddings, state=None, lengths=None):
        if state is not None and features.shape[0] > 1:
            state = tuple(part.roll(1, dims=1) for part in state)
        return plain(self, features, embeddings, state, lengths)

    monkeypatch.setattr(FalconFusion, "forward", forward)


def changed_passes(monkeypatch, change):
    plain = FalconCandidateGenerator._plan

    def plan(self, shape, depth):
        changed = copy.copy(plain(self, shape, depth))
        changed.passes = [change(each) for each in changed.passes]
        return changed

    monkeypatch.setattr(FalconCandidateGenerator, "_plan", plan)


def every_row_visible(monkeypatch):
    changed_passes(monkeypatch, lambda each: dataclasses.replace(each, visible=torch.ones_like(each.visible)))


def causal_inside_block(monkeypatch):
    def change(each):
        rows = each.visible.shape[0]
        own = torch.ones(rows, rows, dtype=torch.bool).tril()
        earlier = torch.ones(rows, each.visible.shape[1] - rows, dtype=torch.bool)
        return dataclasses.replace(each, visible=each.visible & torch.cat((earlier, own), dim=1))

    changed_passes(monkeypatch, change)


def features_of_another_block(monkeypatch):
    changed_passes(monkeypatch, lambda each: dataclasses.replace(each, row_features=each.row_features.roll(2)))


def positions_one_late(monkeypatch):
    changed_passes(monkeypatch, lambda each: dataclasses.replace(each, row_positions=each.row_positions + 1))


@pytest.mark.parametrize(
    "break_it",
    [
        another_blocks_states,
        every_row_visible,
        causal_inside_block,
        features_of_another_block,
        positions_one_late,
    ],
)
def test_tree_step_comparison_sees_broken_passes(tiny_target, tiny_drafter, monkeypatch, break_it):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "lstm", tree=deep_tree(2))
    assert tree_step_error(drafter, target, pairs=5)[0] < 1e-9
    break_it(monkeypatch)
    assert tree_step_error(drafter, target, pairs=5)[0] > 1e-3


def rounds_error(drafter: Any, target: Any) -> float:
    """Largest relative difference between a generator told the pairs in pieces, drafting between, and fresh ones."""
    features, tokens = committed(target, 24)
    drafter.double()
    generator = FalconCandidateGenerator(drafter, target)
    end, worst = 0, 0.0
    for length, drafts in [(1, 1), (1, 0), (2, 2), (5, 0), (1, 0), (3, 1), (4, 1), (7, 1)]:
        generator.append(features[:, end : end + length], tokens[:, end : end + length])
        end += length
        fresh = FalconCandidateGenerator(drafter, target)
        fresh.append(features[:, :end], tokens[:, :end])
        for _ in range(drafts):
            own, expected = (
                torch.cat(recorded_draft(each, tokens[:, end - 1 : end])[1]) for each in (generator, fresh)
            )
            worst = max(worst, float((own - expected).abs().max() / expected.abs().max()))
    assert end == features.shape[1]
    return worst


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 3])
def test_appending_in_pieces_is_appending_at_once(tiny_target, tiny_drafter, block_size, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_size, fusion, tree=deep_tree(block_size))
    assert rounds_error(drafter, target) < 1e-9


def lost_state(generator):
    generator.context._state = None


def mixed_up_pairs(generator):
    generator.context._recent = generator.context._recent.roll(1, dims=1)


@pytest.mark.parametrize("break_it", [lost_state, mixed_up_pairs])
def test_appending_comparison_sees_a_broken_context(tiny_target, tiny_drafter, monkeypatch, break_it):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 3, tree=deep_tree(3))
    plain = FalconCandidateGenerator.draft

    def draft(self, *args, **kwargs):
        tree = plain(self, *args, **kwargs)
        break_it(self)
        return tree

    monkeypatch.setattr(FalconCandidateGenerator, "draft", draft)
    assert rounds_error(drafter, target) > 1e-3


def test_append_of_nothing_changes_nothing(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 4)
    generator = FalconCandidateGenerator(tiny_drafter(target), target)
    generator.append(features, tokens)
    before = recorded_draft(generator, tokens[:, -1:])[0]
    generator.append(features[:, :0], tokens[:, :0])
    assert torch.equal(recorded_draft(generator, tokens[:, -1:])[0].tokens, before.tokens)


def test_drafting_draws_no_random_numbers(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    drafter = tiny_drafter(target)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    generator = FalconCandidateGenerator(drafter, target)
    generator.append(features, tokens)
    generator.draft(tokens[:, -1:], max_depth=9)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_max_depth_cuts_the_same_tree(tiny_target, tiny_drafter, depth):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    generator = FalconCandidateGenerator(tiny_drafter(target, 2, tree=deep_tree(2)), target)
    generator.append(features, tokens)
    whole = recorded_draft(generator, tokens[:, -1:])[0]
    cut = recorded_draft(generator, tokens[:, -1:], depth)[0]
    kept = whole.depths[0] <= depth
    assert cut.depths.max() == depth
    assert torch.equal(cut.tokens[0], whole.tokens[0, kept])
    assert torch.equal(cut.parents[0], whole.parents[0, kept])
    assert torch.equal(cut.ancestors[0], whole.ancestors[0][kept][:, kept])


@pytest.mark.parametrize("depth", [0, -3])
def test_no_depth_left_gives_the_root_alone(tiny_target, tiny_drafter, depth):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    generator = FalconCandidateGenerator(tiny_drafter(target), target)
    generator.append(features, tokens)
    tree = generator.draft(tokens[:, -1:], max_depth=depth)
    assert tree.size == 1
    assert torch.equal(tree.tokens, tokens[:, -1:])


def test_siblings_differ(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    generator = FalconCandidateGenerator(tiny_drafter(target, 2, tree=bushy_tree(VOCAB, 3, 20)), target)
    generator.append(features, tokens)
    tree = generator.draft(tokens[:, -1:], max_depth=9)
    edges = list(zip(tree.parents[0].tolist(), tree.tokens[0].tolist(), strict=True))
    assert len(set(edges)) == len(edges) == tree.size


def test_draft_vocabulary_proposes_its_own_ids_only(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    ids = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19])
    drafter = tiny_drafter(target, 2, draft_vocab_size=len(ids), tree=[[rank] for rank in range(8)])
    drafter.draft_vocab_ids.copy_(ids)
    generator = FalconCandidateGenerator(drafter, target)
    generator.append(features, tokens)
    tree, passes = recorded_draft(generator, tokens[:, -1:])
    law = (passes[0] @ head_weight(target).T)[0]
    expected = [token for token in law.argsort(descending=True).tolist() if token in ids.tolist()]
    assert tree.tokens[0, 1:].tolist() == expected


def test_tree_wider_than_the_draft_vocabulary_is_refused(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, draft_vocab_size=8)
    with pytest.raises(ValueError, match=r"20 siblings.* 8 tokens"):
        FalconCandidateGenerator(drafter, target)


def test_head_scaling_reaches_the_drafts_ranking_monotonically(tiny_target, tiny_drafter):
    """Scale and softcap are monotone, so they change the law but not the ranking."""
    target = tiny_target(VOCAB)
    features, tokens = committed(target, 6)
    drafts = []
    for scaling in ({}, {"logit_scale": 0.25, "logit_softcap": 30.0}):
        drafter = tiny_drafter(target, 2, **scaling)
        generator = FalconCandidateGenerator(drafter, target, chain(4))
        generator.append(features, tokens)
        drafts.append(generator.draft(tokens[:, -1:], max_depth=9).tokens.tolist())
        law = drafter.logits(features[0], head_weight(target))
        raw = features[0] @ head_weight(target).T
        assert torch.allclose(law, 30 * torch.tanh(raw * 0.25 / 30) if scaling else raw, atol=1e-5)
    assert drafts[0] == drafts[1]
