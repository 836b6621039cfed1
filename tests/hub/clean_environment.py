"""Run by hand where nothing but transformers is installed: both ways in, the same text, and their times.

    python -m venv clean && clean/bin/pip install torch==2.13.0 transformers==5.24.0
    clean/bin/python tests/hub/clean_environment.py TARGET_FOLDER hub_cards/falcon-smollm2-135m-instruct float32

``test_clean_environment.py`` runs it with ``falcon_hf`` blocked.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

PROMPT = "Write a Python function that returns the second largest number in a list."


def compare(target_folder: str, drafter_folder: str, dtype: torch.dtype, new_tokens: int) -> dict[str, Any]:
    """Whether each way gives plain generation's tokens, and the seconds of each call (a warm-up before each)."""
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    drafter = AutoModel.from_pretrained(drafter_folder, trust_remote_code=True, dtype=dtype)
    message = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "assistant_model": {"assistant_model": drafter},
        "custom_generate": {"custom_generate": drafter_folder, "trust_remote_code": True},
    }
    texts, seconds = {}, {}
    for name, way in ways.items():
        target.generate(**inputs, max_new_tokens=2, do_sample=False, **way)
        begin = time.perf_counter()
        texts[name] = target.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **way)[0].tolist()
        seconds[name] = time.perf_counter() - begin
    return {
        "identical": {name: text == texts["plain"] for name, text in texts.items()},
        "seconds": seconds,
        "tau": drafter.last_generation.tau,
    }


if __name__ == "__main__":
    if sys.modules.get("falcon_hf", 0) is not None and importlib.util.find_spec("falcon_hf") is not None:
        sys.exit("falcon_hf is installed here: this is no clean environment.")
    sys.stdout.write(json.dumps(compare(*sys.argv[1:3], getattr(torch, sys.argv[3]), int((sys.argv[4:] or [128])[0]))))
    sys.stdout.write("\n")
