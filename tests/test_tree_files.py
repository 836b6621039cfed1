"""Trees from files of ours, of Medusa and EAGLE, and of upstream Falcon."""

from __future__ import annotations

import json

import pytest

from falcon_hf import TreeShape
from falcon_hf.bench.draft_trees import read_tree as read_config_tree
from falcon_hf.bench.errors import BenchError
from falcon_hf.tree_files import TreeFileError, read_tree

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
        ("a.json", "3", "neither a list"),
        ("a.json", "[[0, 0]]", "not its parent"),
        ("a.json", '{"kind": "dynamic"}', "has kind 'dynamic' and nodes"),
        ("a.json", "[]", "at least one path"),
        ("a.json", "[[-1]]", "ranks from 0 on"),
        ("a.json", "[[0.5]]", "ranks from 0 on"),
        ("a.json", "nonsense", "cannot be used"),
    ],
)
def test_what_is_no_tree_is_refused(tmp_path, name, text, message):
    with pytest.raises(TreeFileError, match=message):
        read_tree(write(tmp_path, name, text))


def test_absent_files_and_names_are_refused(tmp_path):
    with pytest.raises(TreeFileError, match=r"none.json cannot be used: No such file"):
        read_tree(tmp_path / "none.json")
    with pytest.raises(TreeFileError, match="no tree 'b', but a"):
        read_tree(write(tmp_path, "a.py", "a = [[0]]\n"), "b")


def test_dynamic_trees(tmp_path):
    entry = {"kind": "dynamic", "nodes": 7, "passes": 1}
    assert read_tree(write(tmp_path, "a.json", json.dumps(entry))) == entry
    assert read_tree(write(tmp_path, "b.json", json.dumps({"tree": entry, "format": "x"}))) == entry


def test_the_commands_tree_option_reads_them_all(tmp_path):
    """``--tree`` of train and bench, and bench's ``falcon:tree=FILE``."""
    upstream = write(tmp_path, "choices.py", UPSTREAM)
    assert read_config_tree(f"{upstream}#other") == [[0], [0, 0]]
    assert len(read_config_tree(f"{upstream}#small_2layer")) == 7
    assert len(read_config_tree(str(write(tmp_path, "eagle.py", EAGLE)))) == 7
    assert len(read_config_tree(str(write(tmp_path, "medusa.py", MEDUSA)))) == 4
    entry = {"kind": "dynamic", "nodes": 7}
    assert read_config_tree(str(write(tmp_path, "dynamic.json", json.dumps(entry)))) == entry
    with pytest.raises(BenchError, match=r"several trees; name one of other, small_2layer, as FILE.py#NAME"):
        read_config_tree(str(upstream))
