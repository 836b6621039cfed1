"""Falcon's text is plain ``generate()``'s, token for token: tiny targets over every setting, and the real pair."""

from __future__ import annotations

import pytest
import torch

from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS

from .helpers import assert_same_text, bushy_tree, prompt_ids

VOCAB = 24
TREES = {"paper": None, "bushy": bushy_tree(VOCAB, 3, 12), "chain": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


def test_tiny_targets_text_is_varied(tiny_target):
    """Else equality of tokens would say nothing: two wrong texts of one repeated token are equal as well."""
    for seed in range(3):
        text = tiny_target(VOCAB, seed=seed).generate(prompt_ids(VOCAB, 7), max_new_tokens=40, do_sample=False)
        assert len(set(text[0, 7:].tolist())) >= 8


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
def test_tiny_text_is_plain_text(tiny_target, tiny_drafter, block_size, fusion, tree):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, block_size, fusion, tree=TREES[tree])
    for options in (GREEDY, SAMPLED):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=24, **options)
        assert tree == "chain" or drafter.last_generation.accepted >= 5
        assert tree != "bushy" or drafter.last_generation.tau > 0.3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 30])
def test_prompts_of_any_length(tiny_target, tiny_drafter, length):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 4, tree=TREES["bushy"])
    assert_same_text(target, drafter, prompt_ids(VOCAB, length), max_new_tokens=16, do_sample=False)
    assert drafter.last_generation.accepted > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_long_texts_on_several_targets(tiny_target, tiny_drafter, seed, options):
    target = tiny_target(VOCAB, seed=seed)
    drafter = tiny_drafter(target, 2, tree=TREES["bushy"])
    assert_same_text(target, drafter, prompt_ids(VOCAB, 5, seed), seed=seed, max_new_tokens=80, **options)
    assert drafter.last_generation.tau > 0.3


def test_several_drafter_layers(tiny_target, tiny_drafter):
    """From the second layer on cached keys are an approximation, which may cost acceptance but never the text."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 3, num_hidden_layers=2, input_norm=False, tree=TREES["bushy"])
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=24, do_sample=False)
    assert drafter.last_generation.accepted > 0


def test_reduced_draft_vocabulary(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, draft_vocab_size=12, tree=bushy_tree(12, 3, 12))
    drafter.draft_vocab_ids.copy_(torch.arange(1, VOCAB, 2))
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=40, do_sample=False)
    assert drafter.last_generation.accepted > 0


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5, 6])
def test_stops_at_the_length_asked_for(tiny_target, tiny_drafter, new_tokens):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREES["bushy"])
    out = assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=new_tokens, do_sample=False)
    assert out.shape[1] == 6 + new_tokens
    assert drafter.last_generation.new_tokens == new_tokens
    assert drafter.last_generation.rounds <= max(new_tokens - 1, 0)


def test_statistics_add_up(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREES["bushy"])
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=30, do_sample=False)
    stats = drafter.last_generation
    assert stats.new_tokens == 30 == 1 + stats.rounds + stats.accepted
    assert stats.tau == pytest.approx(stats.accepted / stats.rounds)
    assert stats.tau_with_bonus == pytest.approx(stats.tau + 1)
    assert stats.alpha == pytest.approx(stats.accepted / 30)
    # The tree is cut where the text must end, so only the last rounds have fewer nodes.
    full = len(TREES["bushy"])
    assert full * (stats.rounds - 2) <= stats.drafted <= full * stats.rounds
    parts = (stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.other_seconds)
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(stats.total_seconds)
    assert stats.walk_seconds + stats.cache_seconds <= stats.other_seconds
    assert stats.as_dict()["tau"] == stats.tau


def test_no_rounds_give_zero_statistics(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target)
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=1, do_sample=False)
    stats = drafter.last_generation
    assert (stats.rounds, stats.tau, stats.tau_with_bonus, stats.alpha) == (0, 0.0, 0.0, 0.0)


def test_a_failed_call_leaves_the_last_statistics(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target)
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=4, do_sample=False)
    before = drafter.last_generation

    def fail(ids, scores):
        raise KeyError("from a processor")

    with pytest.raises(KeyError, match="from a processor"):
        target.generate(prompt_ids(VOCAB, 6), max_new_tokens=4, assistant_model=drafter, logits_processor=[fail])
    assert drafter.last_generation is before
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("number", range(4))
def test_real_pair_greedy(smollm2, trained_drafter, chat, prompts, number):
    target, _ = smollm2
    assert_same_text(target, trained_drafter, dict(chat(prompts[number])), max_new_tokens=48, do_sample=False)
    assert trained_drafter.last_generation.tau > 0.3


@pytest.mark.parametrize("seed", [0, 1])
def test_real_pair_sampled(smollm2, trained_drafter, chat, prompts, seed):
    target, _ = smollm2
    inputs = dict(chat(prompts[4 + seed]))
    assert_same_text(target, trained_drafter, inputs, seed=seed, max_new_tokens=48, **SAMPLED)
    assert trained_drafter.last_generation.accepted > 0
