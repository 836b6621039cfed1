"""Loading a drafter for the commands and the benchmark: whatever is wrong with it is one kind of error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .runtime.configuration_falcon_drafter import FalconDrafterConfig
from .runtime.modeling_falcon_drafter import FalconDrafter

# What loading raises for a repo that is of another kind or broken.
_CAUSES = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    AttributeError,
    TypeError,
    SafetensorError,
    StrictDataclassError,
    HTTPError,
)


class DrafterError(ValueError):
    """A drafter that cannot be loaded; the message says which and why."""


def load_drafter(
    source: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> FalconDrafter:
    """A drafter in evaluation mode, on the CPU.

    Args:
        source: a folder or a Hub repo.
        dtype: of the weights; as stored by default.
        trust_remote_code: run the code in the drafter's repo instead of this package's. Asked for here by hand:
            ``AutoModel`` prefers an installed class whatever it is told.

    Raises:
        DrafterError: if it is no Falcon drafter, or config or weights are absent, corrupt or incomplete.
    """
    try:
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise DrafterError(f"{str(source)!r} is not a Falcon drafter: it has no config.json.")
        settings, _ = PreTrainedConfig.get_config_dict(source)
        kind = settings.get("model_type")
        if kind != FalconDrafterConfig.model_type:
            raise DrafterError(f"{str(source)!r} is not a Falcon drafter: its model_type is {kind!r}.")
        model_class: Any = FalconDrafter
        if trust_remote_code:
            code = settings.get("auto_map", {}).get("AutoModel")
            if code is None:
                raise DrafterError(f"The drafter {str(source)!r} brings no code of its own to trust.")
            model_class = get_class_from_dynamic_module(code, str(source))
        drafter: FalconDrafter = model_class.from_pretrained(source, dtype=dtype or "auto")
        return drafter.eval()
    except DrafterError:
        raise  # a ValueError as well
    except _CAUSES as error:
        raise DrafterError(f"The drafter {str(source)!r} cannot be loaded: {error}") from error
