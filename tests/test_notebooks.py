"""Notebooks: their code parses, and what they import from falcon_hf is there."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code(path: Path) -> str:
    """All code cells, without shell and magic lines."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    lines = [line if not line.strip().startswith(("!", "%")) else f"{line[: len(line) - len(line.lstrip())]}pass"
             for line in text.splitlines()]  # fmt: skip
    return "\n".join(lines)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_train_a_drafter",
        "03_trees",
        "04_benchmark",
        "05_publish_and_load",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_imported_exists(path: Path) -> None:
    found = 0
    for node in ast.walk(ast.parse(code(path))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("falcon_hf"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{path.name}: from {node.module} import {name.name}"
                found += 1
    assert found > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_of_a_whole_run(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) > len(cells) // 2
    assert not [output for output in outputs if output["output_type"] == "error"]
