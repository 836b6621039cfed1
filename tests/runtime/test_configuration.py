"""``FalconDrafterConfig``: what it takes from a target, what it refuses, and that a file keeps all of it."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, GemmaConfig, LlamaConfig, T5Config

from falcon_hf import FalconDrafterConfig
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS

from .families import tiny_family


def small(**fields):
    return FalconDrafterConfig(vocab_size=100, hidden_size=64, num_attention_heads=4, **fields)


def test_from_target_takes_over_shape_and_special_tokens(tiny_target):
    target = tiny_target(30, eos_token_id=[3, 5], bos_token_id=1, pad_token_id=2, rms_norm_eps=1e-4)
    config = FalconDrafterConfig.from_target(target, block_size=3)
    assert config.block_size == 3
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(target.config, name), name
    assert config.eos_token_id == [3, 5]
    assert config.num_hidden_layers == 1
    assert config.target_model_type == "llama"
    assert len(config.target_fingerprint) == 32
    assert not config.is_encoder_decoder
    assert config.get_text_config().vocab_size == 30


def test_from_config_has_no_fingerprint(tiny_target):
    config = FalconDrafterConfig.from_target(tiny_target(30).config)
    assert config.target_fingerprint is None
    assert config.hidden_size == 64


def test_defaults():
    config = FalconDrafterConfig()
    assert (config.block_size, config.fusion, config.fusion_layers, config.verifier) == (2, "lstm", 2, "follow")
    assert config.tree is None
    assert config.draft_vocab_size is None
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.hidden_size // config.num_attention_heads


def test_overrides_win(tiny_target):
    config = FalconDrafterConfig.from_target(tiny_target(30), fusion="linear", intermediate_size=32, tree=[[0]])
    assert (config.fusion, config.intermediate_size, config.tree) == ("linear", 32, [[0]])


def test_model_type_is_not_transformers_falcon():
    assert FalconDrafterConfig.model_type == "falcon_drafter"
    assert type(AutoConfig.for_model("falcon")).__module__.startswith("transformers.")
    assert type(AutoConfig.for_model("falcon_drafter")) is FalconDrafterConfig


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [("llama", 1.0, None), ("granite", 1 / 1.5, None), ("cohere", 0.25, None), ("gemma2", 1.0, 30.0)],
)
def test_head_scaling_is_the_targets(family, scale, softcap):
    config = FalconDrafterConfig.from_target(tiny_family(family))
    assert config.logit_scale == pytest.approx(scale)
    assert config.logit_softcap == softcap


def test_rope_of_a_target_with_one_rope_a_layer_type():
    config = FalconDrafterConfig.from_target(tiny_family("gemma3_text"))
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rope_parameters["rope_theta"] == 1_000_000


def test_target_without_rope_gets_a_rope():
    config = FalconDrafterConfig.from_target(tiny_family("gpt2"))
    assert config.rope_parameters["rope_type"] == "default"
    assert (config.hidden_size, config.num_attention_heads) == (64, 4)


def test_unknown_field_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match="no field 'blocksize'; did you mean 'block_size'"):
        small(blocksize=3)
    with pytest.raises(ValueError, match="no field 'fussion'; did you mean 'fusion'"):
        FalconDrafterConfig.from_target(LlamaConfig(), fussion="lstm")
    with pytest.raises(ValueError, match="no field 'zebra'"):
        small(zebra=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"block_size": 9}, "block_size .* from 1 to 8, got 9"),
        ({"block_size": -2}, "block_size must be an integer of at least 1"),
        ({"fusion": "gru"}, "fusion must be one of lstm, lstm_stateless, linear, got 'gru'"),
        ({"verifier": "hope"}, "verifier must be one of follow"),
        ({"fusion_layers": 0}, "fusion_layers must be"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"intermediate_size": -1}, "intermediate_size must be"),
        ({"head_dim": 0}, "head_dim must be"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"draft_vocab_size": 0}, "draft_vocab_size must be"),
        ({"draft_vocab_size": 101}, r"draft_vocab_size must be None or from 1 to vocab_size \(100\), got 101"),
        ({"logit_scale": 0.0}, "must be positive"),
        ({"logit_softcap": -1.0}, "must be positive"),
        ({"tree": []}, "tree must be None"),
    ],
    ids=str,
)
def test_impossible_values_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize(
    "fields", [{"block_size": "2"}, {"block_size": 2.5}, {"tree": "wide"}, {"tree": [0, 1]}], ids=str
)
def test_wrong_types_are_errors(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        small(**fields)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_impossible_shapes_are_errors(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        FalconDrafterConfig(**{name: 0})


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", range(1, 9))
def test_every_block_size_and_fusion_is_possible(block_size, fusion):
    config = small(block_size=block_size, fusion=fusion)
    assert (config.block_size, config.fusion) == (block_size, fusion)


def test_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
        FalconDrafterConfig.from_target(T5Config())


@pytest.mark.parametrize("load", [FalconDrafterConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_file_keeps_everything(tiny_target, tmp_path, load):
    config = FalconDrafterConfig.from_target(
        tiny_target(30, eos_token_id=[3, 5]), block_size=4, fusion="lstm_stateless", tree=[[0], [1], [0, 2]],
        draft_vocab_size=12, logit_softcap=30.0, input_norm=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is FalconDrafterConfig

    def fields(of):
        return {name: value for name, value in of.to_dict().items() if name not in ("_name_or_path", "auto_map")}

    assert fields(loaded) == fields(config)
    assert loaded.tree == [[0], [1], [0, 2]]
    assert loaded.target_fingerprint == config.target_fingerprint


def test_a_file_with_an_impossible_value_is_an_error(tmp_path):
    small().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_size": 12}))
    with pytest.raises(ValueError, match="from 1 to 8, got 12"):
        FalconDrafterConfig.from_pretrained(tmp_path)


def test_a_file_with_an_unknown_field_is_an_error(tmp_path):
    small().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tre": [[0]]}))
    with pytest.raises(ValueError, match="no field 'tre'; did you mean 'tree'"):
        FalconDrafterConfig.from_pretrained(tmp_path)


def test_target_width_that_heads_do_not_divide():
    """The head width is the target's own, not hidden size over heads."""
    config = FalconDrafterConfig.from_target(
        GemmaConfig(hidden_size=96, num_attention_heads=5, num_key_value_heads=1, head_dim=32)
    )
    assert config.head_dim == 32
