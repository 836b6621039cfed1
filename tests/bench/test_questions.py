"""Question files: what is read, and one clear line for whatever is not a question."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.questions import Question, QuestionSet, prompt_ids, read_question_file, read_questions

from .tiny import byte_tokenizer

GOOD = '{"question_id": 1, "category": "maths", "turns": ["2 + 2?", "And 3 + 3?"], "reference": ["4"]}'


def write(folder: Path, text: str) -> Path:
    path = folder / "file.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_all_turns_and_skips_empty_lines(tmp_path: Path) -> None:
    path = write(tmp_path, f"{GOOD}\n\n" + GOOD.replace(": 1,", ': "b",') + "\n")
    assert read_questions(path) == [
        Question(1, "maths", ("2 + 2?", "And 3 + 3?")),
        Question("b", "maths", ("2 + 2?", "And 3 + 3?")),
    ]


def test_limit(question_file: Path) -> None:
    whole = read_question_file(question_file)
    assert whole.sha256 == hashlib.sha256(question_file.read_bytes()).hexdigest()
    assert [question.question_id for question in whole.some(2).questions] == [81, 82]
    assert whole.some(None) == whole
    for limit in (0, -1, 4):
        with pytest.raises(BenchError, match="ask for 1 to 3, not"):
            whole.some(limit)


def test_some_are_spread_over_the_categories() -> None:
    kinds = ["a"] * 3 + ["b"] * 3 + ["c"] + ["a"]
    whole = QuestionSet.of("set", [Question(number, kind, ("?",)) for number, kind in enumerate(kinds)])
    chosen = [[question.question_id for question in whole.some(limit).questions] for limit in (1, 3, 5, 8)]
    assert chosen == [[0], [0, 3, 6], [0, 1, 3, 4, 6], list(range(8))]
    assert whole.some(3).sha256 == whole.sha256


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 and their like, and Windows editors put a mark before the first line."""
    path = tmp_path / "file.jsonl"
    path.write_text("\ufeff" + GOOD.replace("2 + 2?", "2\u2028+\u20292\u0085?") + "\r\n", encoding="utf-8")
    assert read_questions(path)[0].turns[0] == "2\u2028+\u20292\u0085?"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{not json}", "not JSON"),
        ("[1, 2]", "a question is a JSON object, got list"),
        ('{"category": "a", "turns": ["x"]}', "'question_id' is missing"),
        ('{"question_id": 2, "turns": ["x"]}', "'category' is missing"),
        ('{"question_id": 2, "category": "a"}', "'turns' is missing"),
        ('{"question_id": null, "category": "a", "turns": ["x"]}', "question_id must be"),
        ('{"question_id": true, "category": "a", "turns": ["x"]}', "question_id must be"),
        ('{"question_id": 2, "category": 3, "turns": ["x"]}', "category must be a string"),
        ('{"question_id": 2, "category": "a", "turns": "x"}', "turns must be a list"),
        ('{"question_id": 2, "category": "a", "turns": []}', "turns must be a list"),
        ('{"question_id": 2, "category": "a", "turns": ["x", 3]}', "turns must be a list"),
        ('{"question_id": 2, "category": "a", "turns": ["  "]}', "turns must be a list"),
        ('{"question_id": 1, "category": "a", "turns": ["x"]}', "question_id 1 comes twice"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = write(tmp_path, f"{GOOD}\n\n{line}\n")
    with pytest.raises(BenchError, match=fault) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"cannot be read: No such file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(BenchError, match=r"cannot be read: Is a directory"):
        read_questions(tmp_path)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match=r"not UTF-8 text"):
        read_questions(binary)
    with pytest.raises(BenchError, match=r"has no question"):
        read_questions(write(tmp_path, "\n"))


def test_prompt_is_the_first_turn_in_the_chat_template(chat_tokenizer: Any) -> None:
    ids = prompt_ids(chat_tokenizer, Question(1, "maths", ("2 + 2?", "And 3 + 3?")))
    assert ids.shape[0] == 1
    assert chat_tokenizer.decode(ids[0]) == "<user>2 + 2?\n<assistant>"


def test_a_later_turn_stands_behind_the_answers(chat_tokenizer: Any) -> None:
    ids = prompt_ids(chat_tokenizer, Question(1, "maths", ("2 + 2?", "And 3 + 3?")), ["4."])
    assert chat_tokenizer.decode(ids[0]) == "<user>2 + 2?\n<assistant>4.\n<user>And 3 + 3?\n<assistant>"


def test_the_hubs_mt_bench_calls_turns_prompt(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace('"turns"', '"prompt"') + "\n")
    assert read_questions(path) == [Question(1, "maths", ("2 + 2?", "And 3 + 3?"))]


def test_a_chat_template_that_refuses() -> None:
    refusing = byte_tokenizer(template="{{ raise_exception('Turns must alternate.') }}")
    with pytest.raises(BenchError, match="refuses the messages: Turns must alternate"):
        prompt_ids(refusing, Question(1, "a", ("Why?",)))


def test_no_chat_template() -> None:
    with pytest.raises(BenchError, match="no chat template"):
        prompt_ids(byte_tokenizer(template=None), Question(1, "maths", ("2 + 2?",)))
