"""Trees from files of ours, of Medusa and EAGLE, and of upstream Falcon; and into a drafter's config."""

from __future__ import annotations

import json

import pytest

from falcon_hf import FalconDrafter, TreeShape
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.tree_files import read_tree, write_drafter_tree

# In upstream's form (Bestpay-inc/Falcon, models/choices.py): paths repeated, a parent missing, other variables around.
UPSTREAM = """
import torch
small_2layer = [
    [0],[1],

    [0,0],[0,1],
    [0,0],
    [2,0,0],
]
other = [[0], [0, 0]]
default = small_2layer
sizes = [1, 2]
layers = [torch.nn.Linear(1, 1)]
print("never run")
"""
EAGLE = "mc_sim_7b_63 = [[0],[1],[2],[0,0],[0,1],[1,0],[0,0,0]]\n"
MEDUSA = "medusa = [(0,), (0, 0), (1,), (0, 1)]\n"


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_upstreams_lists(tmp_path, capsys):
    path = write(tmp_path, "choices.py", UPSTREAM)
    shape = read_tree(path, "small_2layer")
    assert shape == TreeShape.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [2, 0, 0]])
    assert read_tree(path, "other").size == 3
    assert capsys.readouterr().out == "", "the file was run"


@pytest.mark.parametrize(("text", "size"), [(EAGLE, 8), (MEDUSA, 5)])
def test_eagle_and_medusa_lists(tmp_path, text, size):
    assert read_tree(write(tmp_path, "choices.py", text)).size == size


@pytest.mark.parametrize("text", ["[[0], [0, 0]]", '{"tree": [[0], [0, 0]], "other": 1}'])
def test_json(tmp_path, text):
    assert read_tree(write(tmp_path, "tree.json", text)).paths == ((0,), (0, 0))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "a = [[0]]\nb = [[1]]\n", "several trees; name one of a, b"),
        ("a.py", "x = 1\n", "no list of paths"),
        ("a.py", "x = [[0]\n", "cannot be used"),
        ("a.py", "x = [[]]\n", "non-empty list"),
        ("a.json", '{"trees": []}', "neither a list"),
        ("a.json", "[]", "at least one path"),
        ("a.json", "[[-1]]", "ranks from 0 on"),
        ("a.json", "[[0.5]]", "ranks from 0 on"),
        ("a.json", "nonsense", "cannot be used"),
    ],
)
def test_what_is_no_tree_is_refused(tmp_path, name, text, message):
    with pytest.raises(TuningError, match=message):
        read_tree(write(tmp_path, name, text))


def test_absent_files_and_names_are_refused(tmp_path):
    with pytest.raises(TuningError, match="cannot be read"):
        read_tree(tmp_path / "none.json")
    with pytest.raises(TuningError, match="no tree 'b', but a"):
        read_tree(write(tmp_path, "a.py", "a = [[0]]\n"), "b")


def test_a_drafter_gets_the_tree_and_nothing_else_changes(tmp_path, tiny_target, tiny_drafter):
    tiny_drafter(tiny_target(), 2).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    shape = TreeShape.from_paths([[0], [3], [0, 1]])
    write_drafter_tree(tmp_path, shape)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("tree") == [[0], [3], [0, 1]]
    assert after == {key: value for key, value in before.items() if key != "tree"}
    assert FalconDrafter.from_pretrained(tmp_path).config.tree == [[0], [3], [0, 1]]


def test_other_folders_get_no_tree(tmp_path, tiny_target):
    shape = TreeShape.from_paths([[0]])
    with pytest.raises(TuningError, match="no drafter's folder"):
        write_drafter_tree(tmp_path, shape)
    tiny_target().config.save_pretrained(tmp_path)
    with pytest.raises(TuningError, match="holds no Falcon drafter"):
        write_drafter_tree(tmp_path, shape)
