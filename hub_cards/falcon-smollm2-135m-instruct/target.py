"""What Falcon needs to know of a target, and what a target cannot do. Touches the target, never changes it.

Masks, positions and cache of a running generation are in ``target_session.py``; ``target*.py``,
``returned_attentions.py``, ``few_rows.py`` and ``shared_heads.py`` are the only files that look inside a target.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .configuration_falcon_drafter import FalconDrafterConfig
from .target_attention import check_attention


@dataclass(frozen=True)
class Support:
    """What a family of targets can verify.

    Attributes:
        drafts: ``"tree"``; ``"chain"``, a single path, in an ordinary causal forward; or ``""``, nothing.
        why: why not a tree, or nothing at all.
        why_one_row: why not several rows at once, empty where they can be.
    """

    drafts: str
    why: str = ""
    why_one_row: str = ""


_TREE = Support("tree")
_ALIBI = "its ALiBi biases go by the order of the cached tokens, so that siblings would get different ones"

_CONVOLUTION = "its convolutions run along the order of the tokens, through siblings too"

# What each decoder-only family needs, by model_type (see [`family`]). "tree": its attention takes a 4D mask and
# explicit positions, so that a tree's logits are those of its paths. Each entry is run by tests/runtime/
# test_families.py, test_chains.py or test_conformance.py; families that are not here are refused until they are.
FAMILIES: dict[str, Support] = {
    "bloom": Support("chain", _ALIBI),
    "cohere": _TREE,
    "cohere2": _TREE,
    "deepseek_v3": _TREE,
    "falcon": _TREE,
    "falcon (ALiBi)": Support("chain", _ALIBI),
    "gemma2": _TREE,
    "gemma3_text": _TREE,
    "glm4": _TREE,
    "glm4_moe": _TREE,
    "gpt2": _TREE,
    "gpt_bigcode": _TREE,
    "gpt_neox": _TREE,
    "gpt_oss": _TREE,
    "gptj": _TREE,
    "granite": _TREE,
    "lfm2": Support("chain", _CONVOLUTION, "its convolutions count the slots that other rows' drafts leave empty"),
    "llama": _TREE,
    "llama4_text": _TREE,
    "mamba": Support("", "it keeps a recurrent state that cannot be rolled back"),
    "mistral": _TREE,
    "mixtral": _TREE,
    "mpt": Support("chain", _ALIBI, "its ALiBi biases count the slots that other rows' drafts leave empty"),
    "olmo2": _TREE,
    "olmo3": _TREE,
    "opt": _TREE,
    "phi": _TREE,
    "phi3": _TREE,
    "qwen2": _TREE,
    "qwen2_moe": _TREE,
    "qwen3": _TREE,
    "qwen3_moe": _TREE,
    "qwen3_next": Support("", "its linear attention keeps a recurrent state that cannot be rolled back"),
    "smollm3": _TREE,
    "stablelm": _TREE,
    "starcoder2": _TREE,
}
# Models with an image encoder around a text model of these families that hand masks and positions on to it as they are,
# by tests/runtime/test_composite_targets.py. Others may count positions from elsewhere, or make masks of their own.
COMPOSITES = frozenset({"gemma3"})
TREE_FAMILIES = frozenset(name for name, support in FAMILIES.items() if support.drafts == "tree")
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
        ValueError: encoder-decoder or stateful target, unknown family or composite, other vocabulary or hidden size,
            attention implementation without 4D masks, prompt-learning adapter, weights in pieces.

    Warns:
        TargetMismatchWarning: if the fingerprint says that the drafter was trained for another model.
    """
    text = target.config.get_text_config()
    name = type(target).__name__
    if target.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; Falcon needs a decoder-only target (AutoModelForCausalLM).")
    support = family(target)
    if support is None:
        known = ", ".join(sorted(name for name, entry in FAMILIES.items() if entry.drafts))
        raise ValueError(
            f"Falcon has not been verified on the family {text.model_type!r}, so it will not draft for it; generate "
            f"without assistant_model. Verified: {known}."
        )
    if text is not target.config and target.config.model_type not in COMPOSITES:
        raise ValueError(
            f"{name} holds its text model in another one, {target.config.model_type!r}, on which Falcon has not been "
            "verified; generate without assistant_model, or load the text model alone."
        )
    if not support.drafts or getattr(target, "_is_stateful", False):
        why = support.why or "it keeps a recurrent state that cannot be rolled back"
        raise ValueError(f"Falcon cannot draft for {name}: {why}; generate without assistant_model.")
    if support.drafts == "tree":
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
    layers = config.feature_layers
    if layers is not None and layers[-1] != text.num_hidden_layers:
        raise ValueError(
            f"The drafter reads the hidden states {layers}, of which the last must be {name}'s last, number "
            f"{text.num_hidden_layers}. Use a drafter trained for this target ({_trained_for(config)})."
        )
    if support.drafts == "tree":
        check_attention(target)
    prepare = getattr(target.prepare_inputs_for_generation, "__self__", target)
    if prepare is not target:
        raise ValueError(
            "The target has a prompt-learning adapter, whose virtual tokens a tree cannot carry; merge or disable it, "
            "or generate without assistant_model. LoRA adapters work."
        )
    _check_whole(target)
    _check_fingerprint(target, config)


def _check_whole(target: PreTrainedModel) -> None:
    """Refuse a target whose embeddings or head are in pieces on several devices: drafting reads them as they are."""
    for module in (target.get_input_embeddings(), target.get_output_embeddings()):
        weight = module.weight
        # A DTensor's, and DeepSpeed's at ZeRO stage 3.
        pieces = hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")
        if pieces or weight.dim() != 2:  # FSDP's first version has flat ones
            raise ValueError(
                "The target's weights are in pieces on several devices (ZeRO-3, FSDP, tensor parallelism), of which "
                "Falcon cannot draft: load it whole, or layer by layer with device_map='auto', or generate without "
                "assistant_model."
            )


def family(target: PreTrainedModel) -> Support | None:
    """The target's entry in [`FAMILIES`], None if it has none."""
    text = target.config.get_text_config()
    alibi = " (ALiBi)" if getattr(text, "alibi", False) else ""
    return FAMILIES.get(text.model_type + alibi)


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
    device = embedding.weight.device
    # An offloaded module's weights are elsewhere until it is called, and it moves its inputs itself.
    return embedding(tokens if device.type == "meta" else tokens.to(device))


def head_weight(target: PreTrainedModel) -> torch.Tensor:
    """The LM head's weight ``[V, H]``, as a plain tensor: loaded if offloaded, dequantised if quantised."""
    head = target.get_output_embeddings()
    with _loaded(head):
        weight = head.weight.detach()
    return weight.dequantize() if type(weight) is not torch.Tensor and hasattr(weight, "dequantize") else weight


@contextlib.contextmanager
def _loaded(module: Any) -> Iterator[None]:
    """An offloaded module (accelerate) with its weights, as during its forward."""
    hook = getattr(module, "_hf_hook", None) if module.weight.device.type == "meta" else None
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def last_device(target: PreTrainedModel) -> torch.device | None:
    """Where a target that is spread over devices (``device_map``) computes its last hidden states, else None.

    None too where that is no device to put a drafter on: weights on disk, and the CPU they are loaded to.
    """
    places = getattr(target, "hf_device_map", None) or {}
    if len(set(places.values())) < 2:
        return None
    place = list(places.values())[-1]  # modules in their order
    if place in ("disk", "cpu"):
        return None
    if isinstance(place, int):  # of whatever accelerator there is
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cuda" if accelerator is None else accelerator.type, place)
    return torch.device(place)
