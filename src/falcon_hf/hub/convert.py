"""Checkpoints of the Falcon authors and of EAGLE-1, as our drafters.

Both are one decoder layer without a norm before its attention, over a fusion of the pair in the order (embedding,
feature), where ours is (feature, embedding): the two halves of the fusion's input columns change places.

    Falcon (``Bestpay-inc/Falcon-*``): ``lstm.*``, two LSTM layers; k is ``k_mask`` in its config.
    EAGLE-1 (``yuhuili/EAGLE-*``):     ``fc``, one matrix; k = 1.

``embed_tokens`` is the target's embedding: it gives the fingerprint, and is left out. Drafts differ from the authors'
own program in one point: here k - 1 start pairs of zeros come before each sequence (see ``modeling_falcon_drafter``).
``tests/hub/test_convert.py`` holds a converted drafter's features against the published equations.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target import fingerprint_of
from ..runtime.target_name import target_name as noted_name
from .errors import HubError
from .recurrence import judge_recurrence

logger = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_CHECKPOINT_STARTS = (b"PK", b"\x80")  # a zip of torch's, or the pickle of earlier ones
# Their names on the left; "{i}" is the layer.
_LAYER_NAMES = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.o_proj": "attention.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "post_attention_layernorm": "mlp_norm",
}
_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def convert(
    source: str | Path,
    target_name: str | None = None,
    fusion: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> FalconDrafter:
    """Read a checkpoint of upstream Falcon or EAGLE-1 as a drafter, on the CPU, in evaluation mode.

    Args:
        source: a folder or a Hub repo with ``config.json`` and ``pytorch_model.bin`` or ``model.safetensors``. A
            pickle is read with ``weights_only=True``: tensors, no code.
        target_name: the model it was trained for, as the drafter's config shall name it.
        fusion: ``"lstm"`` or ``"lstm_stateless"`` for a Falcon checkpoint; judged from it by default, and logged.
        revision: of the Hub repo.
        dtype: of the weights; as stored by default.

    Returns:
        The drafter; ``save_pretrained`` it.

    Raises:
        HubError: if the checkpoint is of another kind, incomplete or damaged, or the Hub does not give it; the message
            says which and why.
    """
    settings = _read_config(source, revision)
    weights = _read_weights(source, revision)
    config = convert_config(settings, weights, target_name, fusion)
    drafter = FalconDrafter(config)
    _load(drafter, convert_weights(weights, config))
    stored = next(weight.dtype for name, weight in weights.items() if name.startswith("layers.0."))
    return drafter.to(dtype or stored).eval()


def convert_config(
    settings: dict[str, Any], weights: Weights, target_name: str | None = None, fusion: str | None = None
) -> FalconDrafterConfig:
    """Our config from their ``config.json`` and the names of their weights.

    Raises:
        HubError: if it is no checkpoint of Falcon or EAGLE-1, or needs what a drafter has not.
    """
    kind = _kind(weights)
    if settings.get("num_hidden_layers", 1) != 1:
        raise HubError(
            f"The checkpoint has {settings['num_hidden_layers']} decoder layers; only one can be converted (from the "
            "second on, theirs have a norm where the first has none)."
        )
    fields: dict[str, Any] = {name: settings[name] for name in _SHAPE_FIELDS if settings.get(name) is not None}
    if kind == "falcon":
        block_size = settings.get("k_mask")
        if not isinstance(block_size, int) or not 1 <= block_size <= 8:
            raise HubError(
                f"The config's k_mask is {block_size!r}: add the block size that the checkpoint was trained with (2, 3 "
                "or 4 in the paper) to its config.json."
            )
        fields |= {"block_size": block_size, "fusion": _choose_fusion(settings, weights, fusion)}
        fields["fusion_layers"] = sum(name.startswith("lstm.weight_ih_l") for name in weights)
    elif fusion not in (None, "linear"):
        raise HubError(f"An EAGLE-1 checkpoint has a linear fusion, not {fusion!r}: leave the fusion out.")
    else:
        fields |= {"block_size": 1, "fusion": "linear", "fusion_bias": "fc.bias" in weights}
    embedding = weights.get("embed_tokens.weight")
    if embedding is not None:
        fields["vocab_size"] = embedding.shape[0]  # some targets pad their table beyond the config's count
        fields["target_fingerprint"] = fingerprint_of(embedding)
    try:
        return FalconDrafterConfig(
            **fields,
            input_norm=False,
            attention_bias="layers.0.self_attn.q_proj.bias" in weights,
            rope_parameters=_rope(settings),
            target_name_or_path=noted_name(target_name),
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise HubError(f"The checkpoint's config.json does not describe a drafter: {error}") from error


def convert_weights(weights: Weights, config: FalconDrafterConfig) -> Weights:
    """Their weights under our names, with the fusion's columns in our order (feature first)."""
    converted: Weights = {}
    for name, weight in weights.items():
        if name == "embed_tokens.weight" or name.endswith("rotary_emb.inv_freq"):
            continue
        if name.startswith("lstm."):
            new = f"fusion.{name}"
            converted[new] = _swap_halves(weight) if name == "lstm.weight_ih_l0" else weight
        elif name.startswith("fc."):
            converted[f"fusion.linear.{name[3:]}"] = _swap_halves(weight) if name == "fc.weight" else weight
        else:
            converted[_layer_name(name)] = weight
    if config.fusion != "linear":
        for layer in range(config.fusion_layers):  # an LSTM without biases is one whose biases are zero
            for bias in (f"fusion.lstm.bias_ih_l{layer}", f"fusion.lstm.bias_hh_l{layer}"):
                converted.setdefault(bias, torch.zeros(4 * config.hidden_size))
    return converted


def _kind(weights: Weights) -> str:
    if "lstm.weight_ih_l0" in weights:
        return "falcon"
    if any(name.startswith(("midlayer.", "d2t", "t2d")) for name in weights):
        raise HubError(
            "This is an EAGLE-3 checkpoint: it reads hidden states of several layers, which does not convert. Falcon "
            "and EAGLE-1 checkpoints do; for a drafter like it, train one (falcon-hf train)."
        )
    if "fc.weight" in weights:
        return "eagle"
    raise HubError(
        "This is no checkpoint of Falcon (it would have lstm.weight_ih_l0) or EAGLE-1 (fc.weight); it has "
        f"{', '.join(sorted(weights)[:3]) or 'no weights'}."
    )


def _choose_fusion(settings: dict[str, Any], weights: Weights, asked: str | None) -> str:
    """``"lstm"`` or ``"lstm_stateless"``, with the reason in the log."""
    if asked is not None:
        if asked not in ("lstm", "lstm_stateless"):
            raise HubError(f"A Falcon checkpoint has an LSTM fusion: ask for lstm or lstm_stateless, not {asked!r}.")
        fusion, reason = asked, "you asked for it"
    elif isinstance(settings.get("batch_first"), bool):
        fusion = "lstm" if settings["batch_first"] else "lstm_stateless"
        reason = f"the config says batch_first={settings['batch_first']}"
    else:
        fusion, reason = judge_recurrence(weights)
    logger.warning("Fusion: %s, because %s.", fusion, reason)
    return fusion


def _swap_halves(weight: torch.Tensor) -> torch.Tensor:
    """``[..., 2H]``: columns (embedding, feature) -> (feature, embedding)."""
    half = weight.shape[-1] // 2
    return torch.cat((weight[..., half:], weight[..., :half]), dim=-1)


def _layer_name(name: str) -> str:
    for theirs, ours in _LAYER_NAMES.items():
        prefix = f"layers.0.{theirs}."
        if name.startswith(prefix):
            return f"layers.0.{ours}.{name.removeprefix(prefix)}"
    raise HubError(f"The checkpoint has a weight that a drafter has no place for: {name}.")


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters. Theirs ignore ``rope_theta`` where there is a scaling, so it is ignored here too."""
    scaling = settings.get("rope_scaling")
    if scaling is None:
        return {"rope_type": "default", "rope_theta": float(settings.get("rope_theta") or 10000.0)}
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
    if kind not in ("linear", "dynamic") or "factor" not in scaling:
        raise HubError(f"The checkpoint's rope_scaling {scaling!r} cannot be converted: linear and dynamic can.")
    return {"rope_type": kind, "factor": float(scaling["factor"]), "rope_theta": 10000.0}


def _load(drafter: FalconDrafter, weights: Weights) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise HubError(f"The checkpoint is damaged: {name} has values that are not finite.")
    try:
        drafter.load_state_dict({name: weight.float() for name, weight in weights.items()})
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise HubError(f"The checkpoint's weights do not fit its config.json: {details[:300]}") from error


def _read_config(source: str | Path, revision: str | None) -> dict[str, Any]:
    path = _find(source, ["config.json"], revision)
    if path is None:
        raise HubError(f"{str(source)!r} has no config.json: copy the checkpoint's beside its weights.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{path} is not JSON: {error}; fetch it again.") from error
    if not isinstance(settings, dict):
        raise HubError(f"{path} is not a JSON object; fetch it again.")
    return settings


def _read_weights(source: str | Path, revision: str | None) -> Weights:
    path = _find(source, WEIGHT_FILES, revision)
    if path is None:
        raise HubError(f"{str(source)!r} has neither {' nor '.join(WEIGHT_FILES)}: fetch the checkpoint's weights.")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with path.open("rb") as file:
                if not file.read(2).startswith(_CHECKPOINT_STARTS):
                    raise HubError(
                        f"{path.name} is no checkpoint (a Git LFS pointer, or a web page?): fetch the weights."
                    )
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HubError(
            f"{path.name} is refused: it holds more than tensors, and unpickling that could run code. Nothing of it "
            "was run. Convert it to safetensors with tools that you trust, or take another copy."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise HubError(f"{path.name} cannot be read ({error}): it is truncated or damaged; fetch it again.") from error
    if not isinstance(loaded, dict) or not all(isinstance(each, torch.Tensor) for each in loaded.values()):
        raise HubError(f"{path.name} is no dictionary of tensors.")
    return {str(name): weight for name, weight in loaded.items()}


def _find(source: str | Path, names: Sequence[str], revision: str | None) -> Path | None:
    """The first of these files that is in the folder, or downloaded; None if none is there."""
    if Path(source).is_dir():
        return next((path for name in names if (path := Path(source) / name).is_file()), None)
    unreachable = None
    for name in names:
        try:
            return Path(hf_hub_download(str(source), name, revision=revision))
        except LocalEntryNotFoundError as error:  # an EntryNotFoundError, too; the next name may be in the cache
            unreachable = error
        except EntryNotFoundError:
            continue
        except RevisionNotFoundError as error:
            raise HubError(f"The Hub's repo {str(source)!r} has no revision {revision!r}.") from error
        except HFValidationError as error:
            raise HubError(f"{str(source)!r} is neither a folder nor a Hub repo's name (organisation/name).") from error
        except (HTTPError, OSError) as error:
            raise HubError(
                f"{str(source)!r} is no folder, and the Hub has no such repo or cannot be reached."
            ) from error
    if unreachable is not None:
        raise HubError(
            f"{str(source)!r} is no folder, and the Hub cannot be reached: try again where it can be, or name the "
            "checkpoint's folder."
        ) from unreachable
    return None
