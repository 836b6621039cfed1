"""Question files in Spec-Bench format: one JSON object a line with ``question_id``, ``category`` and ``turns``.

Only the first turn is asked for now.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import BenchError


@dataclass(frozen=True)
class Question:
    """One question; ``turns`` are the user's, in order."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path | str, limit: int | None = None) -> list[Question]:
    """Read the first ``limit`` questions of a jsonl file, all by default. Empty lines are skipped.

    Raises:
        BenchError: if the file is missing, not text, or empty; on a line that is not a question (the message names
            file, line and fault), a question_id that comes twice, or a limit that is below 1 or above the count.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"The question file {path} cannot be read: {_reason(error)}.") from error
    questions: list[Question] = []
    seen: set[int | str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _parse(line, f"{path}, line {number}")
        if question.question_id in seen:
            raise BenchError(f"{path}, line {number}: question_id {question.question_id!r} comes twice.")
        seen.add(question.question_id)
        questions.append(question)
    if not questions:
        raise BenchError(f"The question file {path} has no question.")
    if limit is None:
        return questions
    if not 1 <= limit <= len(questions):
        raise BenchError(f"{path} has {len(questions)} questions; ask for 1 to {len(questions)}, not {limit}.")
    return questions[:limit]


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8 text"


def _parse(line: str, where: str) -> Question:
    """One line to a question; ``where`` opens the error's message."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
    if not isinstance(entry, dict):
        raise BenchError(f"{where}: a question is a JSON object, got {type(entry).__name__}.")
    for field in ("question_id", "category", "turns"):
        if field not in entry:
            raise BenchError(f"{where}: the field {field!r} is missing.")
    question_id, category, turns = entry["question_id"], entry["category"], entry["turns"]
    if isinstance(question_id, bool) or not isinstance(question_id, (int, str)):
        raise BenchError(f"{where}: question_id must be a number or a string, got {question_id!r}.")
    if not isinstance(category, str):
        raise BenchError(f"{where}: category must be a string, got {category!r}.")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise BenchError(f"{where}: turns must be a list of at least one non-empty string.")
    return Question(question_id, category, tuple(turns))


def prompt_ids(tokenizer: Any, question: Question) -> torch.Tensor:
    """Ids ``[1, P]`` of the first turn as a chat with the assistant to answer, by the tokenizer's chat template.

    Raises:
        BenchError: if the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BenchError("The target's tokenizer has no chat template; bench asks chat questions of chat models.")
    chat = [{"role": "user", "content": question.turns[0]}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids: torch.Tensor = encoded["input_ids"]
    return ids
