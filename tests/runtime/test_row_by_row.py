"""Processors of a batch, whose rows take their steps one by one: each asked as plain decoding asks, or refused."""

from __future__ import annotations

import pytest
import torch
from transformers import SynthIDTextWatermarkingConfig

from .helpers import assert_same_text, bushy_tree, run
from .test_batch import VOCAB, batch

TREE = bushy_tree(VOCAB, 3, 12)


@pytest.fixture
def pair(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    return target, tiny_drafter(target, tree=TREE)


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_constraint_is_asked_about_texts_that_there_are(pair, sequences):
    target, drafter = pair
    inputs = batch()
    width = inputs["input_ids"].shape[1]
    prompts = {tuple(row): index for index, row in enumerate(inputs["input_ids"].tolist())}
    assert len(prompts) == len(inputs["input_ids"])

    def allowed(prompt: int, ids: torch.Tensor) -> list[int]:
        # As with a trie of answers for each prompt: it knows no other text. Older transformers (5.17) number sequences.
        assert prompts[tuple(ids[:width].tolist())] in (prompt, prompt // sequences)
        return [(int(ids[-1]) * step + prompt) % VOCAB for step in (1, 3, 5, 7)]

    assert_same_text(
        target, drafter, inputs, do_sample=True, temperature=2.0, max_new_tokens=20, pad_token_id=0,
        num_return_sequences=sequences, prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    assert drafter.last_generation.accepted > 0


@pytest.mark.parametrize("option", ["guidance_scale", "watermarking_config"])
def test_what_counts_the_batchs_steps_is_refused_for_a_batch(pair, option):
    target, drafter = pair
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 9, 2], context_history_size=16)
    options = {"guidance_scale": 1.5} if option == "guidance_scale" else {"watermarking_config": config}
    options |= {"do_sample": True, "max_new_tokens": 12, "pad_token_id": 0}
    with pytest.raises(ValueError, match=f"{option} counts the steps.*one by one"):
        run(target, 0, batch(), assistant_model=drafter, **options)
    assert_same_text(target, drafter, batch()["input_ids"][:1], **options)
