"""Where half precision pays: a CPU without its instructions computes one product at a time, and a tree has many.

Measured on SmolLM2-135M-Instruct, 2 threads of an AMD EPYC of the third generation (AVX2 only): a forward of 1 token
takes 41 ms in bfloat16, of 16 tokens 260 ms; in float32 58 and 112 ms. Speculation can only lose there.
"""

from __future__ import annotations

import functools
import logging

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

HALF_PRECISION = (torch.bfloat16, torch.float16)


def multiplies_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of matrices in ``dtype`` have kernels of their own on ``device``; float32 always has."""
    if dtype not in HALF_PRECISION:
        return True
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    asked = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, asked)())


def warn_if_slow(target: PreTrainedModel) -> None:
    """Log once a dtype if the target's has no fast products where it is."""
    if not multiplies_fast(target.device, target.dtype):
        _warn_once(str(target.dtype).removeprefix("torch."), str(target.device))


@functools.cache
def _warn_once(dtype: str, device: str) -> None:
    logger.warning(
        "%s has no kernels for products in %s: verifying a tree costs there several times a token, so that Falcon is "
        "slower than plain generate(). Load target and drafter with dtype=torch.float32, or set the drafter's "
        "config.auto_off.",
        device,
        dtype,
    )
