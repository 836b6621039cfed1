"""Targets that go by the length of the text: the same text up to the length that is allowed, refused beyond it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Phi3Config, Phi3ForCausalLM, set_seed

from falcon_hf.runtime import generation

from .families import FAMILIES, VOCAB, tiny_family
from .helpers import assert_same_text, bushy_tree, prompt_ids, run

LIMIT = 24
TREE = bushy_tree(VOCAB, 3, 12)
OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": LIMIT,
}


def phi3() -> Any:
    set_seed(0)
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, original_max_position_embeddings=LIMIT, initializer_range=0.5, rope_parameters=LONG,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


@pytest.fixture(params=["dynamic", "longrope"])
def pair(request, tiny_target, tiny_drafter):
    if request.param == "longrope":
        target = phi3()
    else:
        target = tiny_target(VOCAB, rope_parameters=DYNAMIC, max_position_embeddings=LIMIT)
    return target, tiny_drafter(target, tree=TREE)


def largest_gap(target: Any, drafter: Any, new_tokens: int) -> float:
    """Of the logits, in units of their spread, up to the first difference of the texts."""
    ids = prompt_ids(VOCAB, 6)
    plain, _ = run(target, 0, ids, max_new_tokens=new_tokens, **OPTIONS)
    falcon, _ = run(target, 0, ids, max_new_tokens=new_tokens, assistant_model=drafter, **OPTIONS)
    gaps = []
    for step, (a, b) in enumerate(zip(plain.logits, falcon.logits, strict=True)):
        gaps.append(float((a - b).abs().max() / a.std()))
        if plain.sequences[0, 6 + step] != falcon.sequences[0, 6 + step]:
            break
    return max(gaps)


def test_up_to_the_limit_the_text_is_the_same(pair):
    target, drafter = pair
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), do_sample=False, max_new_tokens=LIMIT - 6)
    assert largest_gap(target, drafter, LIMIT - 6) < 1e-4


def test_beyond_it_is_refused_before_any_token(pair):
    target, drafter = pair
    for length in (6, LIMIT + 2):
        with pytest.raises(ValueError, match=f"Beyond {LIMIT} tokens.*lower max_new_tokens"):
            target.generate(prompt_ids(VOCAB, length), assistant_model=drafter, max_new_tokens=LIMIT - 5)


def test_beyond_it_the_text_would_be_another(tiny_target, tiny_drafter, monkeypatch):
    """Else the refusal would be for nothing."""
    target = tiny_target(VOCAB, rope_parameters=DYNAMIC, max_position_embeddings=LIMIT)
    drafter = tiny_drafter(target, tree=TREE)
    monkeypatch.setattr(generation, "check_length", lambda *_: None)
    assert largest_gap(target, drafter, 40) > 1e-3


def test_other_rotary_embeddings_have_no_limit(tiny_target, tiny_drafter):
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    target = tiny_target(VOCAB, rope_parameters=linear, max_position_embeddings=LIMIT)
    assert_same_text(target, tiny_drafter(target, tree=TREE), prompt_ids(VOCAB, 6), do_sample=False, max_new_tokens=40)


def test_attention_scaled_by_the_place_in_the_cache(tiny_drafter):
    assert "llama4_text" in FAMILIES
    target = tiny_family("llama4_text")
    drafter = tiny_drafter(target, tree=TREE)
    options = {"do_sample": False, "max_new_tokens": 20}
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), **options)
    target.config.floor_scale, before = 32, target.config.floor_scale
    try:
        with pytest.raises(ValueError, match=r"from 32 tokens on;.*lower max_new_tokens"):
            target.generate(prompt_ids(VOCAB, 6), assistant_model=drafter, **options)
    finally:
        target.config.floor_scale = before
