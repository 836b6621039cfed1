"""Cost curves of a target's shape on a device that is at hand, on random weights: nothing is downloaded.

What a forward costs does not depend on the weights, so a randomly made target and drafter of the right shape have the
real ones' costs: verification of a tree, drafting, and a token of plain decoding. They stand beside the roofline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.modeling_falcon_drafter import FalconDrafter
from .cost_measurement import DRAFT_WIDTHS, plain_decoding, time_drafts, time_verification
from .errors import TuningError
from .rank_measurement import greedy_text
from .roofline import TargetShape

FORMAT = "falcon-hf-cost-curves/1"
NODES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_TOKENS = 32


def random_target(shape: TargetShape, device: torch.device, dtype: torch.dtype, positions: int) -> LlamaForCausalLM:
    """A llama of this shape with random weights, made on the device itself; it ends no text."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            target = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return target.to(device, dtype).eval()


@torch.no_grad()
def measure_curves(
    shape: TargetShape,
    block_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    contexts: Sequence[int],
    passes: int,
    repeats: int,
    nodes: Sequence[int] = NODES,
) -> dict[str, Any]:
    """Time everything a round consists of; JSON values.

    Random weights are drawn from the global generator, which is put back.

    Raises:
        TuningError: on a context of no tokens; as the measurements.
    """
    if min(contexts) < 1:
        raise TuningError(f"A context has at least one token, got {min(contexts)}.")
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(0)
        target = random_target(shape, device, dtype, max(contexts) + max(nodes) + _TOKENS + 64)
        drafters = {
            k: FalconDrafter(FalconDrafterConfig.from_target(target, block_size=k)).to(device, dtype).eval()
            for k in block_sizes
        }
        prompt = torch.randint(1, shape.vocab, (1, min(contexts)))
    verify = time_verification(target, prompt, nodes, contexts, repeats)
    text = greedy_text(target, prompt, _TOKENS)
    drafts = {}
    for k, drafter in drafters.items():
        times, append = time_drafts(target, drafter, text, passes, DRAFT_WIDTHS, repeats)
        drafts[str(k)] = {"times": [asdict(time) for time in times], "append_seconds": append}
    tokens, seconds = plain_decoding(target, prompt, {"do_sample": False, "max_new_tokens": _TOKENS})
    return {
        "format": FORMAT,
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": target.config._attn_implementation,
        "verify_times": [asdict(time) for time in verify],
        "drafts_by_block_size": drafts,
        "plain_seconds": seconds / tokens,
        "plain_context": prompt.shape[1] + _TOKENS / 2,
    }
