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
from falcon_hf.cli.answer import Answer
from falcon_hf.cli.demo import DEFAULT_PROMPT, _compare, _sentence
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


def test_shows_both_texts_and_the_figures(demo: Demo) -> None:
    result = demo("--prompt", PROMPT, "--threads", 2)
    assert result.exit_code == 0, result.output
    found = json.loads(demo("--prompt", PROMPT, "--json").stdout)
    shown = " ".join(result.stdout.split())
    assert shown.startswith(PROMPT)
    assert shown.count(" ".join(found["falcon"]["text"].split())) == 2
    headings = ("tokens/s", "speedup", "tau", "with bonus", "alpha")
    assert all(heading in result.stdout for heading in headings)
    assert re.search(r"^plain +[\d.]+ +1\.00 ", result.stdout, re.MULTILINE)
    figures = re.search(r"^Falcon +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", result.stdout, re.MULTILINE)
    assert figures is not None
    statistics = found["falcon"]["statistics"]  # counts, unlike times, are the same in every run
    assert [float(figure) for figure in figures.groups()[2:]] == [
        round(statistics[name], 2) for name in ("tau", "tau_with_bonus", "alpha")
    ]
    assert re.search(r"\d+ rounds of \d+ ms: draft \d+, verify \d+, other [\d.]+\. float32, 2 CPU threads\.", shown)
    assert shown.endswith("The two texts are identical, all 24 tokens.")


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
    assert demo().exit_code == 0
    plain, falcon = pieces
    assert plain == falcon
    assert len(plain) > 2


def test_json_is_one_object_and_nothing_else(demo: Demo, repos: Path) -> None:
    result = demo("--json", "--threads", 1)
    found = json.loads(result.stdout)  # fails on anything before or after
    assert found["prompt"] == DEFAULT_PROMPT
    assert (found["dtype"], found["threads"], found["drafter"]) == ("float32", 1, str(repos / "drafter"))
    assert found["identical"] is True
    assert found["first_difference"] is None
    assert found["plain"]["text"] == found["falcon"]["text"]
    assert found["plain"]["new_tokens"] == found["falcon"]["new_tokens"] == 24
    assert found["speedup"] == found["falcon"]["tokens_per_second"] / found["plain"]["tokens_per_second"]
    assert found["falcon"]["statistics"]["rounds"] > 0


@pytest.fixture
def parted(repos: Path) -> Callable[[str], dict[str, Any]]:
    """``parted(dtype)``: the verdict on two texts that differ in their third token."""

    def verdict(dtype: str) -> dict[str, Any]:
        target = AutoModelForCausalLM.from_pretrained(repos / "target", dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(repos / "target")
        plain, falcon = (Answer(tokenizer(text).input_ids, text, 4, 1.0, None) for text in ("abcd", "abxd"))
        return _compare(plain, falcon, target, tokenizer, tokenizer("Name", return_tensors="pt"))

    return verdict


def test_a_difference_names_its_place_and_tokens(parted: Callable[[str], dict[str, Any]]) -> None:
    verdict = parted("bfloat16")
    assert verdict["identical"] is False
    difference = verdict["first_difference"]
    assert (difference["token"], difference["plain"], difference["falcon"]) == (3, "c", "x")
    # Two letters of a random model are no tie.
    assert difference["rounding_units"] > 8
    assert "please report" in _sentence(24, verdict, "bfloat16, 2 CPU threads")


def test_only_a_tie_in_half_precision_is_explained_by_rounding(parted: Callable[[str], dict[str, Any]]) -> None:
    verdict = parted("bfloat16")
    verdict["first_difference"] |= {"logit_gap": -0.125, "rounding_units": 1.0}
    sentence = _sentence(24, verdict, "bfloat16, 2 CPU threads")
    assert "token 3: 'c' without the drafter, 'x' with it" in sentence
    assert "0.12 apart" in sentence
    assert "rounding" in sentence
    assert "please report" not in sentence
    assert "please report" in _sentence(24, verdict, "float32, 2 CPU threads")


def test_a_text_that_ends_first_is_a_difference(repos: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(repos / "target")
    plain, falcon = (Answer(tokenizer(text).input_ids, text, 4, 1.0, None) for text in ("abc", "ab"))
    verdict = _compare(plain, falcon, None, tokenizer, {})
    assert verdict["first_difference"] == {"token": 3, "plain": "c", "falcon": "the end"}
    assert "please report" in _sentence(3, verdict, "bfloat16, 2 CPU threads")


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
    assert_refused(demo("--prompt", "  "), "prompt is empty")
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
    assert found["identical"] is True
    assert found["falcon"]["new_tokens"] == 40
    assert "blue" in found["falcon"]["text"]
    assert found["falcon"]["statistics"]["tau"] > 0.2  # random weights: 0.0
    assert "Traceback" not in done.stderr


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"falcon-hf {__version__}\n"


@pytest.mark.parametrize("command", ["demo", "generate", "bench", "report"])
def test_every_command_has_an_example_in_its_help(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: falcon-hf {command} " in result.stdout
    assert command in run("--help").stdout
