"""A tree into a drafter's config."""

from __future__ import annotations

import json

import pytest

from falcon_hf import FalconDrafter, TreeShape
from falcon_hf.runtime.dynamic_tree import DynamicTree
from falcon_hf.runtime.machine_trees import MachineTrees
from falcon_hf.tuning.drafter_tree import drafter_config, write_drafter_tree
from falcon_hf.tuning.errors import TuningError


def test_a_drafter_gets_the_tree_and_nothing_else_changes(tmp_path, tiny_target, tiny_drafter):
    tiny_drafter(tiny_target(), 2).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    shape = TreeShape.from_paths([[0], [3], [0, 1]])
    write_drafter_tree(tmp_path, shape)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("tree") == [[0], [3], [0, 1]]
    assert after == {key: value for key, value in before.items() if key != "tree"}
    assert FalconDrafter.from_pretrained(tmp_path).config.tree == [[0], [3], [0, 1]]


def test_look_up_comes_with_a_dynamic_tree_and_goes_with_a_static_one(tmp_path, tiny_target, tiny_drafter):
    tiny_drafter(tiny_target(), 2).save_pretrained(tmp_path)
    dynamic = {"kind": "dynamic", "nodes": 5}

    def written(*arguments):
        write_drafter_tree(tmp_path, *arguments)
        config = FalconDrafter.from_pretrained(tmp_path).config
        return config.tree, config.lookup

    assert written(dynamic, {"acceptance": [0.2, 0.9]}) == (dynamic, {"acceptance": [0.2, 0.9]})
    assert written({**dynamic, "nodes": 6}) == ({**dynamic, "nodes": 6}, {"acceptance": [0.2, 0.9]})
    for static in ([[0], [1]], TreeShape.from_paths([[0], [1]])):
        write_drafter_tree(tmp_path, dynamic, {})
        assert written(static, {"length": 3}) == ([[0], [1]], None)
    write_drafter_tree(tmp_path, dynamic, {"length": 4, "min_match": 3, "acceptance": [0.5]})
    assert written(dynamic, {"acceptance": [0.2, 0.9]})[1] == {"length": 4, "acceptance": [0.2, 0.9]}


FIELDS = {"passes": 1, "width": 1, "candidates": 4}
SMALL, LARGE, LARGER = ({"kind": "dynamic", "nodes": nodes, **FIELDS} for nodes in (5, 16, 24))


def test_trees_of_both_kinds_of_machine_stand_side_by_side(tmp_path, tiny_target, tiny_drafter):
    tiny_drafter(tiny_target(), 2).save_pretrained(tmp_path)

    def written(tree, **options):
        assert write_drafter_tree(tmp_path, tree, {}, **options) == drafter_config(tmp_path)["tree"]
        return FalconDrafter.from_pretrained(tmp_path).config.tree

    first = {**SMALL, "batch_nodes": [[2, 3]]}
    assert written(first, dear=True, beside=True) == first, "beside the paper's tree there is nothing to keep"
    assert written(LARGE, dear=False) == LARGE, "a tree for all machines gives way to one"
    assert written(first, dear=True) == first
    second = MachineTrees.from_config(written({**LARGE, "pass_cost": 0.1}, dear=False, beside=True), 2)
    assert second.where(dear=True) == DynamicTree.from_config(first, 2)
    assert second.where(dear=False) == DynamicTree.from_config({**LARGE, "pass_cost": 0.1}, 2)
    third = MachineTrees.from_config(written(LARGER, dear=False), 2)
    assert (third.where(dear=False), third.where(dear=True)) == (DynamicTree.from_config(LARGER, 2), second.dear_rows)
    both = written({**SMALL, "nodes": 4}, dear=True)
    fourth = MachineTrees.from_config(both, 2)
    assert (fourth.cheap_rows, fourth.dear_rows.nodes, fourth.dear_rows.batch_nodes) == (third.cheap_rows, 4, ())
    assert written(LARGE) == LARGE, "of no kind of machine in particular"
    assert written(both, dear=True) == both, "an entry of both kinds is taken as it is"
    assert written({**both, "dear_rows": {"nodes": 2}}, dear=True)["dear_rows"] == {"nodes": 2}


def test_other_folders_get_no_tree(tmp_path, tiny_target):
    shape = TreeShape.from_paths([[0]])
    with pytest.raises(TuningError, match="no drafter's folder"):
        write_drafter_tree(tmp_path, shape)
    tiny_target().config.save_pretrained(tmp_path)
    with pytest.raises(TuningError, match="holds no Falcon drafter"):
        write_drafter_tree(tmp_path, shape)
