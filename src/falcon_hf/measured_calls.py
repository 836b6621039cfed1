"""What calls of ``generate()`` that are timed have in common, whoever times them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def padding_token(target: PreTrainedModel) -> int | None:
    """The token to pass as ``pad_token_id``: the target's, else the one ``generate()`` would choose with a warning.

    None where there is neither a padding nor an end token.
    """
    config = target.generation_config
    if config is None:
        return None
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a time is that of the work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
