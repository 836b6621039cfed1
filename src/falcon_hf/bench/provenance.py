"""Where a result comes from: everything that two runs must share to be one run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..runtime.native_kernel import SOURCE_HASH
from ..runtime.native_products import has_native_products, has_native_tiles
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
    """CPU, cores, threads torch uses, which kernel for few rows with tiles or without, and the target's accelerator."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kernel: dict[str, Any] = {}
    if device.type == "cpu":
        kernel = {"few_rows": SOURCE_HASH if has_native_products() else None, "tiles": has_native_tiles()}
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "system": platform.platform(),
        **kernel,
    }


def session() -> dict[str, Any]:
    """When, with which command and from which commit; a run that is cut off has several sessions."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of falcon_hf's source checkout, with ``+changes`` if files differ; None outside of one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


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
        # A model may come with penalties or a temperature of its own.
        "generation_config": _chosen(target.generation_config),
    }


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Size of its vocabulary and hash of its chat template; prompts themselves may hold the day's date."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {"tokens": len(tokenizer), "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()}


def _chosen(config: Any) -> dict[str, Any]:
    """What a generation config has that is not transformers' default, versions left out."""
    given = {} if config is None else config.to_diff_dict()
    return {name: given[name] for name in given if name not in ("transformers_version", "_from_model_config")}
