"""What Falcon cannot do is said before the target computes anything, with what to do instead."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoConfig,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from falcon_hf import FalconDrafter, FalconDrafterConfig, TargetMismatchWarning
from falcon_hf.runtime.target import fingerprint, fingerprint_distance

from .helpers import assert_same_text, bushy_tree, prompt_ids

VOCAB = 24


@pytest.fixture
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.fixture
def drafter(target, tiny_drafter):
    return tiny_drafter(target, 2, tree=bushy_tree(VOCAB, 2, 12))


def assert_refused(target: Any, drafter: Any, message: str, error: Any = ValueError, **options: Any) -> None:
    """``generate()`` raises an error that says ``message``, and the target's forward was never called."""
    called = []
    handle = target.register_forward_pre_hook(lambda *_: called.append(1))
    try:
        with pytest.raises(error, match=message):
            target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, **({"max_new_tokens": 4} | options))
    finally:
        handle.remove()
    assert not called
    assert drafter.last_generation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, r"num_beams=2 does not go with .*transformers would ignore.* set num_beams=1"),
        ({"num_beams": 3, "do_sample": True}, "num_beams=3"),
        ({"num_beams": 4, "num_return_sequences": 2}, "num_beams=4"),
        ({"use_cache": False}, "needs a key-value cache: drop use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens .*drop one of the two"),
        ({"use_mtp": True}, "use_mtp .*drop one of the two"),
        ({"speculation_type": "dflash"}, "speculation_type .*drop one of the two"),
        ({"assistant_early_exit": 1}, "assistant_early_exit .*drop one of the two"),
        ({"dola_layers": "high"}, "dola_layers .*would change the text.*drop one of the two"),
        ({"assistant_tokenizer": object(), "tokenizer": object()}, "drop assistant_tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_options_that_exclude_a_drafter(target, drafter, options, message):
    assert_refused(target, drafter, message, **options)


def test_options_in_a_generation_config(target, drafter):
    config = GenerationConfig(num_beams=2, max_new_tokens=4)
    assert_refused(target, drafter, "num_beams=2", generation_config=config)


def test_ensemble_weight_is_refused_where_transformers_knows_it(target, drafter):
    """It would change the text. Before 5.2x it is no option at all, and transformers refuses it itself."""
    assert_refused(target, drafter, "assistant_ensemble_weight", assistant_ensemble_weight=0.5)


def test_how_other_assistants_draft_is_not_lost_silently(target, drafter, caplog):
    options = {"num_assistant_tokens": 7, "assistant_confidence_threshold": 0.9}
    with caplog.at_level(logging.WARNING):
        target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, max_new_tokens=2)
        assert "other assistants" not in caplog.text
        target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, max_new_tokens=2, **options)
    assert all(f"{option} is for other assistants" in caplog.text for option in options)


def test_other_vocabulary(tiny_target, tiny_drafter, target):
    drafter = tiny_drafter(tiny_target(25), 2)
    assert_refused(target, drafter, "vocabulary of 25 tokens, LlamaForCausalLM has 24")


def test_other_hidden_size(tiny_target, tiny_drafter, target):
    drafter = tiny_drafter(tiny_target(VOCAB, hidden_size=32), 2)
    assert_refused(target, drafter, "hidden states of width 32, LlamaForCausalLM has 64")


def test_a_refusal_names_the_drafters_own_target(tiny_drafter, target):
    drafter = tiny_drafter(target, 2, vocab_size=99, target_name_or_path="someone/their-model")
    assert_refused(target, drafter, "trained for this target .*someone/their-model")


def test_drafter_of_another_model_is_a_warning(tiny_target, tiny_drafter, target):
    drafter = tiny_drafter(tiny_target(VOCAB, seed=1), 2, target_name_or_path="someone/their-model")
    with pytest.warns(TargetMismatchWarning, match="another target .*someone/their-model"):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 5), max_new_tokens=12, do_sample=False)


def test_the_warning_can_be_made_an_error(tiny_target, tiny_drafter, target):
    drafter = tiny_drafter(tiny_target(VOCAB, seed=1), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TargetMismatchWarning)
        assert_refused(target, drafter, "another target", TargetMismatchWarning)


def test_the_same_model_in_another_dtype_is_no_other_model(target, drafter):
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(target).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = cast.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, max_new_tokens=4, do_sample=False)
        assert out.shape == (1, 9)


def test_fingerprints(tiny_target, target):
    own, other = fingerprint(target), fingerprint(tiny_target(VOCAB, seed=1))
    assert fingerprint_distance(own, own) == 0
    assert fingerprint_distance(own, fingerprint(copy.deepcopy(target).to(torch.bfloat16))) < 0.01
    assert fingerprint_distance(own, other) > 1
    assert fingerprint_distance(own, own[:-1]) == float("inf")
    with torch.device("meta"):
        assert fingerprint(AutoModelForCausalLM.from_config(target.config)) is None


def test_a_drafter_without_fingerprint_is_taken_on_trust(tiny_target, target):
    drafter = FalconDrafter(FalconDrafterConfig.from_target(tiny_target(VOCAB, seed=1).config)).eval()
    assert_same_text(target, drafter, prompt_ids(VOCAB, 5), max_new_tokens=8, do_sample=False)


_TINY = {"vocab_size": VOCAB, "hidden_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def test_encoder_decoder(drafter):
    shape = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    assert_refused(model, drafter, "T5ForConditionalGeneration is an encoder-decoder; Falcon needs a decoder-only")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GPTNeoConfig(**_TINY, num_layers=1, attention_types=[[["global"], 1]], num_heads=4),
            "on the family 'gpt_neo'",
        ),
        (MambaConfig(**_TINY, num_hidden_layers=1, state_size=4), "recurrent state that cannot be rolled back"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_families_that_trees_would_get_wrong(drafter, config, message):
    assert_refused(AutoModelForCausalLM.from_config(config).eval(), drafter, message)


@pytest.mark.parametrize("kind", ["DeepSpeed", "DTensor", "flat"])
def test_a_target_in_pieces(target, drafter, kind):
    """Before anything reads what is not there: the fingerprint does."""
    target = copy.deepcopy(target)
    weight = target.get_output_embeddings().weight
    if kind == "flat":
        target.get_output_embeddings().weight = torch.nn.Parameter(weight.detach().flatten())
    else:
        setattr(weight, {"DeepSpeed": "ds_id", "DTensor": "device_mesh"}[kind], 0)
    assert_refused(target, drafter, "in pieces on several devices.*load it whole")


def test_layers_with_sequential_state(drafter):
    """A family may be fine and one of its layers not."""
    config = AutoConfig.for_model("llama", **_TINY, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert_refused(model, drafter, "'linear_attention' layers, whose state is sequential")


@pytest.mark.parametrize(
    ("tree", "message"),
    [([[0], [1, 0]], "not its parent"), ([[0], [0]], "twice"), ([[25]], "26 siblings")],
    ids=str,
)
def test_impossible_trees(target, drafter, tree, message):
    drafter.config.tree = tree  # a config from a file may refuse it earlier
    assert_refused(target, drafter, message)


def test_model_inputs_that_a_tree_cannot_carry(target, drafter, monkeypatch):
    """An image, say: models that take more than text may get it past transformers' own check."""
    monkeypatch.setattr(type(target), "_validate_model_kwargs", lambda *args: None)
    assert_refused(target, drafter, "cannot carry the model input 'pixel_values'", pixel_values=torch.ones(1, 3))


def saved(drafter: Any, folder: Any) -> Any:
    drafter.save_pretrained(folder)
    return folder / "model.safetensors"


def test_absent_weights(drafter, tmp_path):
    saved(drafter, tmp_path).unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        FalconDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(drafter, tmp_path, keep):
    file = saved(drafter, tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises((OSError, SafetensorError, ValueError)):
        FalconDrafter.from_pretrained(tmp_path)


def test_weights_of_another_shape(target, tiny_drafter, drafter, tmp_path):
    file = saved(drafter, tmp_path)
    other = saved(tiny_drafter(target, 2, intermediate_size=48), tmp_path / "other")
    file.write_bytes(other.read_bytes())
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|mlp"):
        FalconDrafter.from_pretrained(tmp_path)


def test_missing_weights(drafter, tmp_path):
    """Where transformers itself would put random numbers, and warn."""
    file = saved(drafter, tmp_path)
    weights = load_file(file)
    del weights["layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: layers\.0\.mlp\.up_proj\.weight"):
        FalconDrafter.from_pretrained(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(OSError, match="nothing-here"):
        FalconDrafter.from_pretrained(tmp_path / "nothing-here")


def test_feature_layers_of_another_target(target, tiny_drafter):
    drafter = tiny_drafter(target, feature_layers=[1, 7])
    assert_refused(target, drafter, r"hidden states \[1, 7\].*number 2")


def test_a_config_that_was_changed_is_looked_at_again(target, drafter):
    before = drafter.config.verifier
    drafter.config.verifier = "rejecton"
    try:
        assert_refused(target, drafter, "verifier")
    finally:
        drafter.config.verifier = before
