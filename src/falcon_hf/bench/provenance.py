"""Where a result comes from: everything that two runs must share to be one run."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..runtime.target import fingerprint
from ..version import __version__


def versions() -> dict[str, str]:
    """Versions of what decides speed and text."""
    return {
        "falcon_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """CPU model, threads torch uses, and the accelerator if the target is on one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "device": name}


def cpu_model() -> str:
    """The processor's name, as the system tells it; some sandboxes hide it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def describe_target(target: PreTrainedModel) -> dict[str, Any]:
    """Name, fingerprint, dtype, attention implementation and size of a target."""
    return {
        "name": target.config._name_or_path or type(target).__name__,
        "fingerprint": fingerprint(target),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": target.config._attn_implementation,
        "parameters": target.num_parameters(),
    }


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
