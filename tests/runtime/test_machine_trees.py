"""A dynamic tree for each kind of machine: which is used where, and what the config may say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from falcon_hf import FalconDrafterConfig
from falcon_hf.runtime import half_precision
from falcon_hf.runtime.candidate_generator import config_tree, drafter_tree
from falcon_hf.runtime.dynamic_tree import DynamicTree
from falcon_hf.runtime.machine_trees import MachineTrees

from .helpers import assert_same_text
from .test_candidate_generator import VOCAB
from .test_dynamic_tree import calibration

CHEAP = {"nodes": 16, "passes": 3, "width": 3, "batch_nodes": [[2, 9]]}
DEAR = {"nodes": 3, "passes": 1, "batch_nodes": [[2, 2]]}
BOTH = {"kind": "dynamic", "calibration": calibration(2), "cheap_rows": CHEAP, "dear_rows": DEAR}
TEXT = torch.tensor([[3, 1, 4, 1, 5]])


def largest_drafted(target: Any, drafter: Any, rows: int) -> int:
    """Nodes of the largest tree of a generation, which is plain's text."""
    seen: set[int] = set()
    drafter.on_round = lambda tree, paths: seen.add(tree.size - 1)
    assert_same_text(target, drafter, TEXT.expand(rows, -1), max_new_tokens=24, do_sample=False)
    return max(seen)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_machine_gets_its_tree(fast, dtype, tiny_target, tiny_drafter, monkeypatch):
    """A CPU with kernels for bfloat16 has cheap rows if the target is in it; all else on a CPU is dear."""
    monkeypatch.setattr(half_precision, "multiplies_fast", lambda device, dtype: fast or dtype == torch.float32)
    target = copy.deepcopy(tiny_target(VOCAB)).to(dtype)
    drafter = tiny_drafter(target, 2, tree=BOTH).to(dtype)
    cheap = fast and dtype == torch.bfloat16
    for rows, nodes in enumerate((16, 9) if cheap else (3, 2), start=1):
        tree = drafter_tree(drafter, target, rows)
        assert (tree.nodes, tree.passes, tree.size) == (nodes, 3 if cheap else 1, nodes + 1)
        assert tree.calibration is not None
    assert config_tree(drafter.config).size == 17, "what a cache for both needs"


def test_the_tree_that_is_drafted_is_that_one(tiny_target, tiny_drafter, monkeypatch):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=BOTH)
    assert [largest_drafted(target, drafter, rows) for rows in (1, 2)] == [3, 2]
    monkeypatch.setattr("falcon_hf.runtime.candidate_generator.has_dear_rows", lambda device, dtype: False)
    assert [largest_drafted(target, drafter, rows) for rows in (1, 2)] == [16, 9]


def test_one_tree_is_for_all_machines():
    entry = {"kind": "dynamic", "nodes": 8}
    trees = MachineTrees.from_config(entry, 2)
    assert trees.cheap_rows == trees.dear_rows == DynamicTree.from_config(entry, 2)


def test_config_keeps_both(tmp_path):
    FalconDrafterConfig(block_size=2, tree=BOTH, lookup={}).save_pretrained(tmp_path)
    assert FalconDrafterConfig.from_pretrained(tmp_path).tree == BOTH


WRONG = (
    ({"cheap_rows": {"passes": 2}}, "nodes"),
    ({"dear_rows": {"nodes": 0}}, "nodes"),
    ({"dear_rows": 4}, "has both"),
    ({"dear_rows": None}, "has both"),
    ({"nodes": 8}, r"nodes differs by machine here: set it in tree\['cheap_rows'\]"),
    ({"dear_rows": {"nodes": 4, "calibration": None}}, "none of them"),
    ({"dear_rows": {"nodes": 4, "depth": 4}}, "depth"),
)


@pytest.mark.parametrize(("change", "complaint"), WRONG)
def test_what_would_be_ignored_is_an_error(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        FalconDrafterConfig(block_size=2, tree=BOTH | change)


def test_one_kind_alone_is_an_error():
    with pytest.raises(ValueError, match="has both"):
        FalconDrafterConfig(block_size=2, tree={"kind": "dynamic", "nodes": 8, "dear_rows": {"nodes": 4}})


def test_a_field_set_where_it_would_be_ignored_ends_the_call_before_any_token(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=BOTH | {"cheap_rows": dict(CHEAP)})
    drafter.config.tree["nodes"] = 8
    with pytest.raises(ValueError, match="nodes differs by machine"):
        target.generate(TEXT, assistant_model=drafter, max_new_tokens=4, do_sample=False)
