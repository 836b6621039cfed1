"""What Falcon needs to know of a target, and what a target cannot do. Touches the target, never changes it.

Masks, positions and cache of a running generation are in ``target_session.py``; those two files are the only ones
that look inside a target.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from .configuration_falcon_drafter import FalconDrafterConfig

# Decoder-only families whose attention takes a 4D mask and explicit positions, so that a tree's logits are those of
# its paths. Each is run by tests/runtime/test_families.py; others are refused until they are.
TREE_FAMILIES = frozenset(
    [
        "cohere",
        "cohere2",
        "deepseek_v3",
        "falcon",
        "gemma2",
        "gemma3_text",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    ]
)
TREE_ATTENTIONS = ("eager", "sdpa")
TREE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

_FINGERPRINT_SAMPLES = 32
# Far above rounding (bfloat16: 0.002) and fine-tuning, far below another model's weights (about 1.4).
FINGERPRINT_TOLERANCE = 0.1


class TargetMismatchWarning(UserWarning):
    """The drafter was trained for another target: the text is still right, but little of it will be drafted.

    ``warnings.simplefilter("error", falcon_hf.TargetMismatchWarning)`` makes it an error.
    """


def fingerprint(target: PreTrainedModel) -> list[float] | None:
    """32 input-embedding weights at fixed places, rounded to 4 digits: what tells one target from another.

    The same model in another dtype or quantisation stays close, a fine-tune nearly so (``fingerprint_distance``).
    None where the weights are not at hand (meta device, offloaded).
    """
    weight = target.get_input_embeddings().weight
    return None if weight.device.type == "meta" else fingerprint_of(weight)


def fingerprint_of(embedding: torch.Tensor) -> list[float]:
    """[`fingerprint`] of an input embedding's weight ``[V, H]``."""
    rows = torch.linspace(0, embedding.shape[0] - 1, _FINGERPRINT_SAMPLES).long()
    columns = (torch.arange(_FINGERPRINT_SAMPLES) * 37) % embedding.shape[1]
    samples = embedding.detach()[rows.to(embedding.device), columns.to(embedding.device)].float().tolist()
    return [float(f"{sample:.4g}") for sample in samples]


def fingerprint_distance(one: list[float], other: list[float]) -> float:
    """Relative distance |a - b| / max(|a|, |b|) of two fingerprints; infinite where the lengths differ."""
    if len(one) != len(other):
        return float("inf")
    a, b = torch.tensor(one), torch.tensor(other)
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()).clamp_min(1e-12))


def check_target(target: PreTrainedModel, config: FalconDrafterConfig) -> None:
    """Refuse, with the remedy, a target that this drafter or tree verification cannot serve. Generates nothing.

    Raises:
        ValueError: encoder-decoder or stateful target, unknown family, other vocabulary or hidden size, attention
            implementation without 4D masks, prompt-learning adapter.

    Warns:
        TargetMismatchWarning: if the fingerprint says that the drafter was trained for another model.
    """
    text = target.config.get_text_config()
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; Falcon needs a decoder-only target (AutoModelForCausalLM).")
    if getattr(target, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps a recurrent state that cannot be rolled back; generate without assistant_model."
        )
    if text.model_type not in TREE_FAMILIES or getattr(text, "alibi", False):
        raise ValueError(
            f"Falcon has not been verified on the family {text.model_type!r}, so it will not draft for it; generate "
            f"without assistant_model. Verified: {', '.join(sorted(TREE_FAMILIES))}."
        )
    for layer_type in set(getattr(text, "layer_types", None) or ()) - TREE_LAYERS:
        raise ValueError(
            f"{name} has {layer_type!r} layers, whose state is sequential; generate without assistant_model."
        )
    if config.vocab_size != text.vocab_size:
        raise ValueError(
            f"The drafter was made for a vocabulary of {config.vocab_size} tokens, {name} has {text.vocab_size}. "
            f"Use a drafter trained for this target ({_trained_for(config)})."
        )
    if config.hidden_size != text.hidden_size:
        raise ValueError(
            f"The drafter reads hidden states of width {config.hidden_size}, {name} has {text.hidden_size}. "
            f"Use a drafter trained for this target ({_trained_for(config)})."
        )
    attention = target.config._attn_implementation
    if attention not in TREE_ATTENTIONS:
        raise ValueError(
            f"Attention implementation {attention!r} takes no tree mask; call "
            f"model.set_attn_implementation('sdpa') first (or 'eager')."
        )
    prepare = getattr(target.prepare_inputs_for_generation, "__self__", target)
    if prepare is not target:
        raise ValueError(
            "The target has a prompt-learning adapter, whose virtual tokens a tree cannot carry; merge or disable it, "
            "or generate without assistant_model. LoRA adapters work."
        )
    _check_fingerprint(target, config)


def _trained_for(config: FalconDrafterConfig) -> str:
    return f"this one: {config.target_name_or_path or 'unknown'}"


def _check_fingerprint(target: PreTrainedModel, config: FalconDrafterConfig) -> None:
    if config.target_fingerprint is None:
        return
    own = fingerprint(target)
    if own is not None and fingerprint_distance(own, config.target_fingerprint) > FINGERPRINT_TOLERANCE:
        warnings.warn(
            f"The drafter was trained for another target ({_trained_for(config)}), not for "
            f"{target.config._name_or_path or type(target).__name__!r}. The text will be right, but hardly faster.",
            TargetMismatchWarning,
            stacklevel=2,
        )


def input_embeddings(target: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """``[B, S]`` tokens -> ``[B, S, H]``, through the target's module: some scale inside it (gemma)."""
    embedding: Any = target.get_input_embeddings()
    return embedding(tokens.to(embedding.weight.device))


def head_weight(target: PreTrainedModel) -> torch.Tensor:
    """The LM head's weight ``[V, H]``, as a plain tensor."""
    return target.get_output_embeddings().weight.detach()
