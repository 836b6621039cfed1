"""Sets by name: those of this package, those of the Hub, and what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from falcon_hf.bench import question_sets
from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.question_sets import NAMES, OUT_OF_DOMAIN, find_questions
from falcon_hf.bench.questions import Question


def test_out_of_domain_is_all_domains() -> None:
    parts = [find_questions(f"out-of-domain/{domain}") for domain in OUT_OF_DOMAIN]
    for part in parts:
        assert 8 <= part.size <= 10
    whole = find_questions("out-of-domain")
    assert whole.questions == tuple(question for part in parts for question in part.questions)
    assert len({question.question_id for question in whole.questions}) == whole.size
    assert len({question.turns for question in whole.questions}) == whole.size
    assert whole.name == "out-of-domain"
    assert len(whole.sha256) == 64
    assert whole.sha256 != parts[0].sha256


def test_every_data_file_is_a_set() -> None:
    folder = Path(question_sets.__file__).parent / "data"
    assert {path.stem for path in folder.glob("*.jsonl")} == {*OUT_OF_DOMAIN, "everyday", "repetitive"}
    assert "CC0" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["everyday", "repetitive"])
def test_the_first_questions_hold_every_kind(name: str) -> None:
    found = find_questions(name)
    kinds = {question.category for question in found.questions}
    assert found.size == 3 * len(kinds) == len({question.turns for question in found.questions})
    assert {question.category for question in found.questions[: len(kinds)]} == kinds


def test_a_file_comes_before_a_name(question_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_questions(str(question_file)).size == 3
    monkeypatch.chdir(question_file.parent)
    question_file.rename("gsm8k")
    assert find_questions("gsm8k").size == 3


def test_mt_bench_is_a_file_of_the_hub(question_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options["repo_type"]))
        return str(question_file)

    monkeypatch.setattr(question_sets, "hf_hub_download", download)
    found = find_questions("mt-bench")
    assert (found.name, found.size) == ("mt-bench", 3)
    assert find_questions("org/sets:folder/own.jsonl").name == "org/sets:folder/own.jsonl"
    assert asked == [
        ("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl", "dataset"),
        ("org/sets", "folder/own.jsonl", "dataset"),
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "rows", "expected"),
    [
        ("gsm8k", ("openai/gsm8k", "main"), [{"question": "1 + 1?", "answer": "2"}], Question(0, "math", ("1 + 1?",))),
        (
            "humaneval",
            ("openai/openai_humaneval", "openai_humaneval"),
            [{"task_id": "HumanEval/0", "prompt": "def f():\n"}],
            Question("HumanEval/0", "code", ("Complete the code I provided.\n\ndef f():\n",)),
        ),
    ],
)
def test_hub_datasets(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: Any, rows: Any, expected: Question
) -> None:
    def load(*given: Any, split: str) -> Any:
        assert (given, split) == (arguments, "test")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert find_questions(name).questions == (expected,)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("mt_bench", "no question file 'mt_bench', and no set of that name; sets: mt-bench, gsm8k"),
        ("absent.jsonl", "cannot be read: No such file"),
        (r"C:\sets\absent.jsonl", "cannot be read: No such file"),
        (r"C:\sets\absent", r"no question file 'C:.*, and no set of that name"),
        ("spec-bench", "give its path with --questions"),
        ("out-of-domain/cooking", "no set of that name"),
    ],
)
def test_what_is_no_set(name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError, match=fault):
        find_questions(name)


def test_a_folder_of_a_sets_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "everyday").mkdir()
    assert find_questions("everyday").size == 24


def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("no such file")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(question_sets, "hf_hub_download", refuse)
    with pytest.raises(BenchError, match=r"does not give other\.jsonl of the dataset org/sets"):
        find_questions("org/sets:other.jsonl")
    monkeypatch.setattr(question_sets, "hf_hub_download", unreachable)
    with pytest.raises(BenchError, match="no network") as caught:
        find_questions("mt-bench")
    assert "\n" not in str(caught.value)

    def proxy(*_: Any, **__: Any) -> None:
        raise HTTPError("403 by a proxy")

    monkeypatch.setattr(question_sets, "hf_hub_download", proxy)
    monkeypatch.setattr(datasets, "load_dataset", proxy)
    for name in ("mt-bench", "gsm8k"):
        with pytest.raises(BenchError, match="403 by a proxy"):
            find_questions(name)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(BenchError, match="A file in Spec-Bench format will do"):
        find_questions("gsm8k")


def test_every_name_is_known() -> None:
    assert set(NAMES) >= {"mt-bench", "gsm8k", "humaneval", "spec-bench", "everyday", "repetitive", "out-of-domain"}
