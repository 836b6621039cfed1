"""``falcon-hf distill`` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_from_disk
from typer.testing import Result

from .conftest import Run


def distill(run: Run, repos: Path, output: Path, *options: object) -> Result:
    return run(
        "distill", "--target", repos / "target", "--output", output, "--dtype", "float32", "--device", "cpu",
        "--batch-size", 4, "--max-new-tokens", 6, *options,
    )  # fmt: skip


def test_a_dataset_from_prompts_then_more_of_it(run: Run, repos: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Question {number}?"}}\n' for number in range(5)))
    result = distill(run, repos, tmp_path / "out", "--prompts", prompts, "--dialogues", 3)
    assert result.exit_code == 0
    assert "3 dialogues with" in result.stdout
    result = distill(run, repos, tmp_path / "out", "--prompts", prompts, "--dialogues", 5)
    assert "5 dialogues with" in result.stdout
    rows = load_from_disk(str(tmp_path / "out"))
    assert len(rows) == 5
    assert all(sum(mask) == 6 for mask in rows["loss_mask"])


def test_more_of_the_same_prompts_in_another_folder(run: Run, repos: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Question {number}?"}}\n' for number in range(8)))
    given = ("--prompts", prompts, "--dialogues", 3)
    assert distill(run, repos, tmp_path / "one", *given).exit_code == 0
    result = distill(run, repos, tmp_path / "two", *given, "--new-to", tmp_path / "one")
    assert "3 dialogues with" in result.stdout
    ids = [{tuple(row) for row in load_from_disk(str(tmp_path / name))["input_ids"]} for name in ("one", "two")]
    assert not ids[0] & ids[1]


def test_excluded_questions_are_not_answered(run: Run, repos: Path, tmp_path: Path) -> None:
    prompts, questions = tmp_path / "prompts.jsonl", tmp_path / "questions.jsonl"
    prompts.write_text('{"prompt": "Mine alone?"}\n{"prompt": "Of a benchmark?"}\n')
    questions.write_text('{"question_id": 1, "category": "c", "turns": ["Of a benchmark?"]}\n')
    result = distill(run, repos, tmp_path / "out", "--prompts", prompts, "--exclude", questions)
    assert "1 dialogues with" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "nowhere.jsonl"), "There is no file"),
        (("--feature-layers", "one"), "--feature-layers is a comma-separated list of whole numbers"),
        (("--feature-layers", "1,99"), "no hidden state 99: feature layers are from 0 (the embeddings) to 2"),
        (("--feature-layers", "-1"), "no hidden state -1"),
        (("--stems", "nowhere.txt"), "No such file"),
        (("--exclude", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--dtype", "int3"), "--dtype must be one of"),
        (("--column", "prompt"), "--column: needs --prompts"),
        (("--top-p", "0.5"), "--top-p: needs a --temperature"),
        (("--prompts", "nowhere.jsonl", "--seed", "1"), "--seed: draws nothing"),
        (("--new-to", "nowhere"), "nowhere holds no turns.jsonl"),
        (("--prompts", "nowhere.jsonl", "--stems", "stems.txt"), "--stems: begins turns"),
    ],
)
def test_bad_input_is_one_line(run: Run, repos: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = distill(run, repos, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
