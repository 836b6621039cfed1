"""The target's head as a training computes with it: of one dtype, on one device, for the losses and for kept laws."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..runtime.target import head_weight
from .arguments import FalconTrainingArguments
from .losses import DraftHead


def training_head(drafter: Any, target: PreTrainedModel, args: FalconTrainingArguments) -> DraftHead:
    """The target's head rows that the drafter learns by, on the training's device and in its dtype.

    Args:
        drafter: the drafter, or a peft model around it.
        target: gives the rows.
        args: say device and dtype.
    """
    weight = drafter.draft_head(head_weight(target)).to(args.device, training_dtype(drafter, args)).contiguous()
    return DraftHead(weight, drafter.config.logit_scale, drafter.config.logit_softcap)


def training_dtype(drafter: Any, args: FalconTrainingArguments) -> torch.dtype:
    """What products are computed in: autocast's dtype, or the drafter's own."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    dtype: torch.dtype = next(drafter.parameters()).dtype
    return dtype
