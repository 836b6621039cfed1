"""Tiny random targets of many families, each with a sliding window or chunks of 8 where the family has them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 24
WINDOW = 8
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 16}
_WINDOW = {"sliding_window": WINDOW}
_MIXED = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GPT2 = {"n_embd": 64, "n_inner": 96, "n_layer": 4, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# What a family needs beside the common shape, by model_type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW | _HEADS,
    "qwen2": {},
    "qwen3": _HEADS,
    "gemma2": _MIXED | _HEADS | {"query_pre_attn_scalar": 16},
    "gemma3_text": _MIXED | _HEADS | {"query_pre_attn_scalar": 16},
    "phi3": _WINDOW,
    "gpt2": _GPT2,
    "olmo2": {},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 1.5, "residual_multiplier": 0.7},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "mixtral": _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _EXPERTS | _HEADS,
    "phi": {},
    "gpt_neox": {},
    "gptj": _GPT2 | {"rotary_dim": 8},
    "gpt_bigcode": _GPT2,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": {"alibi": False, "new_decoder_architecture": False, "parallel_attn": True},
    "olmo3": _MIXED,
    "stablelm": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": _MIXED | {"logit_scale": 0.25},
    "starcoder2": _WINDOW,
    "deepseek_v3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "glm4": _HEADS,
    "glm4_moe": _HEADS
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": _MIXED | _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": _HEADS
    | {
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 0, 1, 0],
    },
}

# Families that take a chain only, as ``falcon_hf.runtime.target.FAMILIES`` names them.
CHAIN_FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon (ALiBi)": {"alibi": True},
    "lfm2": {"full_attn_idxs": [1, 3], "conv_L_cache": 3},
    "mpt": {"max_seq_len": 256, "use_cache": True},
}


@functools.cache
def tiny_family(name: str, attention: str = "eager", std: float = 0.3, vocab: int = VOCAB) -> Any:
    """A random model of a family in float32; weights of ``std``, so that its text is varied."""
    torch.manual_seed(0)
    shape = SHAPE | {"initializer_range": std, "vocab_size": vocab}
    if name in CHAIN_FAMILIES:
        del shape["max_position_embeddings"]  # ALiBi needs none, and mpt calls it something else
    shape |= CHAIN_FAMILIES[name] if name in CHAIN_FAMILIES else FAMILIES[name]
    config = AutoConfig.for_model(name.split()[0], **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    # Some families initialise with a fixed small std; every matrix gets the same one here.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std, generator=generator)
    return model
