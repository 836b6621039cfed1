"""``falcon-hf bench`` and ``falcon-hf report`` as a user types them, on a tiny chat model on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.report import BEGIN, END
from falcon_hf.cli import app

from ..bench.tiny import VOCABULARY, byte_tokenizer

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Callable[..., Any], tiny_drafter: Callable[..., Any]
) -> Path:
    """A folder with ``target``, ``drafter`` and ``questions.jsonl``: do not change them."""
    folder = tmp_path_factory.mktemp("models")
    target = tiny_target(vocab_size=VOCABULARY)
    target.save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    tiny_drafter(target).save_pretrained(folder / "drafter")
    lines = [{"question_id": index, "category": "a", "turns": [f"Question {index}?"]} for index in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def command(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``command(name=value, ...)`` runs bench in an empty folder; None leaves a default option out."""
    monkeypatch.chdir(tmp_path)
    defaults = {
        "questions": models / "questions.jsonl", "output": "result.json", "target": models / "target",
        "drafter": models / "drafter", "dtype": "float32", "num_questions": 2, "max_new_tokens": 6,
    }  # fmt: skip

    def start(*flags: str, **options: Any) -> Result:
        chosen = {**defaults, **options}
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in chosen.items() if value is not None]
        return CliRunner().invoke(app, ["bench", *(part for pair in pairs for part in pair), *flags])

    return start


def report(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", *arguments])


def test_bench_then_report(command: Command, models: Path) -> None:
    result = command(threads=torch.get_num_threads())
    assert result.exit_code == 0, result.output
    assert "falcon" in result.stdout
    content = json.loads(Path("result.json").read_text(encoding="utf-8"))
    assert content["complete"]
    assert content["settings"]["options"] == {"do_sample": False, "max_new_tokens": 6}
    assert content["settings"]["target"]["dtype"] == "float32"
    assert content["summary"]["falcon"]["identical"] == 2

    tables = report("result.json")
    assert tables.exit_code == 0
    assert "| questions, float32, greedy | falcon | 2 of 2 |" in tables.stdout
    Path("README.md").write_text(f"# T\n{BEGIN}\n{END}\n", encoding="utf-8")
    assert report("result.json", "--update", "README.md", "--check").exit_code == 1
    assert "| falcon |" not in Path("README.md").read_text(encoding="utf-8")
    assert report("result.json", "--update", "README.md").exit_code == 0
    assert "| falcon |" in Path("README.md").read_text(encoding="utf-8")
    assert report("result.json", "--update", "README.md", "--check").exit_code == 0


def test_at_a_terminal_folded_tables_stand_below_their_titles(command: Command, monkeypatch: Any) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=300)
    monkeypatch.setattr("falcon_hf.cli.bench.stdout", terminal)
    assert command(methods="plain", drafter=None).exit_code == 0
    lines = [line.strip() for line in terminal.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    (title,) = [index for index, line in enumerate(lines) if "Models, machine and settings of each run" in line]
    assert any("questions, float32, greedy: " in line for line in lines[title:])
    assert not any("details" in line for line in lines)


def test_json_is_all_of_standard_output(command: Command) -> None:
    result = command("--json", methods="plain,prompt_lookup:tokens=3", drafter=None)
    printed = json.loads(result.stdout)
    assert list(printed["summary"]) == ["plain", "prompt_lookup:tokens=3"]
    assert printed["output"] == "result.json"
    assert "runs" not in printed
    listed = json.loads(report("result.json", "--json").stdout)
    assert listed["results"][0]["summary"] == printed["summary"]


def test_sampling_options_reach_generate(command: Command) -> None:
    options = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
    result = command("--option", "min_p=0.01", "--option", "bad_words_ids=[[5]]", seeds="0,1", **options)
    assert result.exit_code == 0, result.output
    content = json.loads(Path("result.json").read_text(encoding="utf-8"))
    expected = {"do_sample": True, "max_new_tokens": 6, "min_p": 0.01, "bad_words_ids": [[5]], **options}
    assert content["settings"]["options"] == expected
    assert content["settings"]["seeds"] == [0, 1]
    assert (content["summary"]["falcon"]["identical"], content["summary"]["falcon"]["compared"]) == (4, 4)


def test_goes_on_or_refuses(command: Command) -> None:
    assert command(methods="plain", drafter=None).exit_code == 0
    before = Path("result.json").read_bytes()
    assert command(methods="plain", drafter=None).exit_code == 0
    assert Path("result.json").read_bytes() == before
    other = command(methods="plain", drafter=None, max_new_tokens=7)
    assert_one_line(other, "options.max_new_tokens: 6 there, 7 here")
    assert Path("result.json").read_bytes() == before


def test_the_default_device_is_cuda_where_there_is_one(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the result says on which it was: without CUDA, on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command(methods="plain", drafter=None).exit_code == 0
    assert json.loads(Path("result.json").read_text())["settings"]["machine"]["device"] == "cpu"
    assert command(methods="plain", drafter=None, device="cpu").exit_code == 0, "the same run"
    asked: list[torch.device] = []

    def load(name: str, dtype: torch.dtype, device: torch.device) -> None:
        asked.append(device)
        raise BenchError("far enough")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("falcon_hf.cli.bench.load_target", load)
    monkeypatch.setattr("falcon_hf.cli.tune.load_target", load)
    assert_one_line(command(methods="plain", drafter=None, output="other.json", dtype="float32"), "far enough")
    questions = str(tmp_path / "none.jsonl")
    tuned = CliRunner().invoke(
        app, ["tune", "--prompts", questions, "--output", "t.json", "--drafter", "any", "--dtype", "float32"]
    )
    assert_one_line(tuned, "far enough")
    assert [device.type for device in asked] == ["cuda", "cuda"]


def test_attention(command: Command) -> None:
    assert command(attention="eager").exit_code == 0
    content = json.loads(Path("result.json").read_text(encoding="utf-8"))
    assert content["settings"]["target"]["attention"] == "eager"


def assert_one_line(result: Result, fault: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert fault in line
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"questions": "absent.jsonl"}, "question file absent.jsonl cannot be read: No such file"),
        ({"num_questions": 9}, "ask for 1 to 3, not 9"),
        ({"methods": "plain,eagle"}, "Unknown method 'eagle'"),
        ({"methods": ""}, "at least one method"),
        ({"dtype": "int8"}, "got 'int8'"),
        ({"device": "nowhere"}, "nowhere"),
        ({"drafter": "./absent"}, "./absent is not a folder here"),
        ({"drafter": None}, "Name the target's drafter: --drafter"),
        ({"tree": "absent.json"}, "tree file absent.json cannot be used: No such file"),
        ({"target": "./absent"}, "./absent"),
        ({"methods": "plain"}, "no method of --methods would take it"),
        ({"seeds": "1,x"}, "whole numbers"),
        ({"seeds": "1,2"}, "Greedy decoding draws nothing"),
        ({"top_p": 0.9}, "need a --temperature"),
        ({"option": "min_p"}, "NAME=JSON"),
        ({"option": "min_p=x"}, "not JSON"),
        ({"option": "no_such_option=1"}, "no_such_option"),
        ({"attention": "imaginary"}, "imaginary"),
    ],
)
def test_bad_input_is_one_line(command: Command, options: dict[str, Any], fault: str) -> None:
    assert_one_line(command(**options), fault)


def test_broken_files_are_one_line(command: Command, models: Path, tmp_path: Path) -> None:
    questions = tmp_path / "broken.jsonl"
    questions.write_text('{"question_id": 1}\n', encoding="utf-8")
    assert_one_line(command(questions=questions), "broken.jsonl, line 1: the field 'category' is missing")
    drafter = tmp_path / "broken"
    drafter.mkdir()
    (drafter / "config.json").write_text((models / "drafter" / "config.json").read_text(), encoding="utf-8")
    assert_one_line(command(drafter=drafter), "cannot be loaded")
    (drafter / "model.safetensors").write_bytes(b"\x10\x00")
    assert_one_line(command(drafter=drafter), "cannot be loaded")
    assert_one_line(command(drafter=models / "target"), "not a Falcon drafter")
    (tmp_path / "notes.json").write_text("{}", encoding="utf-8")
    assert_one_line(command(output="notes.json"), "not a result of falcon-hf bench")
    assert_one_line(command(output=f"{questions}/result.json"), "cannot be written")


def test_report_refuses(command: Command, tmp_path: Path) -> None:
    assert_one_line(report("absent.json"), "absent.json cannot be read")
    (tmp_path / "notes.json").write_text("{}", encoding="utf-8")
    assert_one_line(report("notes.json"), "not a result")
    assert command(methods="plain", drafter=None).exit_code == 0
    assert "nothing was measured" in command(methods="plain", drafter=None).stderr
    tree = tmp_path / "tree.json"
    tree.write_text("[[0]]")
    assert_one_line(command(methods="plain", drafter=None, tree=tree), "--tree: no method of --methods would take it")
    assert_one_line(report("result.json", "--check"), "add --update FILE")
    assert_one_line(report("result.json", "--questions", "everyday"), "--questions: needs --sheet FILE")
    assert_one_line(report("result.json", "--brief", "--json"), "--brief: not with --json")
    assert_one_line(report("result.json", "--update", "absent.md"), "absent.md cannot be updated")
    (tmp_path / "README.md").write_text("no markers", encoding="utf-8")
    assert_one_line(report("result.json", "--update", "README.md"), "README.md has no place for results")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    (tmp_path / "old.json").write_text(json.dumps({**result, "format": 0}), encoding="utf-8")
    assert_one_line(report("old.json"), "result format 0")


@pytest.mark.parametrize("name", ["bench", "report"])
def test_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"Example: falcon-hf {name} " in " ".join(result.output.split())
    if name == "bench":
        assert "out-of-domain/law" in " ".join(result.output.split())


def test_sets_turns_batches_and_pictures(command: Command, tmp_path: Path) -> None:
    """Every new option at once: a named set, two methods of one kind, batches, plots, and a sheet without pairs."""
    methods = "plain,falcon,wide=falcon:tree=paper"
    result = command(questions="out-of-domain/law", methods=methods, batch_size=2, turns=1, num_questions=4)
    assert result.exit_code == 0, result.output
    content = json.loads(Path("result.json").read_text(encoding="utf-8"))
    assert list(content["summary"]) == ["plain", "falcon", "wide"]
    assert content["summary"]["wide"]["identical"] == 4
    drawn = report("result.json", "--plots", "plots")
    assert drawn.exit_code == 0, drawn.output
    assert len(list(Path("plots").iterdir())) == 4
    assert_one_line(report("result.json", "--sheet", "sheet.html"), "--sheet takes one result, and --questions")
    nothing = report("result.json", "--sheet", "sheet.html", "--questions", "out-of-domain/law")
    assert_one_line(nothing, "Every text is plain's")
    assert not Path("sheet.html").exists()
