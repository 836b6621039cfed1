"""``falcon-hf demo``, ``--version`` and ``--help``: on a tiny chat model, and once on the real pair."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from falcon_hf import __version__
from falcon_hf.cli import app
from falcon_hf.cli.answer import Answer
from falcon_hf.cli.answer_pair import AnswerPair, compare
from falcon_hf.cli.demo import DEFAULT_PROMPTS, _shortened
from falcon_hf.cli.loading import DEMO_DRAFTER, find_demo_drafter

from .conftest import Run, assert_refused

PROMPT = "Name [bold] birds of prey."
Demo = Callable[..., Result]


@pytest.fixture
def demo(repos: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """``demo(...)``: the command with the tiny pair instead of the real one; ``drafter=None`` leaves it to be found."""

    def load_tiny(dtype: torch.dtype) -> tuple[Any, Any]:
        target = AutoModelForCausalLM.from_pretrained(repos / "target", dtype=dtype)
        return target, AutoTokenizer.from_pretrained(repos / "target")

    monkeypatch.setattr("falcon_hf.cli.loading.load_demo_target", load_tiny)

    def start(*arguments: Any, drafter: Any = "drafter") -> Result:
        source = () if drafter is None else ("--drafter", repos / drafter)
        return run("demo", "--dtype", "float32", "--max-new-tokens", 24, *source, *arguments)

    return start


def rows_of(shown: str, prompts: list[str]) -> list[list[str]]:
    """The table's figures for each prompt."""
    lines = [next(line for line in shown.splitlines() if line.startswith(_shortened(one) + "  ")) for one in prompts]
    return [line[len(_shortened(one)) :].split() for line, one in zip(lines, prompts, strict=True)]


def test_shows_both_texts_and_the_figures(demo: Demo) -> None:
    result = demo("--prompt", PROMPT, "--threads", 2)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(demo("--prompt", PROMPT, "--json").stdout)["answers"]
    shown = " ".join(result.stdout.split())
    assert shown.startswith(PROMPT)
    assert shown.count(" ".join(found["falcon"]["text"].split())) == 2
    assert all(heading in result.stdout for heading in ("tokens/s", "speedup", "tau", "bonus", "alpha"))
    (figures,) = rows_of(result.stdout, [PROMPT])
    statistics = found["falcon"]["statistics"]  # counts, unlike times, are the same in every run
    assert [float(figure) for figure in figures[3:]] == [
        round(statistics[name], 2) for name in ("tau", "tau_with_bonus", "alpha")
    ]
    plain, falcon, speedup = (float(figure.removesuffix("x")) for figure in figures[:3])
    lowest, highest = (falcon - 0.05) / (plain + 0.05), (falcon + 0.05) / (plain - 0.05)  # as they are shown, rounded
    assert lowest - 0.005 <= speedup <= highest + 0.005
    assert "together" not in result.stdout
    assert re.search(r"\d+ rounds of \d+ ms: draft \d+, verify \d+, other [\d.]+\. float32, 2 CPU threads\.", shown)
    assert shown.endswith("The two texts are identical, all 24 tokens.")


def test_several_prompts_have_a_row_each_and_one_together(demo: Demo) -> None:
    prompts = [PROMPT, "And a second prompt, which is too long to be shown whole."]
    asked = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    result = demo(*asked)
    assert result.exit_code == 0, result.output
    found = json.loads(demo(*asked, "--json").stdout)
    taus = [float(figures[3]) for figures in rows_of(result.stdout, prompts)]
    assert taus == [round(answer["falcon"]["statistics"]["tau"], 2) for answer in found["answers"]]
    assert re.search(r"^together +[\d.]+x *$", result.stdout, re.MULTILINE)
    assert " ".join(result.stdout.split()).endswith("Both texts of every prompt are identical, all 48 tokens.")
    seconds = {name: sum(answer[name]["seconds"] for answer in found["answers"]) for name in ("plain", "falcon")}
    assert found["speedup"] == pytest.approx(seconds["plain"] / seconds["falcon"])  # as many tokens


def test_both_texts_are_streamed_alike(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[list[str]] = []

    class Recorder:
        def __init__(self, *_: Any) -> None:
            pieces.append([])

        def write(self, text: str) -> None:
            pieces[-1].append(text)

        def end(self) -> None:
            pieces[-1].append("end")

    monkeypatch.setattr("falcon_hf.cli.demo.WordWrapper", Recorder)
    assert demo("--prompt", PROMPT).exit_code == 0
    plain, falcon = pieces
    assert plain == falcon
    assert len(plain) > 2


def test_json_is_one_object_and_nothing_else(demo: Demo, repos: Path) -> None:
    result = demo("--json", "--threads", 1)
    found = json.loads(result.stdout)  # fails on anything before or after
    assert (found["dtype"], found["threads"], found["drafter"]) == ("float32", 1, str(repos / "drafter"))
    assert [answer["prompt"] for answer in found["answers"]] == list(DEFAULT_PROMPTS)
    for answer in found["answers"]:
        assert answer["identical"] is True
        assert answer["first_difference"] is None
        assert answer["plain"]["text"] == answer["falcon"]["text"]
        assert answer["plain"]["new_tokens"] == answer["falcon"]["new_tokens"] == 24
        assert answer["speedup"] == answer["falcon"]["tokens_per_second"] / answer["plain"]["tokens_per_second"]
        assert answer["falcon"]["statistics"]["rounds"] > 0


@pytest.fixture
def parted(repos: Path) -> Callable[[str], AnswerPair]:
    """``parted(dtype)``: two texts that differ in their third token."""

    def pair(dtype: str) -> AnswerPair:
        target = AutoModelForCausalLM.from_pretrained(repos / "target", dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(repos / "target")
        plain, falcon = (Answer(tokenizer(text).input_ids, text, 4, 1.0, None) for text in ("abcd", "abxd"))
        difference = compare(plain, falcon, target, tokenizer, tokenizer("Name", return_tensors="pt"))
        return AnswerPair("Name", plain, falcon, difference)

    return pair


def test_a_difference_names_its_place_and_tokens(parted: Callable[[str], AnswerPair]) -> None:
    pair = parted("bfloat16")
    difference = pair.difference
    assert difference is not None
    assert (difference["token"], difference["plain"], difference["falcon"]) == (3, "c", "x")
    # Two letters of a random model are no tie.
    assert difference["rounding_units"] > 8
    assert "please report" in pair.sentence(half_precision=True)


def test_only_a_tie_in_half_precision_is_explained_by_rounding(parted: Callable[[str], AnswerPair]) -> None:
    pair = parted("bfloat16")
    assert pair.difference is not None
    pair.difference |= {"logit_gap": -0.125, "rounding_units": 1.0}
    sentence = pair.sentence(half_precision=True)
    assert "token 3: 'c' without the drafter, 'x' with it" in sentence
    assert "0.12 apart" in sentence
    assert "rounding" in sentence
    assert "please report" not in sentence
    assert "please report" in pair.sentence(half_precision=False)


def test_a_text_that_ends_first_is_a_difference(repos: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(repos / "target")
    plain, falcon = (Answer(tokenizer(text).input_ids, text, 4, 1.0, None) for text in ("abc", "ab"))
    pair = AnswerPair("Name", plain, falcon, compare(plain, falcon, None, tokenizer, {}))
    assert pair.difference == {"token": 3, "plain": "c", "falcon": "the end"}
    assert "please report" in pair.sentence(half_precision=True)


def test_the_drafter_is_found_in_the_current_folder(
    demo: Demo, repos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falcon_hf.cli.loading.__file__", str(tmp_path / "site-packages/falcon_hf/cli/loading.py"))
    (tmp_path / "hub_cards").mkdir()
    (tmp_path / "hub_cards" / DEMO_DRAFTER).symlink_to(repos / "drafter")
    monkeypatch.chdir(tmp_path)
    assert json.loads(demo("--json", drafter=None).stdout)["drafter"] == str(tmp_path / "hub_cards" / DEMO_DRAFTER)


@pytest.mark.usefixtures("no_hub")
def test_no_drafter_anywhere_names_the_places(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falcon_hf.cli.loading.__file__", str(tmp_path / "site-packages/falcon_hf/cli/loading.py"))
    monkeypatch.chdir(tmp_path)
    assert_refused(demo(drafter=None), f"hub_cards/{DEMO_DRAFTER}", "--drafter")


@pytest.mark.usefixtures("no_hub")
def test_bad_input_is_one_line_before_anything_is_loaded(demo: Demo) -> None:
    assert_refused(demo("--prompt", PROMPT, "--prompt", "  "), "prompt is empty")
    assert_refused(demo("--dtype", "int8"), "--dtype")
    assert_refused(demo(drafter="nothing-here"), "no drafter", "nothing-here")


def test_the_real_pair_in_a_process_of_its_own(smollm2: Any, trained_drafter: Any, tmp_path: Path) -> None:
    del smollm2, trained_drafter  # they are at hand, fetched where need be, before the clock of this test starts
    command = [sys.executable, "-c", "from falcon_hf.cli import main; main()", "demo", "--json", "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "40"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(done.stdout)
    assert found["drafter"] == find_demo_drafter()
    assert "blue" in found["answers"][0]["falcon"]["text"]
    for answer in found["answers"]:
        assert answer["identical"] is True
        assert answer["falcon"]["new_tokens"] == 40
        assert answer["falcon"]["statistics"]["tau"] > 0.2  # random weights: 0.0
    assert "Traceback" not in done.stderr


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"falcon-hf {__version__}\n"


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_every_command_has_an_example_in_its_help(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: falcon-hf {command} " in result.stdout
    assert command in run("--help").stdout
