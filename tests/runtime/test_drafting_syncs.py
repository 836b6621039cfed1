"""Drafting and keeping wait for the device nowhere: nothing the host or a shape depends on, no numbers copied to it."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_hf import FalconCandidateGenerator
from falcon_hf.runtime import host_values
from falcon_hf.runtime.committed_cache import CommittedCache
from falcon_hf.runtime.committed_pairs import CommittedPairs
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS
from falcon_hf.runtime.rejection import SiblingDraws
from falcon_hf.runtime.target_session import TargetSession

from .helpers import prompt_ids
from .test_candidate_generator import VOCAB, committed
from .test_dynamic_tree import SPEC, calibration

TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]
TREES: dict[str, dict[str, Any]] = {
    "static": {"tree": TREE},
    "drawn": {"tree": TREE, "verifier": "rejection"},
    "dynamic": {"tree": SPEC | {"calibration": calibration(2)}},
    "lookup": {"tree": SPEC, "lookup": {}},
    "pass_cost": {"tree": SPEC | {"pass_cost": 1e-6}},
    "corrected": {"tree": TREE, "correction_rank": 4},
    "corrected dynamic": {"tree": SPEC, "correction_rank": 4},
}


class Syncs(TorchDispatchMode):
    """Counts what would wait for an accelerator.

    Values read on the host, shapes that depend on values, and tensors made of the host's numbers (``torch.tensor``, an
    index that is a list), but for those of ``host_values.py``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal"}:
            self.seen.append(name)
        if name == "lift_fresh" and not any(frame.filename == host_values.__file__ for frame in inspect.stack(0)):
            self.seen.append(name)
        if name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1]):
            self.seen.append("index by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", TREES)
def test_a_draft_makes_no_sync(tiny_target, tiny_drafter, kind, fusion, rows):
    target = tiny_target(VOCAB)
    texts = [committed(target, 12, seed=row) for row in range(rows)]
    features, tokens = (torch.cat([text[part] for text in texts]) for part in (0, 1))
    drafter, lengths = tiny_drafter(target, 2, fusion, **TREES[kind]), [5, 3, 4][:rows]

    def rounds(watch: Any) -> Any:
        generator = FalconCandidateGenerator(drafter, target, rows=rows)
        if kind == "drawn":
            generator.draw_siblings(SiblingDraws(1.0, torch.device("cpu")))
        with torch.no_grad(), watch:
            generator.append(features[:, :5], tokens[:, :5], lengths)
            generator.draft(tokens[:, 4:5], max_depth=9, text=tokens[:, :5])
            generator.append(features[:, 5:7], tokens[:, 5:7], [2, 1, 0][:rows])
            return generator.draft(tokens[:, 6:7], max_depth=9, text=tokens[:, :7])

    rounds(contextlib.nullcontext())  # makes what all calls share
    syncs = Syncs()
    tree = rounds(syncs)
    # One a pass but the last, to leave out passes that would not pay; and an LSTM takes the lengths of a batch's rows.
    expected = ["_local_scalar_dense"] * 4 if kind == "pass_cost" else []
    expected += ["lift_fresh"] * 2 if fusion == "lstm" and rows > 1 else []
    assert sorted(syncs.seen) == sorted(expected)
    assert tree.depths.max() > 2


@pytest.mark.parametrize("rows", [1, 3])
def test_verifying_and_keeping_make_no_sync(tiny_target, tiny_drafter, monkeypatch, rows):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, "linear", tree=TREE)
    seen: list[str] = []

    def watched(own: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            with Syncs() as syncs:
                result = own(*given, **named)
            seen.extend(syncs.seen)
            return result

        return call

    for holder, name in ((TargetSession, "verify"), (CommittedCache, "keep"), (CommittedPairs, "add_round")):
        monkeypatch.setattr(holder, name, watched(getattr(holder, name)))
    ids = prompt_ids(VOCAB, 6).expand(rows, -1)
    target.generate(ids, assistant_model=drafter, do_sample=False, max_new_tokens=24, pad_token_id=0)
    assert drafter.last_generation.accepted > 0
    assert seen == []


def test_verification_draws_without_a_sync():
    draws = SiblingDraws(1.0, torch.device("cpu"))
    p, q, drawn = torch.rand(9).softmax(0), torch.rand(9).softmax(0), torch.tensor([3, 1, 7])
    with Syncs() as syncs:
        draws.choose(p, q, drawn)
    assert syncs.seen == []


@pytest.mark.parametrize(
    "careless",
    [
        lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero(), torch.unique, lambda x: x[[0, 2]],
        lambda x: x + torch.tensor([1, 2, 3], device=x.device),
    ],
)  # fmt: skip
def test_syncs_are_seen(careless):
    with Syncs() as syncs:
        careless(torch.ones(3))
    assert syncs.seen
