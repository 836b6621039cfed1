"""Calls of ``generate()`` in several threads that share a target and a drafter: each gets its own text."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from .families import VOCAB
from .helpers import bushy_tree, prompt_ids
from .test_dynamic_tree import SPEC

THREADS, CALLS = 4, 12
TREES: dict[str, dict[str, Any]] = {
    "static": {"tree": bushy_tree(VOCAB, 3, 12)},
    "dynamic": {"tree": SPEC, "lookup": {}},
    "auto-off": {"tree": SPEC, "auto_off": True},
}


@pytest.mark.parametrize("kind", TREES)
def test_each_call_gets_its_own_text(tiny_target, tiny_drafter, kind):
    target = copy.deepcopy(tiny_target(VOCAB))
    drafter = tiny_drafter(target, 2, "linear", **TREES[kind])
    prompts = [prompt_ids(VOCAB, 4 + number, number) for number in range(CALLS)]
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    plain = [target.generate(ids, **options).tolist() for ids in prompts]

    def answer(ids: torch.Tensor) -> list[list[int]]:
        found: list[list[int]] = target.generate(ids, assistant_model=drafter, **options).tolist()
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(answer, prompts)) == plain
    assert len({str(text) for text in plain}) == CALLS
    modules = [*target.modules(), *drafter.modules()]
    assert all("forward" not in vars(module) for module in modules)
