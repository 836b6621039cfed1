"""Prompts for the commands, from question files in Spec-Bench format, jsonl with a ``prompt``, or plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..bench.errors import BenchError
from ..bench.questions import prompt_ids, read_question_file
from ..tuning.calibrate import Prompt
from ..tuning.errors import TuningError


def read_prompts(path: Path, tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file, asked as chat if the tokenizer has a chat template.

    ``.txt``: one prompt a line. Otherwise jsonl: objects with a ``prompt``, or questions in Spec-Bench format.

    Args:
        path: the file.
        tokenizer: the target's.
        limit: the first so many; all by default.

    Raises:
        TuningError: if the file cannot be read or has too few prompts.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TuningError(f"The prompts {path} cannot be read: {reason}.") from error
    if path.suffix != ".txt" and not (lines and '"prompt"' in lines[0]):
        try:
            questions = read_question_file(path).first(limit).questions
            return [Prompt(prompt_ids(tokenizer, question), question.category) for question in questions]
        except BenchError as error:
            raise TuningError(str(error)) from error
    if limit is not None and not 1 <= limit <= len(lines):
        raise TuningError(f"{path} has {len(lines)} prompts; ask for 1 to {len(lines)}, not {limit}.")
    if not lines:
        raise TuningError(f"{path} has no prompt.")
    texts = lines[:limit] if path.suffix == ".txt" else [_prompt(line, path) for line in lines[:limit]]
    return [Prompt(_ids(tokenizer, text)) for text in texts]


def _prompt(line: str, path: Path) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TuningError(f"{path}: not JSON ({error.msg}): {line[:40]}") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
        raise TuningError(f'{path}: each line is an object with a non-empty "prompt", got {line[:40]}')
    return str(value["prompt"])


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    """``[1, P]``."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(text, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids
