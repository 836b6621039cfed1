"""A tiny chat model on disk: byte-level tokenizer, chat template, random target and drafter, question file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .tiny import VOCABULARY, byte_tokenizer

QUESTIONS = ("Why is the sky blue?", "Count to ten.", "Name a colour, a colour, a colour.")


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    """Three questions of two categories."""
    lines = [
        {"question_id": 81 + index, "category": "writing" if index else "roleplay", "turns": [text, "And then?"]}
        for index, text in enumerate(QUESTIONS)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_target(tiny_target: Callable[..., Any]) -> Any:
    """A tiny float32 target over bytes: do not change it."""
    return tiny_target(vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def drafter_path(tmp_path_factory: pytest.TempPathFactory, chat_target: Any, tiny_drafter: Callable[..., Any]) -> Path:
    """The folder of a random drafter for ``chat_target``: do not change it."""
    folder = tmp_path_factory.mktemp("drafter")
    tiny_drafter(chat_target, tree=[[0], [1], [0, 0]]).save_pretrained(folder)
    return folder
