"""Runs a script in a fresh process in which ``falcon_hf`` cannot be imported: what a drafter's user has."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

_BLOCK = """
import sys
sys.modules["falcon_hf"] = None  # importing it is an ImportError from here on
"""


def run_isolated(script: str, folder: Path, *arguments: Any, block: bool = True, **environment: str) -> str:
    """Standard output of ``script``, run in ``folder`` with a Hugging Face home of its own there; it must succeed.

    Args:
        script: Python source; ``sys.argv[1:]`` are the arguments.
        folder: the working directory, ``HF_HOME`` below it.
        *arguments: turned into strings.
        block: make ``import falcon_hf`` fail. Otherwise this checkout's package is there.
        **environment: variables beside the current ones.
    """
    variables = os.environ | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("PYTHONPATH", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"):
        variables.pop(name, None)
    if not block:
        variables["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", (_BLOCK if block else "") + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True, env=variables | environment, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
