"""Targets as people load them: quantised, from a GGUF file, offloaded, in a pipeline. Plain text, drafted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, pipeline

from falcon_hf.runtime.target import head_weight, last_device

from .helpers import assert_same_text, bushy_tree, cache_error, prompt_ids, returned_cache

VOCAB = 24
TREE = bushy_tree(VOCAB, 3, 12)
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def folder(tiny_target, tmp_path):
    tiny_target(VOCAB).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def assert_served(target: Any, drafter: Any, tolerance: float = 1e-4) -> None:
    falcon = assert_same_text(target, drafter, prompt_ids(VOCAB, 7), **OPTIONS)
    assert drafter.last_generation.accepted > 0
    assert cache_error(target, falcon.sequences, returned_cache(falcon)) < tolerance


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
class TestQuantised:
    """Where the libraries are installed (extra ``quantised``)."""

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("embeddings", [False, True], ids=["", "embeddings"])
    def test_torchao(self, folder, tiny_drafter, bits, embeddings):
        quantization = pytest.importorskip("torchao.quantization")
        if bits == 8:
            weights = quantization.Int8WeightOnlyConfig()
        else:
            weights = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
        config = TorchAoConfig(weights, include_input_output_embeddings=embeddings)
        target = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
        kind = type(target.get_output_embeddings().weight.data)
        assert (kind is not torch.Tensor) == embeddings
        assert type(head_weight(target)) is torch.Tensor
        assert_served(target, tiny_drafter(target, tree=TREE))

    def test_bitsandbytes(self, folder, tiny_drafter):
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        target = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
        assert type(target.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
        # Its activations are quantised by their own largest value, row by row.
        assert_served(target, tiny_drafter(target, tree=TREE))


def write_gguf(path: Any, model: Any) -> None:
    """A llama of a tiny size as a GGUF file, in Q8_0 where the rows allow it."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        quantised = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = gguf.quants.quantize(values, quantised)
        writer.add_tensor(names.get_name(name, (".weight",)), values, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_target(tiny_target, tiny_drafter, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_target(VOCAB))
    target = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    assert target.config.num_hidden_layers == 2
    # That the file was read: names that match nothing are random weights and a warning.
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj", "lm_head"):
        read, written = (model.get_submodule(name).weight for model in (target, tiny_target(VOCAB)))
        assert torch.allclose(read, written, atol=float(written.abs().max()) / 127)
    target.generation_config.eos_token_id = target.generation_config.bos_token_id = None
    target.generation_config.pad_token_id = 0
    assert_served(target, tiny_drafter(target, tree=TREE))


@pytest.mark.parametrize(
    "disk", [["model.layers.1"], ["lm_head"], ["model.embed_tokens", "model.layers.0", "lm_head"]], ids=str
)
def test_an_offloaded_target(folder, tiny_target, tiny_drafter, tmp_path, disk):
    pytest.importorskip("accelerate")
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = {name: "disk" if name in disk else "cpu" for name in names}
    target = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk").eval()
    assert target.get_submodule(disk[0]).state_dict().popitem()[1].device.type == "meta"
    drafter = tiny_drafter(tiny_target(VOCAB), tree=TREE)
    assert torch.equal(head_weight(target), head_weight(tiny_target(VOCAB)))
    assert_served(target, drafter)
    # Loaded for a moment, and gone again.
    assert target.get_submodule(disk[-1]).state_dict().popitem()[1].device.type == "meta"


def test_the_drafter_follows_the_last_layers_device(tiny_target, tiny_drafter):
    target = copy.deepcopy(tiny_target(VOCAB))
    assert last_device(target) is None
    for places, device in (
        ({"": 0}, None),  # one device: the drafter stays where the user put it
        ({"model.embed_tokens": 0, "model.layers": 1, "lm_head": "disk"}, None),
        ({"model.embed_tokens": "cpu", "model.layers": "disk", "lm_head": "cpu"}, None),
        ({"model.embed_tokens": 0, "model.layers": 0, "model.norm": 1, "lm_head": 1}, torch.device("cuda", 1)),
        ({"model.embed_tokens": "cpu", "model.layers": "cuda:1"}, torch.device("cuda:1")),
    ):
        target.hf_device_map = places
        assert last_device(target) == device
    # No second device here: the meta device shows that the drafter is moved before anything is drafted.
    target.hf_device_map = {"model": "cpu", "lm_head": torch.device("meta")}
    drafter = copy.deepcopy(tiny_drafter(target))
    with pytest.raises((NotImplementedError, RuntimeError)):
        target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, max_new_tokens=4)
    assert drafter.device.type == "meta"


def test_a_pipeline(smollm2, trained_drafter, prompts):
    target, tokenizer = smollm2
    options = {"max_new_tokens": 16, "do_sample": False, "return_full_text": False}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    falcon = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=trained_drafter)
    trained_drafter.last_generation = None
    message = [{"role": "user", "content": prompts[6]}]
    assert falcon(message, **options) == plain(message, **options)
    assert trained_drafter.last_generation.rounds > 0
    trained_drafter.last_generation = None
    two = list(prompts[:2])
    assert falcon(two, batch_size=2, **options) == plain(two, batch_size=2, **options)
    assert trained_drafter.last_generation.rows == 2
