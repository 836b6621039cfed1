"""Random checkpoints in the formats of upstream Falcon and EAGLE-1, and a reference of the published equations.

The reference is written from the papers (Falcon, arXiv 2412.12639, section 3; EAGLE, arXiv 2401.15077, section 3) and
from LSTM, RoPE, RMS norm and SwiGLU as their papers define them: scalar loops over positions, no module of torch.nn.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

VOCAB, H, HEADS, GROUPS, INNER = 24, 64, 4, 2, 96

Weights = dict[str, torch.Tensor]


def settings(k: int, **changes: Any) -> dict[str, Any]:
    """A ``config.json`` as upstream ships it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": H,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "num_hidden_layers": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_scaling": None, "k_mask": k,
    } | changes  # fmt: skip


def weights(
    fusion: str, seed: int = 0, attention_bias: bool = False, fusion_bias: bool = True, trained: bool = True
) -> Weights:
    """``fusion`` is ``"lstm"`` or ``"fc"``; untrained recurrent matrices are as torch draws them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * H**-0.5

    found = {"embed_tokens.weight": normal(VOCAB, H)}
    for name, rows, columns in (
        ("self_attn.q_proj", H, H), ("self_attn.k_proj", H * GROUPS // HEADS, H),
        ("self_attn.v_proj", H * GROUPS // HEADS, H), ("self_attn.o_proj", H, H),
        ("mlp.gate_proj", INNER, H), ("mlp.up_proj", INNER, H), ("mlp.down_proj", H, INNER),
    ):  # fmt: skip
        found[f"layers.0.{name}.weight"] = normal(rows, columns)
        if attention_bias and name[-6:] in ("q_proj", "k_proj", "v_proj") and "self_attn" in name:
            found[f"layers.0.{name}.bias"] = normal(1, rows)[0]
    found["layers.0.post_attention_layernorm.weight"] = 1 + normal(1, H)[0]
    if fusion == "fc":
        found["fc.weight"] = normal(H, 2 * H)
        if fusion_bias:
            found["fc.bias"] = normal(1, H)[0]
        return found
    for layer, width in enumerate((2 * H, H)):
        found[f"lstm.weight_ih_l{layer}"] = 2 * normal(4 * H, width)
        found[f"lstm.weight_hh_l{layer}"] = 2 * normal(4 * H, H) if trained else uniform(4 * H, H)
        if fusion_bias:
            found[f"lstm.bias_ih_l{layer}"] = normal(1, 4 * H)[0] * 4
            found[f"lstm.bias_hh_l{layer}"] = normal(1, 4 * H)[0] * 4
    return found


def write(folder: Path, config: dict[str, Any], state: Weights, name: str = "pytorch_model.bin") -> Path:
    """The checkpoint as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / name)
    return folder


def reference(
    state: Weights, features: torch.Tensor, tokens: torch.Tensor, k: int, recurrent: bool, base: float = 10000.0,
    stretch: float = 1.0, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    """Features ``[S, H]`` f_i and tokens ``[S]`` t_{i+1} -> ``[S, H]``, the estimates of f_{i+k}, in double."""
    w = {name: weight.double() for name, weight in state.items()}

    def affine(name: str, x: torch.Tensor) -> torch.Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    pairs = [torch.cat((w["embed_tokens.weight"][t], f.double())) for f, t in zip(features, tokens, strict=True)]
    if "fc.weight" in w:
        fused = [affine("fc", pair) for pair in pairs]
    else:
        layers = sum(name.startswith("lstm.weight_ih") for name in w)
        zero = [(torch.zeros(H).double(), torch.zeros(H).double()) for _ in range(layers)]
        fused, memory = [], list(zero)
        for x in pairs:
            if not recurrent:
                memory = list(zero)
            for layer in range(layers):
                h, c = memory[layer]
                gates = w[f"lstm.weight_ih_l{layer}"] @ x + w[f"lstm.weight_hh_l{layer}"] @ h
                gates = gates + w.get(f"lstm.bias_ih_l{layer}", 0) + w.get(f"lstm.bias_hh_l{layer}", 0)
                i, f, g, o = gates.split(H)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                x = o.sigmoid() * c.tanh()
                memory[layer] = (x, c)
            fused.append(x)

    size = H // HEADS

    def rotated(vector: torch.Tensor, position: int) -> torch.Tensor:
        heads = vector.view(-1, size)
        halves = torch.complex(heads[:, : size // 2], heads[:, size // 2 :])
        angles = position / stretch * base ** (-torch.arange(0, size, 2).double() / size)
        turned = halves * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=1)

    queries = [rotated(affine("layers.0.self_attn.q_proj", x), i) for i, x in enumerate(fused)]
    keys = [rotated(affine("layers.0.self_attn.k_proj", x), i) for i, x in enumerate(fused)]
    values = [affine("layers.0.self_attn.v_proj", x).view(-1, size) for x in fused]
    out = []
    for i, x in enumerate(fused):
        seen = [j for j in range(len(fused)) if j // k <= i // k]  # the relaxed causal mask
        mixed = []
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            scores = torch.stack([queries[i][head] @ keys[j][group] / math.sqrt(size) for j in seen])
            shares = (scores - scores.max()).exp()
            shares = shares / shares.sum()
            mixed.append(sum(share * values[j][group] for share, j in zip(shares, seen, strict=True)))
        y = x + affine("layers.0.self_attn.o_proj", torch.cat(mixed))
        n = y / (y.square().mean() + eps).sqrt() * w["layers.0.post_attention_layernorm.weight"]
        gate, up = affine("layers.0.mlp.gate_proj", n), affine("layers.0.mlp.up_proj", n)
        out.append(y + affine("layers.0.mlp.down_proj", gate * gate.sigmoid() * up))
    return torch.stack(out)
