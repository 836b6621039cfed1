"""Every option of ``generate()`` keeps its meaning with a drafter: against the plain call, under the same seed."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, WatermarkingConfig

from .helpers import assert_same_text, bushy_tree, prompt_ids, run

VOCAB = 24
TREE = bushy_tree(VOCAB, 3, 12)
SAMPLED = {"do_sample": True}
HOT = SAMPLED | {"temperature": 2.0}  # a flat law, so that filters have something to cut
GREEDY = {"do_sample": False}
LENGTH = 24


@pytest.fixture(scope="module")
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.fixture(scope="module")
def drafter(target, tiny_drafter):
    return tiny_drafter(target, 2, tree=TREE)


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": SAMPLED | {"temperature": 1.7},
    "low temperature": SAMPLED | {"temperature": 0.05},
    "top-k": HOT | {"top_k": 4},
    "no top-k": HOT | {"top_k": 0},
    "top-p": HOT | {"top_k": 0, "top_p": 0.8},
    "top-h": HOT | {"top_k": 0, "top_h": 0.4},
    "min-p": HOT | {"top_k": 0, "min_p": 0.05},
    "typical-p": HOT | {"top_k": 0, "typical_p": 0.7},
    "epsilon cutoff": HOT | {"epsilon_cutoff": 0.03},
    "eta cutoff": HOT | {"eta_cutoff": 0.03},
    "all of them": SAMPLED | {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    "repetition penalty": GREEDY | {"repetition_penalty": 1.3},
    "encoder repetition penalty": GREEDY | {"encoder_repetition_penalty": 1.4},
    "no repeated pairs": GREEDY | {"no_repeat_ngram_size": 2},
    "no repeated triples, sampled": HOT | {"no_repeat_ngram_size": 3},
    "bad words": GREEDY | {"bad_words_ids": [[3], [5, 7], [11]]},
    "sequence bias": GREEDY | {"sequence_bias": [[[4], 3.0], [[9, 2], -5.0]]},
    "suppressed tokens": GREEDY | {"suppress_tokens": [1, 2, 3, 4], "begin_suppress_tokens": [12]},
    "forced eos at the end": GREEDY | {"forced_eos_token_id": 7},
    "exponential decay": HOT | {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 9},
    "minimum length": GREEDY | {"min_length": 18, "eos_token_id": [4, 11, 14, 17]},
    "minimum new tokens": HOT | {"min_new_tokens": 9, "eos_token_id": list(range(1, 12))},
    "guidance": GREEDY | {"guidance_scale": 1.5},
    "watermark": HOT | {"watermarking_config": WatermarkingConfig(bias=2.5, context_width=1)},
    "renormalised and checked": HOT | {"renormalize_logits": True, "remove_invalid_values": True},
    "chunked prefill": GREEDY | {"prefill_chunk_size": 2},
    "whole-length limit": GREEDY | {"max_new_tokens": None, "max_length": 17},
    "prefix constraint": HOT
    | {"prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) * step + 1) % VOCAB for step in (1, 3, 5, 7)]},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_keeps_its_meaning(target, drafter, name, seed):
    options = {"max_new_tokens": LENGTH} | copy.deepcopy(OPTIONS[name])
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6, seed), seed=seed, **options)
    assert drafter.last_generation.accepted > 0


def test_options_change_the_text(target, drafter):
    """Else the tests above compare the same text over and over."""
    texts = set()
    for options in OPTIONS.values():
        out, _ = run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, **({"max_new_tokens": 24} | options))
        texts.add(tuple(out[0].tolist()))
    assert len(texts) >= len(OPTIONS) - 5


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("eos", [[1], [2, 5], [3, 4, 13], list(range(24))], ids=str)
def test_eos_inside_an_accepted_path_ends_the_text(target, drafter, eos, options):
    for seed in range(4):
        out = assert_same_text(
            target, drafter, prompt_ids(VOCAB, 6, seed), seed=seed, max_new_tokens=40, eos_token_id=eos, **options
        )
        new = out[0, 6:].tolist()
        assert all(token not in eos for token in new[:-1])


def test_generation_config_object(target, drafter):
    config = GenerationConfig(max_new_tokens=15, do_sample=True, top_k=6, temperature=1.3, pad_token_id=0)
    before = config.to_dict()
    out = assert_same_text(target, drafter, prompt_ids(VOCAB, 6), generation_config=config)
    assert out.shape[1] == 21
    assert config.to_dict() == before


def test_the_targets_own_generation_config(tiny_target, tiny_drafter):
    target = copy.deepcopy(tiny_target(VOCAB))
    target.generation_config.update(do_sample=True, top_k=5, max_new_tokens=13, eos_token_id=3)
    drafter = tiny_drafter(target, 2, tree=TREE)
    for seed in range(4):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6), seed=seed)


def test_max_time_ends_the_text(target, drafter):
    out, _ = run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, max_new_tokens=300, max_time=1e-6)
    assert out.shape[1] == 7, "the first token behind the deadline is the last one, as in plain generate()"
    begin = time.monotonic()
    out, _ = run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, max_new_tokens=500, max_time=0.1)
    assert time.monotonic() - begin < 1.0
    assert 7 < out.shape[1] < 506


@pytest.mark.parametrize("padding", [1, 4, 9])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_left_padding(target, drafter, padding, options):
    ids = prompt_ids(VOCAB, 6)
    padded = torch.cat((torch.zeros(1, padding, dtype=torch.long), ids), dim=1)
    inputs = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    out = assert_same_text(target, drafter, inputs, max_new_tokens=LENGTH, **options)
    unpadded, _ = run(target, 0, ids, max_new_tokens=LENGTH, **options)
    assert out[0, padding:].tolist() == unpadded[0].tolist()
    assert drafter.last_generation.accepted > 0


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_inputs_embeds(target, drafter, options, with_ids):
    ids = prompt_ids(VOCAB, 6)
    inputs = {"inputs_embeds": target.get_input_embeddings()(ids).detach()}
    if with_ids:
        inputs["input_ids"] = ids
    out = assert_same_text(target, drafter, inputs, max_new_tokens=LENGTH, **options)
    assert out.shape[1] == LENGTH + (6 if with_ids else 0)
    assert drafter.last_generation.accepted > 0


def test_without_attention_mask(target, drafter):
    assert_same_text(target, drafter, {"input_ids": prompt_ids(VOCAB, 6)}, max_new_tokens=LENGTH, do_sample=False)


def test_custom_position_ids_are_refused_or_kept(target, drafter):
    ids = prompt_ids(VOCAB, 6)
    inputs = {"input_ids": ids, "position_ids": torch.arange(3, 9)[None]}
    assert_same_text(target, drafter, inputs, max_new_tokens=12, do_sample=False)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Eight letters and sixteen pairs of them, without spaces: stop strings begin and end inside tokens."""
    from tokenizers import Tokenizer, decoders, models

    letters = "abcdefgh"
    pairs = [(one, letters[(index + step) % 8]) for index, one in enumerate(letters) for step in (1, 3)]
    vocabulary = {text: index for index, text in enumerate([*letters, *map("".join, pairs)])}
    assert len(vocabulary) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a")


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_stop_strings(target, drafter, options):
    """Strings of three letters from the text itself: it ends there, and not at the end of a round."""
    tokenizer = letter_tokenizer()
    free, _ = run(target, 0, prompt_ids(VOCAB, 6), max_new_tokens=LENGTH, **options)
    text = tokenizer.decode(free[0, 6:])
    lengths = set()
    for start in range(2, 24):
        out = assert_same_text(
            target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=LENGTH, tokenizer=tokenizer,
            stop_strings=[text[start : start + 3]], **options,
        )  # fmt: skip
        lengths.add(out.shape[1])
    assert len(lengths) > 6


def test_real_stop_string(smollm2, trained_drafter, chat, prompts):
    model, tokenizer = smollm2
    inputs = dict(chat(prompts[0]))
    options = {"max_new_tokens": 40, "do_sample": False, "tokenizer": tokenizer}
    free = model.generate(**inputs, **options)
    answer = tokenizer.decode(free[0, inputs["input_ids"].shape[1] :])
    out = assert_same_text(model, trained_drafter, inputs, stop_strings=[answer[30:36]], **options)
    assert out.shape[1] < free.shape[1]
