"""A cache that holds the text so far, and the new ids alone: what it holds counts as text, and its positions go on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from falcon_hf.runtime.target_session import cache_key

from .helpers import assert_same_text, bushy_tree, prompt_ids, run
from .test_static_cache import CROPPABLE

VOCAB, PAST, NEW = 24, 12, 4
TREE = bushy_tree(VOCAB, 3, 12)
OPTIONS = {"do_sample": False, "max_new_tokens": 16}


def filled(target: Any, cache: Any) -> Any:
    """The cache with ``PAST`` tokens in it."""
    with torch.no_grad():
        target(prompt_ids(VOCAB, PAST), use_cache=True, **{cache_key(target): cache})
    return cache


def inputs(**further: Any) -> dict[str, Any]:
    """``NEW`` ids behind them, and the mask of all."""
    ids = prompt_ids(VOCAB, PAST + NEW, seed=6)[:, PAST:]
    return {"input_ids": ids, "attention_mask": torch.ones(1, PAST + NEW, dtype=torch.long), **further}


def assert_goes_on(target: Any, drafter: Any, cache: Any, **further: Any) -> None:
    """The same text as plain's, each behind a copy of the cache."""
    caches = ({cache_key(target): copy.deepcopy(cache)} for _ in range(2))
    assert_same_text(target, drafter, inputs(**further), per_call=caches, **OPTIONS)


def assert_refused(target: Any, drafter: Any, cache: Any, message: str) -> None:
    """An error that says ``message``."""
    with pytest.raises(ValueError, match=message):
        run(target, 0, inputs(), assistant_model=drafter, **OPTIONS, **{cache_key(target): cache})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_new_ids_alone(tiny_target, tiny_drafter, attention):
    target = tiny_target(VOCAB, attention=attention)
    drafter = tiny_drafter(target, tree=TREE)
    assert_goes_on(target, drafter, filled(target, DynamicCache(config=target.config)))


@pytest.mark.skipif(not CROPPABLE, reason="this transformers refuses static caches: test_static_cache.py holds that")
def test_a_static_cache_must_hold_the_past_too(tiny_target, tiny_drafter):
    """A size that the new ids and their text would fit in is refused; one for all is used."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, tree=TREE)
    wanted = PAST + NEW + OPTIONS["max_new_tokens"] + len(TREE) + 1
    for size, fits in ((wanted, True), (wanted - 1, False), (wanted - PAST, False)):
        layers = [StaticLayer(max_cache_len=size) for _ in range(target.config.num_hidden_layers)]
        cache = filled(target, Cache(layers=layers))
        cache._is_user_defined = True
        if fits:
            assert_goes_on(target, drafter, cache)
        else:
            assert_refused(target, drafter, cache, f"too small.*max_cache_len={wanted}")


def test_the_past_counts_towards_the_longest_text(tiny_target, tiny_drafter):
    limit = PAST + NEW + OPTIONS["max_new_tokens"]
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for most, fits in ((limit, True), (limit - 1, False)):
        target = tiny_target(VOCAB, rope_parameters=dynamic, max_position_embeddings=most)
        drafter = tiny_drafter(target, tree=TREE)
        cache = filled(target, DynamicCache(config=target.config))
        if fits:
            assert_goes_on(target, drafter, cache)
        else:
            assert_refused(target, drafter, cache, f"Beyond {most} tokens")


def test_positions_of_the_new_ids(tiny_target, tiny_drafter):
    """As behind a cache of which something was thrown away: the text goes on from the user's last position."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, tree=TREE)
    cache = filled(target, DynamicCache(config=target.config))
    later = torch.arange(40, 40 + NEW)[None]
    assert_goes_on(target, drafter, cache, position_ids=later)
    options = {"return_dict_in_generate": True, "output_logits": True, **OPTIONS}
    logits = [
        run(target, 0, given, **options, **{cache_key(target): copy.deepcopy(cache)})[0].logits[1]
        for given in (inputs(), inputs(position_ids=later))
    ]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3, "positions make no difference here"
