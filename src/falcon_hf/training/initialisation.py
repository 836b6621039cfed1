"""Where a drafter starts: small random layers around a fusion that hands the newest true feature on.

Measured on SmolLM2-135M: started so, the drafter's first estimates are already features of the right size, and its
accuracy runs ahead by about 2 points at 50 steps, 1 at 175 (one run each).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..runtime.modeling_falcon_drafter import FalconDrafter
from .errors import TrainingError

_IDENTITY = 0.7
_EMBEDDING_SHARE = 0.34  # of a feature's standard deviation, what the embedding half adds at the start
_COMPARED_TOKENS = 8  # within the windows of layers that have one
_COMPARED_SIZE = 0.02  # small beside what a layer adds to it, which is what is compared
_COMPARED_ERROR = 0.1


def typical_sizes(features: Iterable[torch.Tensor], embeddings: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Standard deviations of features ``[n, H]`` and of the embeddings of the same text ``[n, H]``."""
    sizes = [
        torch.cat([part.float().flatten() for part in parts]).std() for parts in (list(features), list(embeddings))
    ]
    return float(sizes[0]), float(sizes[1])


def embedding_scale(feature_size: float, embedding_size: float) -> float:
    """What embeddings should be multiplied with to be of a feature's size (``config.embedding_scale``)."""
    return float(f"{0.7 * feature_size / max(embedding_size, 1e-12):.2g}")


@torch.no_grad()
def near_identity_start(drafter: FalconDrafter, feature_size: float, embedding_size: float) -> None:
    """Let a linear fusion start as 0.7 of the feature plus a little of the embedding, and the layer at half size.

    An LSTM cannot be an identity: only the layer is changed. With ``feature_layers`` their matrix starts as the last.

    Args:
        drafter: freshly made.
        feature_size: standard deviation of the target's features.
        embedding_size: of its embeddings, before ``config.embedding_scale``.
    """
    size = drafter.config.hidden_size
    if drafter.feature_fusion is not None:
        weight = drafter.feature_fusion.weight
        weight[:, :-size].mul_(0.1)
        weight[:, -size:] = torch.eye(size, dtype=weight.dtype, device=weight.device)
    if drafter.fusion.kind == "linear":
        weight = drafter.fusion.linear.weight
        weight[:, :size].mul_(0.25).add_(torch.eye(size, dtype=weight.dtype, device=weight.device), alpha=_IDENTITY)
        width = embedding_size * drafter.config.embedding_scale * size**0.5
        nn.init.normal_(weight[:, size:], std=_EMBEDDING_SHARE * feature_size / max(width, 1e-12))
    layers: Any = drafter.layers
    for layer in layers:
        if layer.attention is not None:
            layer.attention.o_proj.weight.mul_(0.5)
        layer.mlp.down_proj.weight.mul_(0.5)


# Ours and theirs, in the families whose layers are built as llama's.
_TARGET_NAMES = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


@torch.no_grad()
def start_from_target_layers(drafter: FalconDrafter, target: PreTrainedModel) -> None:
    """Copy the target's last layers into the drafter's, the last into the last.

    Not the default: on SmolLM2-135M it diverged at the learning rate that suits random layers (loss 70 to 170 behind
    100 steps, one run, without [`near_identity_start`]). To be called before that, which halves their outputs.

    Raises:
        TrainingError: if the target's layers have other parts or shapes than the drafter's, or compute something else.
    """
    theirs: Any = getattr(target.base_model, "layers", None)
    ours: Any = drafter.layers
    if theirs is None or len(theirs) < len(ours):
        raise TrainingError(f"{type(target).__name__} has no layers to start the drafter's from; start them at random.")
    last = list(theirs)[-len(ours) :]
    for layer, source in zip(ours, last, strict=True):
        modules, sources = dict(layer.named_modules()), dict(source.named_modules())
        for name, other in _TARGET_NAMES.items():
            mine: Any = getattr(modules.get(name), "weight", None)
            weight: Any = getattr(sources.get(other), "weight", None)
            if mine is None and name == "input_norm":
                continue  # a drafter without it
            if mine is None or weight is None or mine.shape != weight.shape:
                raise TrainingError(
                    f"The drafter's {name} cannot start from the target's {other}: another shape or no such part. Keep "
                    "the target's layer shape in the drafter's config, or start its layers at random."
                )
            mine.copy_(weight)
            bias = getattr(sources[other], "bias", None)
            if bias is not None and getattr(modules[name], "bias", None) is None:
                raise TrainingError(
                    f"The target's {other} has a bias and the drafter's {name} none: set attention_bias in the "
                    "drafter's config, or start its layers at random."
                )
            if bias is not None:
                modules[name].bias.copy_(bias)
            _check_norm(name, modules[name], sources[other])
        left = {part for part, _ in source.named_parameters()} - {
            f"{other}.{kind}" for other in _TARGET_NAMES.values() for kind in ("weight", "bias")
        }
        if left:
            raise TrainingError(
                f"{type(target).__name__}'s layers have {sorted(left)[0]}, which the drafter's have not: start them at "
                "random."
            )
    _check_outputs(drafter, target, last)


def _check_outputs(drafter: FalconDrafter, target: PreTrainedModel, sources: list[Any]) -> None:
    """See that the drafter's layers do what the target's do: the same weights serve other attention, scales or heads.

    Raises:
        TrainingError: if they do something else.
    """
    size, generator = drafter.config.hidden_size, torch.Generator().manual_seed(0)
    hidden = _COMPARED_SIZE * torch.randn(1, _COMPARED_TOKENS, size, generator=generator)
    outputs = _source_outputs(target, sources, hidden)
    hidden = hidden.to(target.dtype)
    rotary = copy.deepcopy(drafter.rotary).to("cpu")(hidden, torch.arange(_COMPARED_TOKENS)[None])
    mask = torch.ones(1, 1, _COMPARED_TOKENS, _COMPARED_TOKENS, dtype=torch.bool).tril()
    ours: Any = drafter.layers
    for index, (layer, source, theirs) in enumerate(zip(ours, sources, outputs, strict=True)):
        own = copy.deepcopy(layer).to("cpu", target.dtype)
        if not drafter.config.input_norm:  # which it leaves out on purpose
            own.input_norm = copy.deepcopy(source.input_layernorm).to("cpu")
        mine = own(hidden, queries=_COMPARED_TOKENS, rotary=rotary, mask=mask, layer=index, cache=None)
        mine, added = mine.float() - hidden.float(), theirs.float() - hidden.float()
        if not float((mine - added).norm()) <= _COMPARED_ERROR * float(added.norm()):
            raise TrainingError(
                f"{type(target).__name__}'s layers compute something else than the drafter's with these weights (other "
                "heads, positions or scales): keep the target's heads in the drafter's config, or start its layers at "
                "random."
            )


def _source_outputs(target: PreTrainedModel, sources: list[Any], hidden: torch.Tensor) -> list[torch.Tensor]:
    """What layers of the target make of ``[1, S, H]``, on the CPU: in a forward of its own, which knows their masks."""
    found: list[torch.Tensor] = []

    def give(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        before = args[0] if args else kwargs["hidden_states"]
        given = hidden.to(before.device, before.dtype)
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append((output if isinstance(output, torch.Tensor) else output[0]).cpu())

    ids = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=target.device)
    with contextlib.ExitStack() as hooks:
        for source in sources:
            hooks.callback(source.register_forward_pre_hook(give, with_kwargs=True).remove)
            hooks.callback(source.register_forward_hook(keep).remove)
        target.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return found


def _check_norm(name: str, mine: Any, source: Any) -> None:
    """See that a norm with the target's weight does what the target's does: some families add 1 to the weight.

    Raises:
        TrainingError: if it does something else.
    """
    if name.endswith("norm"):
        sample = torch.linspace(-2, 2, mine.weight.shape[0], dtype=mine.weight.dtype, device=mine.weight.device)
        theirs = source(sample[None].to(source.weight.device, source.weight.dtype)).to(sample)
        if not torch.allclose(mine(sample[None]), theirs, rtol=0.05, atol=0.05):
            raise TrainingError(f"The target's norm is of another kind than the drafter's {name}: start at random.")
