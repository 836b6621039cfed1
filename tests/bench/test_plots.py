"""Plots: one file for each thing a result knows, and the right numbers in them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from falcon_hf.bench import plots
from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.plots import slugs, write_plots
from falcon_hf.bench.summary import summarise

from .test_report import result  # noqa: F401 - a fixture

PNG = b"\x89PNG"


@pytest.fixture
def whole(result: dict[str, Any]) -> dict[str, Any]:  # noqa: F811
    """A result that every plot can be drawn from."""
    for run in result["runs"]:
        run["category"] = "maths" if run["question_id"] == 81 else "code"
        if run["method"] == "falcon":
            run["accepted"] = [2, 1, 0, 1]
    result["summary"] = summarise(result["runs"], ["plain", "falcon", "prompt_lookup"])
    return result


def test_a_file_a_plot(whole: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(whole)
    other["settings"]["target"]["dtype"] = "float32"
    drawn = write_plots([whole, other], tmp_path / "plots")
    titles = ("speed-by-task", "acceptance-by-depth", "round-time", "speed-against-length")
    stems = ("mt_bench-bfloat16-greedy", "mt_bench-float32-greedy")
    assert [path.name for path in drawn] == [f"{stem}-{title}.png" for stem in stems for title in titles]
    assert all(path.read_bytes().startswith(PNG) for path in drawn)


def test_runs_have_files_of_their_own() -> None:
    """Whatever their names are written in, and however long they are."""
    long = "q" * 300
    found = slugs(
        ["数学, float32, greedy", "诗歌, float32, greedy", "a, b", "A b", "a-b-2", f"{long}1", f"{long}2", "数" * 99]
    )
    assert found[:2] == ["数学-float32-greedy", "诗歌-float32-greedy"]
    assert found[2:5] == ["a-b", "A-b-2", "a-b-2-2"]
    assert len(set(found)) == 8
    assert all(len(f"{slug}-speed-against-length.png".encode()) <= 255 for slug in found)


def test_bars_are_the_medians(whole: dict[str, Any]) -> None:
    (axes,) = plots.speed_by_task(whole, "name").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "maths", "code"]
    bars = [round(bar.get_width(), 6) for bar in axes.patches]
    assert bars == [1.8, 2.0, 1.6, 0.5, 0.5, 0.5]  # falcon's, then prompt lookup's, which loses and is shown


def test_lines_are_the_shares(whole: dict[str, Any]) -> None:
    (axes,) = plots.acceptance_by_depth(whole, "name").axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [0.75, 0.25]
    assert line.get_label() == "falcon (tau 1.00)"


def test_phases_fill_the_round(whole: dict[str, Any]) -> None:
    (axes,) = plots.round_time(whole, "name").axes
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [50, 100, 25, 15, 10]
    assert [round(bar.get_x(), 6) for bar in axes.patches] == [0, 50, 150, 175, 190]


def test_points_are_the_questions(whole: dict[str, Any]) -> None:
    (axes,) = plots.speed_against_length(whole, "name").axes
    points = axes.collections[0].get_offsets().tolist()
    assert points == [[13, 2.0], [13, 1.6]]


def test_what_is_not_known_is_not_drawn(whole: dict[str, Any], tmp_path: Path) -> None:
    for run in whole["runs"]:
        run.pop("accepted", None)
    assert plots.acceptance_by_depth(whole, "name") is None
    whole["runs"] = [run for run in whole["runs"] if run["method"] == "plain"]
    whole["summary"] = summarise(whole["runs"], ["plain"])
    with pytest.raises(BenchError, match="nothing to draw"):
        write_plots([whole], tmp_path)


def test_unwritable_folder(whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written: "):
        write_plots([whole], tmp_path / "file")


def test_without_matplotlib(whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BenchError, match=r"pip install 'falcon_hf\[bench\]'"):
        write_plots([whole], tmp_path)
