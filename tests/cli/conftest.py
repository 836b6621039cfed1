"""A tiny chat model and its drafter on disk, and the commands as a user types them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner, Result

from falcon_hf.cli import app

from ..bench.tiny import VOCABULARY, byte_tokenizer

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def repos(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Callable[..., Any], tiny_drafter: Callable[..., Any]
) -> Path:
    """``target``, ``bare-target`` (no chat template) and ``drafter`` in one folder: do not change them.

    The target's own generation config samples, as many chat models' do.
    """
    folder = tmp_path_factory.mktemp("repos")
    target = tiny_target(vocab_size=VOCABULARY)
    for name, tokenizer in (("target", byte_tokenizer()), ("bare-target", byte_tokenizer(template=None))):
        target.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        GenerationConfig(do_sample=True, temperature=5.0, top_k=40).save_pretrained(folder / name)
    tiny_drafter(target, tree=[[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]).save_pretrained(folder / "drafter")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("generate", "--target", path, ..., stdin="text")``; the terminal is wide, and no command may fail hard."""
    monkeypatch.setenv("COLUMNS", "200")

    def start(*arguments: Any, stdin: str = "") -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return start


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub cannot be reached, whether this machine could or not."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("falcon_hf.cli.loading.model_info", refuse)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Commands set torch's thread count for the whole process."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, nothing on standard output, and one line on standard error that has all ``words``."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
