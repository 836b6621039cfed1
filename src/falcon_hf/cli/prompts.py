"""Prompts for the commands: question sets by name or file, jsonl with a ``prompt``, or plain text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.errors import BenchError
from ..bench.question_sets import find_questions
from ..bench.questions import read_lines
from ..tuning.calibrate import Prompt
from ..tuning.errors import TuningError
from .answer import encode


@dataclass(frozen=True)
class PromptSet:
    """Prompts and where they come from.

    Attributes:
        prompts: at least one.
        name: a file's name, or a named set's.
        sha256: of the file's bytes, or of the questions where there is no one file.
    """

    prompts: list[Prompt]
    name: str
    sha256: str


def read_prompts(source: str, tokenizer: Any, limit: int | None = None) -> PromptSet:
    """Prompts of a file or a named set, asked as chat if the tokenizer has a chat template.

    ``.txt``: one prompt a line. jsonl: objects with a ``prompt`` that is a string, or questions in Spec-Bench format,
    of which the first turns are asked. Otherwise what ``bench.question_sets.find_questions`` knows.

    Args:
        source: a file, the name of a set, or ``org/dataset:file.jsonl``.
        tokenizer: the target's.
        limit: so many: the first of a list, spread evenly over the categories of a question set; all by default.

    Raises:
        TuningError: if there is no such file or set, or it has too few prompts.
    """
    path = Path(source)
    if path.suffix == ".txt" or _holds_plain_prompts(path):
        lines = _lines(path)
        if limit is not None and not 1 <= limit <= len(lines):
            raise TuningError(f"{path} has {len(lines)} prompts; ask for 1 to {len(lines)}, not {limit}.")
        if not lines:
            raise TuningError(f"{path} has no prompt.")
        texts = lines[:limit] if path.suffix == ".txt" else [_prompt(line, path) for line in lines[:limit]]
        asked = [(text, "") for text in texts]
        name, sha256 = path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        try:
            found = find_questions(source).some(limit)
        except BenchError as error:
            raise TuningError(str(error)) from error
        asked = [(question.turns[0], question.category) for question in found.questions]
        name, sha256 = found.name, found.sha256
    return PromptSet([Prompt(encode(tokenizer, text)["input_ids"], task) for text, task in asked], name, sha256)


def _lines(path: Path) -> list[str]:
    """The lines of a file, without empty ones."""
    try:
        return [line for line in read_lines(path) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TuningError(f"The prompts {path} cannot be read: {reason}.") from error


def _holds_plain_prompts(path: Path) -> bool:
    """Whether a file's first object has a ``prompt`` that is a string: the Hub's MT-Bench has a list of turns there."""
    if not path.is_file():
        return False
    try:
        first = json.loads(next(iter(_lines(path)), "null"))
    except json.JSONDecodeError:
        return False
    return isinstance(first, dict) and isinstance(first.get("prompt"), str)


def _prompt(line: str, path: Path) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TuningError(f"{path}: not JSON ({error.msg}): {line[:40]}") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
        raise TuningError(f'{path}: each line is an object with a non-empty "prompt", got {line[:40]}')
    return str(value["prompt"])
