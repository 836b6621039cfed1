"""Random configurations of everything at once against plain ``generate()``; each prints its seed when it fails.

``FALCON_HF_FUZZ=2000 pytest -m slow tests/runtime/test_fuzz.py`` runs more of them.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from falcon_hf import TreeShape
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS
from falcon_hf.runtime.target_session import cache_key

from .families import tiny_family
from .helpers import run, with_correction
from .test_batch import VOCAB, batch
from .test_conformance import CHAIN_PAIRS, REFUSED_CELLS
from .test_families import PAIRS
from .test_static_cache import CROPPABLE

RUNS = int(os.environ.get("FALCON_HF_FUZZ", "500"))

PROCESSORS: list[dict[str, Any]] = [
    {},
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [4, 5]]},
    {"min_new_tokens": 5},
    {"prefix_allowed_tokens_fn": lambda row, ids: [1 + row, 2, 3 + int(ids[-1]) % 7, 11, 12]},
    {"sequence_bias": [[[6], -4.0], [[7, 8], 5.0]]},
    {"encoder_repetition_penalty": 1.2},
]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8, "temperature": 1.3},
    {"min_p": 0.1},
    {"typical_p": 0.7},
]


def random_tree(draw: random.Random, block_size: int) -> list[list[int]]:
    """A tree of 1 to 24 nodes below the root, grown at random."""
    if draw.random() < 0.2:
        return [list(path) for path in TreeShape.paper(block_size, root_children=draw.randint(1, 8)).paths]
    paths: list[list[int]] = [[0]]
    for _ in range(draw.randint(0, 23)):
        parent = draw.choice([[], *paths])
        child = [*parent, draw.randint(0, 5)]
        if len(child) <= 9 and child not in paths:
            paths.append(child)
    return paths


def random_dynamic_tree(draw: random.Random) -> dict[str, Any]:
    """A dynamic tree, and in half of the cases a lookup beside it."""
    tree = {
        "kind": "dynamic",
        "nodes": draw.randint(1, 24),
        "passes": draw.randint(1, 3),
        "width": draw.randint(1, 5),
        "candidates": draw.randint(1, 10),
        "continued": draw.randint(1, 5),
        "pass_cost": draw.choice([None, None, 0.1]),
    }
    lookup = {"length": draw.randint(1, 8), "min_match": draw.randint(1, 3)}
    return {"tree": tree, "lookup": draw.choice([None, lookup])}


def draw_case(seed: int) -> dict[str, Any]:
    """Everything about one case, from its seed."""
    draw = random.Random(seed)
    family, attention = draw.choice(PAIRS + CHAIN_PAIRS)
    block_size = draw.randint(1, 4)
    rows = 1 if (family, 4) in REFUSED_CELLS else draw.choice([1, 1, 1, 2, 4])
    caches = ["default", "default", "dynamic", "static"] if CROPPABLE else ["default", "dynamic"]
    caches = [kind for kind in caches if (family, kind) not in REFUSED_CELLS]
    if family == "lfm2":  # a bare dynamic cache has no place for its convolutions
        caches.remove("dynamic")
    options: dict[str, Any] = {"max_new_tokens": draw.randint(1, 24), **draw.choice(PROCESSORS)}
    options |= {"do_sample": True, **draw.choice(SAMPLING)} if draw.random() < 0.4 else {"do_sample": False}
    if draw.random() < 0.5:
        options |= {"eos_token_id": draw.sample(range(1, VOCAB), draw.randint(1, 3)), "pad_token_id": 0}
    return {
        "family": family,
        "attention": attention,
        "block_size": block_size,
        "fusion": draw.choice(FUSIONS),
        "layers": draw.choice([1, 1, 2]),
        "draft_vocabulary": draw.choice([None, 12]),
        "tree": random_dynamic_tree(draw) if draw.random() < 0.4 else {"tree": random_tree(draw, block_size)},
        "lengths": tuple(draw.randint(1, 40) for _ in range(rows)),
        "cache": draw.choice(caches),
        "options": options,
        "correction": draw.choice([None, None, 4]) if block_size > 1 else None,
    }


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
def test_random_configurations(chunk, tiny_drafter):
    accepted = 0
    for seed in range(chunk, RUNS, 10):
        case = draw_case(seed)
        target = tiny_family(case["family"], case["attention"])
        drafter = tiny_drafter(
            target,
            block_size=case["block_size"],
            fusion=case["fusion"],
            auto_off=seed % 5 == 0,
            **case["tree"],
            num_hidden_layers=case["layers"],
            draft_vocab_size=case["draft_vocabulary"],
            intermediate_size=96,
            correction_rank=case["correction"],
        )
        if case["correction"]:
            with_correction(drafter)
        inputs, options = batch(case["lengths"], seed), case["options"]

        def cache_options(kind: str, target: Any = target) -> dict[str, Any]:
            if kind == "dynamic":
                return {cache_key(target): DynamicCache()}
            return {"cache_implementation": "static"} if kind == "static" else {}

        plain, plain_state = run(target, seed, inputs, **options)
        falcon, falcon_state = run(
            target, seed, inputs, assistant_model=drafter, **options, **cache_options(case["cache"])
        )
        assert falcon.tolist() == plain.tolist(), f"seed {seed}: {case}"
        assert torch.equal(falcon_state, plain_state), f"seed {seed} draws otherwise: {case}"
        accepted += drafter.last_generation.accepted
    assert accepted > RUNS // 40  # it was not all plain decoding
