"""The documentation's claims: tests that it cites, code that it shows, and options that it names exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from falcon_hf.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def names(path: Path) -> set[str]:
    """Functions and classes of a file, methods included."""
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in found if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def cited() -> list[tuple[str, str]]:
    """(file, test) of each test that the questions cite."""
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


def test_cited_tests_exist() -> None:
    assert len(cited()) > 25
    for file, test in cited():
        assert test in names(ROOT / file), f"docs/faq.md cites {file}::{test}"


def test_every_answer_cites_a_test() -> None:
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    questions = re.split(r"^\*\*", text, flags=re.MULTILINE)[1:]
    assert len(questions) > 20
    for question in questions:
        assert "`tests/" in question, question.partition("**")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_compiles_and_commands_know_their_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(code)
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.match(r"falcon-hf (\w+)", line)
            if command is not None:
                shown = CliRunner().invoke(app, [command[1], "--help"], env={"COLUMNS": "200"})
                assert shown.exit_code == 0, line
                for option in re.findall(r"(?<=\s)--[a-z-]+", line):
                    assert option in shown.output, f"{page.name}: {line}"


def test_tables_of_commands_are_their_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below ``<!-- from: COMMAND -->`` each row is a line of what the command prints: simulated, or of a kept check."""
    monkeypatch.chdir(ROOT)
    blocks = [block for page in PAGES for block in re.findall(r"<!-- from: (.*?) -->\n((?:\|.*\n)+)", page.read_text())]
    assert blocks
    for command in {command for command, _ in blocks}:
        shown = CliRunner().invoke(app, command.split()[1:])
        assert shown.exit_code == 0, command
        lines = shown.output.splitlines()
        rows = [row for other, block in blocks if other == command for row in block.splitlines()]
        assert [row for row in rows if row not in lines] == [], command


def test_links_to_pictures_and_their_code() -> None:
    for page in PAGES:
        for picture in re.findall(r"\]\((pictures/[^)]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / "docs" / picture).is_file()
    drawn = re.findall(r'save\(figure, "(\w+)"\)', (ROOT / "docs" / "pictures" / "draw.py").read_text(encoding="utf-8"))
    assert {path.stem for path in (ROOT / "docs" / "pictures").glob("*.svg")} == set(drawn)


def texts(picture: Path) -> list[str]:
    """All that is written in a picture: titles, numbers, labels of the axes."""
    root = ElementTree.parse(picture).getroot()
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_pictures_are_drawn_from_todays_code_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of new results or a changed tree the old pictures would say something else; shapes alone are not compared."""
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "pictures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.draw_all()
    for kept in sorted((ROOT / "docs" / "pictures").glob("*.svg")):
        assert len(texts(kept)) > 10
        assert texts(kept) == texts(tmp_path / kept.name), f"{kept.name} is of another state: run docs/pictures/draw.py"
