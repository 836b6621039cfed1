"""Where half precision pays: a CPU without its instructions computes one product at a time, and a tree has many.

Without ``native_products.py``, that is. Measured so on SmolLM2-135M-Instruct, 2 threads of an AMD EPYC of the third
generation (AVX2 only): a forward of 1 token takes 35 ms in bfloat16, of 4 tokens 75 ms, of 16 tokens 110 ms (and 260 ms
without ``few_rows.py``); in float32 58, 55 and 98 ms.
"""

from __future__ import annotations

import functools
import logging

import torch
from transformers import PreTrainedModel

from .native_products import has_native_products

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


def verifies_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a few tokens cost in ``dtype`` on ``device`` about what one does, by whatever kernels."""
    native = device.type == "cpu" and dtype == torch.bfloat16
    return multiplies_fast(device, dtype) or (native and has_native_products())


def has_dear_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every further row of a product costs: on a CPU, unless in a half precision that it multiplies fast.

    Elsewhere reading the weights takes longer than multiplying a dozen rows. SmolLM2-135M-Instruct on 2 threads of a
    CPU with AMX (measured with no other such CPU): the products of 16 tokens take 1.1 times as long as those of one in
    bfloat16, and 2.4 times in float32.
    """
    return device.type == "cpu" and not (dtype in HALF_PRECISION and multiplies_fast(device, dtype))


def drafting_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a drafter for a target of ``dtype`` should be loaded in: the same, but float32 without kernels for it.

    A drafter's text is nobody's, so its rounding is free: on an AVX2 CPU the shipped one drafts a tree of four nodes in
    7 ms in float32 and in 16 ms in bfloat16, for a target in bfloat16 either way.
    """
    return dtype if multiplies_fast(device, dtype) else torch.float32


def warn_if_slow(target: PreTrainedModel) -> None:
    """Log once a dtype if the target's has no fast products where it is."""
    if not verifies_fast(target.device, target.dtype):
        _warn_once(str(target.dtype).removeprefix("torch."), str(target.device))


@functools.cache
def _warn_once(dtype: str, device: str) -> None:
    logger.warning(
        "%s has no kernels for products in %s: verifying a tree costs there two or three times a token, so that Falcon "
        "may be slower than plain generate(). Load target and drafter with dtype=torch.float32, or set the drafter's "
        "config.auto_off.",
        device,
        dtype,
    )
