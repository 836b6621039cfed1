"""Pictures: what is drawn is what was given."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import pytest

from falcon_hf import TreeShape
from falcon_hf.tuning.acceptance import ParametricAcceptance
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.pictures import draw_lines, draw_sweep, draw_tree, save

SHAPE = TreeShape.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def test_tree_shows_every_node_with_its_chance():
    model = ParametricAcceptance(2, 4, 0.6)
    figure = draw_tree(SHAPE, model.score, title="a tree")
    axes = figure.axes[0]
    shown = [text.get_text() for text in axes.texts]
    for path in SHAPE.paths:
        assert f"{model.score(path):.2f}" in shown
    (points,) = axes.collections
    assert len(points.get_offsets()) == SHAPE.size
    assert sorted(-points.get_offsets()[:, 1]) == sorted(SHAPE.depths)
    assert points.get_array().tolist() == [1.0, *(model.score(path) for path in SHAPE.paths)]
    assert len(axes.lines) == SHAPE.size - 1, "one edge a node below the root"
    assert axes.get_title() == "a tree"


def test_no_two_nodes_of_a_depth_share_a_place():
    figure = draw_tree(TreeShape.paper(2), lambda path: 0.5)
    places = figure.axes[0].collections[0].get_offsets().tolist()
    assert len({tuple(place) for place in places}) == TreeShape.paper(2).size


def test_tree_takes_a_mapping_and_labels():
    figure = draw_tree(SHAPE, dict.fromkeys(SHAPE.paths, 0.25), labels=["the", *"abcdefg"])
    assert {"the", "a", "g", "0.25"} <= {text.get_text() for text in figure.axes[0].texts}


def test_saved_as_svg_and_png(tmp_path):
    svg, png = save(draw_tree(SHAPE, lambda path: 0.5), tmp_path / "new" / "tree")
    assert ET.parse(svg).getroot().tag.endswith("svg")
    assert png.read_bytes().startswith(b"\x89PNG")


def entry(k, m, nodes, speedup):
    own = {"speedup": speedup, "tokens_per_second": 10 * speedup}
    return {
        "drafter": f"k{k}", "block_size": k, "passes": m, "nodes": nodes, "measured": own,
        "predicted": {name: 2 * value for name, value in own.items()},
    }  # fmt: skip


def test_sweep_is_one_heat_map_a_block_size():
    check = {"settings": [entry(2, 1, 8, 1.5), entry(2, 1, 16, 1.25), entry(2, 2, 8, 1.75), entry(3, 1, 8, 0.5)]}
    figure = draw_sweep(check)
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["k = 2", "k = 3"]
    table = maps[0].images[0].get_array()
    assert table.tolist() == [[1.5, 1.25], [1.75, None]], "a cell that was not measured stays empty"
    predicted = draw_sweep(check, "tokens_per_second", "predicted")
    assert predicted.axes[0].images[0].get_array()[0, 0] == 30
    with pytest.raises(TuningError, match="no settings"):
        draw_sweep({"settings": []})


def test_lines():
    figure = draw_lines({"7B": [(0.1, 1.0), (0.9, 3.0)]}, "x", "y", "t")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1.0, 3.0]


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TuningError, match=r"pip install 'falcon_hf\[tune\]'"):
        draw_lines({"a": [(0, 1)]}, "x", "y")
