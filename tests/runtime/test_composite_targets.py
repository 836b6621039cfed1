"""Targets that hold their text model beside an image encoder: text as plain, images and unknown ones refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, LlavaConfig, LlavaForConditionalGeneration

from falcon_hf.runtime import target_attention
from falcon_hf.runtime.target import COMPOSITES

from .families import FAMILIES, SHAPE, VOCAB, WINDOW
from .helpers import assert_same_text, bushy_tree, cache_error, prompt_ids, returned_cache
from .test_batch import batch

TREE = bushy_tree(VOCAB, 3, 12)
GREEDY = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def composite(attention: Any = "sdpa") -> Any:
    """A tiny Gemma 3 as ``AutoModelForCausalLM`` loads the larger ones."""
    text = SHAPE | FAMILIES["gemma3_text"]
    config = Gemma3Config(
        text_config=text, vision_config=VISION | {"model_type": "siglip_vision_model"}, mm_tokens_per_image=4,
        image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3,
    )  # fmt: skip
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def test_every_composite_served_is_tested():
    assert {"gemma3"} == COMPOSITES


# In one config the text model's implementation alone is eager, which adds its mask: one of bools would hide nothing.
@pytest.mark.parametrize("attention", ["eager", "sdpa", {"text_config": "eager"}], ids=str)
def test_text_is_plain_text(tiny_drafter, attention):
    target = composite(attention)
    assert type(target).__name__ == "Gemma3ForConditionalGeneration"
    drafter = tiny_drafter(target, 2, tree=TREE)
    for length in (3, WINDOW + 5):
        out = assert_same_text(target, drafter, prompt_ids(VOCAB - 3, length), **GREEDY)
        assert drafter.last_generation.accepted > 0
        assert cache_error(target, out.sequences, returned_cache(out)) < 1e-4


def test_a_batch(tiny_drafter):
    target = composite()
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"] % (VOCAB - 3)
    assert_same_text(target, tiny_drafter(target, 2, tree=TREE), inputs, max_new_tokens=20, pad_token_id=0)


def test_the_comparison_sees_a_mask_for_the_whole_models_attention(tiny_drafter, monkeypatch):
    """The control: the top config's implementation is sdpa, the text model's eager."""
    target = composite({"text_config": "eager"})
    monkeypatch.setattr(target_attention, "attention_of", lambda target: target.config._attn_implementation)
    drafter = tiny_drafter(target, 2, tree=TREE)
    out = target.generate(prompt_ids(VOCAB - 3, 5), assistant_model=drafter, **GREEDY)
    assert cache_error(target, out.sequences, returned_cache(out)) > 1e-3


def test_an_image_is_refused_before_any_token(tiny_drafter):
    target = composite()
    drafter = tiny_drafter(target, 2, tree=TREE)
    image = [VOCAB - 1] * 4
    ids = torch.tensor([[3, 5, VOCAB - 2, *image, VOCAB - 3, 7]])
    given = {"pixel_values": torch.rand(1, 3, 28, 28), "max_new_tokens": 8, "do_sample": False}
    assert target.generate(ids, **given).shape[1] == ids.shape[1] + 8
    with pytest.raises(ValueError, match=r"cannot carry the model input '(mm_encoder_outputs|pixel_values)'"):
        target.generate(ids, assistant_model=drafter, **given)


def test_other_composites_are_refused(tiny_drafter, tiny_target):
    config = LlavaConfig(
        text_config=SHAPE | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=VOCAB - 1,
    )  # fmt: skip
    target = LlavaForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="in another one, 'llava', on which Falcon has not been verified"):
        target.generate(prompt_ids(VOCAB - 3, 5), assistant_model=tiny_drafter(target, 2), max_new_tokens=8)
