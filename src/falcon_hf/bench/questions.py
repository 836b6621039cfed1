"""Question files in Spec-Bench format: one JSON object a line with ``question_id``, ``category`` and ``turns``.

The Hub's MT-Bench calls ``turns`` ``prompt``; both are read. Named sets are in ``question_sets.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..chat_template import ChatTemplateError, templated
from .errors import BenchError


@dataclass(frozen=True)
class Question:
    """One question; ``turns`` are the user's, in order."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Questions and what identifies them in a result.

    Attributes:
        name: a file's name, or a named set's.
        questions: in order.
        sha256: of the file's bytes, or of the questions where there is no one file.
        size: questions of the whole set, of which ``questions`` may be some.
    """

    name: str
    questions: tuple[Question, ...]
    sha256: str
    size: int

    @classmethod
    def of(cls, name: str, questions: Sequence[Question], sha256: str | None = None) -> QuestionSet:
        """The whole set of ``questions``."""
        if sha256 is None:
            sha256 = hashlib.sha256(json.dumps([asdict(one) for one in questions]).encode()).hexdigest()
        return cls(name, tuple(questions), sha256, len(questions))

    def some(self, limit: int | None) -> QuestionSet:
        """``limit`` questions spread evenly over the categories, each category's first ones; all for None.

        Question files are sorted by category, so their first lines would be of one or two.

        Raises:
            BenchError: if ``limit`` is below 1 or above the count.
        """
        if limit is None:
            return self
        if not 1 <= limit <= self.size:
            raise BenchError(f"{self.name} has {self.size} questions; ask for 1 to {self.size}, not {limit}.")
        of_category: dict[str, list[int]] = {}
        for index, question in enumerate(self.questions):
            of_category.setdefault(question.category, []).append(index)
        in_turn = (index for round_ in itertools.zip_longest(*of_category.values()) for index in round_)
        chosen = sorted(itertools.islice((index for index in in_turn if index is not None), limit))
        return QuestionSet(self.name, tuple(self.questions[index] for index in chosen), self.sha256, self.size)


def read_question_file(path: Path | str) -> QuestionSet:
    """A jsonl file as a set; see [`read_questions`]."""
    path = Path(path)
    questions = read_questions(path)
    return QuestionSet.of(path.name, questions, hashlib.sha256(path.read_bytes()).hexdigest())


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, which may begin with a byte order mark.

    They end at line feeds alone: JSON strings, and prompts, may hold the line separators of Unicode as they are.

    Raises:
        OSError, UnicodeDecodeError: if it cannot be read as such.
    """
    return path.read_text(encoding="utf-8-sig").split("\n")


def read_questions(path: Path | str) -> list[Question]:
    """Read the questions of a jsonl file. Empty lines are skipped.

    Raises:
        BenchError: if the file is missing, not text, or empty; on a line that is not a question (the message names
            file, line and fault), or a question_id that comes twice.
    """
    path = Path(path)
    try:
        lines = read_lines(path)
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
    return questions


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
    if "turns" not in entry and isinstance(entry.get("prompt"), list):
        entry["turns"] = entry["prompt"]
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


def prompt_ids(tokenizer: Any, question: Question, answers: Sequence[str] = ()) -> torch.Tensor:
    """Ids ``[1, P]`` of the turn behind ``answers`` as a chat to go on with, by the tokenizer's chat template.

    Args:
        tokenizer: the target's.
        question: turns 0 to ``len(answers)`` are the user's words.
        answers: the assistant's, one a turn before.

    Raises:
        BenchError: if the tokenizer has no chat template, or one that refuses the chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BenchError("The target's tokenizer has no chat template; bench asks chat questions of chat models.")
    chat = []
    for turn, answer in zip(question.turns, answers, strict=False):
        chat += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    chat.append({"role": "user", "content": question.turns[len(answers)]})
    try:
        ids: torch.Tensor = templated(tokenizer, chat, return_tensors="pt")["input_ids"]
    except ChatTemplateError as error:
        raise BenchError(str(error)) from error
    return ids
