"""What the commands print, wherever it goes."""

from __future__ import annotations

import io

import pytest

from falcon_hf.cli import main
from falcon_hf.cli.console import print_json


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def version_on(output: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``falcon-hf --version`` as the shell does, with this standard output, which stays."""
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.argv", ["falcon-hf", "--version"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code


def test_what_is_piped_is_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    pipe = io.TextIOWrapper(buffer, encoding="cp1252")  # as on Windows
    version_on(pipe, monkeypatch)
    print_json({"text": "鷹"})
    monkeypatch.undo()
    pipe.flush()
    lines = buffer.getvalue().decode("utf-8").splitlines()
    assert lines[0].startswith("falcon-hf ")
    assert lines[2] == '  "text": "鷹"'


def test_a_terminal_keeps_its_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(io.BytesIO(), encoding="cp1252")
    version_on(terminal, monkeypatch)
    monkeypatch.undo()
    assert terminal.encoding == "cp1252"
