"""Appending in place: the keys and values of concatenation, copied seldom, and only in layers that are understood."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from falcon_hf.runtime import cache_room
from falcon_hf.runtime.cache_room import CacheRoom
from falcon_hf.runtime.target_session import cache_key

from .helpers import prompt_ids, returned_cache

VOCAB = 24


def states(slots: int, seed: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of three heads, keys four and values six numbers wide."""
    generator = torch.Generator().manual_seed(seed)
    widths = (4, 6)
    keys, values = (torch.randn(rows, 3, slots, width, generator=generator) for width in widths)
    return keys, values


def filled_cache(slots: int, layers: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for number in range(layers):
        cache.update(*states(slots, number), number)
    return cache


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """The capacity of each tensor that was made, in slots."""
    made: list[int] = []
    make = cache_room._with_room
    monkeypatch.setattr(cache_room, "_with_room", lambda x, capacity: made.append(capacity) or make(x, capacity))
    return made


def rounds(cache: Any, room: CacheRoom | None, number: int, spoil: Any = None) -> list[torch.Tensor]:
    """Append five slots and keep three, in each round; what attention was given, layer by layer."""
    given = []
    for turn in range(number):
        for layer in range(len(cache.layers)):
            new = states(5, 100 * turn + layer)
            if room is None:
                given += cache.update(*new, layer)
            else:
                with room:
                    given += [x.clone() for x in cache.update(*new, layer)]
        cache.crop(-2)
        if spoil is not None:
            spoil(cache)
    return given


def same(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(these, those, strict=True))


def test_the_same_keys_and_values_as_by_concatenation(copies):
    plain, roomy = filled_cache(40), filled_cache(40)
    wanted, got = rounds(plain, None, 12), rounds(roomy, CacheRoom(roomy, 10_000), 12)
    assert same(got, wanted)
    assert all(torch.equal(x.keys, y.keys) for x, y in zip(roomy.layers, plain.layers, strict=True))
    assert copies == [45 + 256] * 4  # once, keys and values of two layers


def test_the_comparison_sees_a_slot_that_was_not_written(monkeypatch):
    """Broken on purpose: what was dropped last round is still there."""
    append = cache_room._Room.append

    def one_short(self, layer, key_states, value_states):
        before = layer.keys.shape[-2]
        old = None if not self._tensors else self._tensors[0][:, :, before].clone()
        result = append(self, layer, key_states, value_states)
        if old is not None:
            self._tensors[0][:, :, before] = old
        return result

    monkeypatch.setattr(cache_room._Room, "append", one_short)
    plain, roomy = filled_cache(40), filled_cache(40)
    assert not same(rounds(roomy, CacheRoom(roomy, 10_000), 3), rounds(plain, None, 3))


def test_room_grows_with_the_text_and_never_beyond_what_will_be_used(copies):
    cache = filled_cache(2000, layers=1)
    rounds(cache, CacheRoom(cache, 2010), 2)
    assert copies == [2010] * 2  # 2005 + 501, were they wanted
    rounds(cache, CacheRoom(cache, 5), 2)
    assert copies[2:] == [2011, 2011, 2014, 2014]  # what it was told was wrong: just what is needed, each time
    grown = filled_cache(10, layers=1)
    rounds(grown, CacheRoom(grown, 10_000), 130)
    assert copies[6:] == [271, 271, 529, 529]


def test_layers_that_others_have_changed_are_copied_again(copies):
    def select(cache: Any) -> None:
        cache.batch_select_indices(torch.tensor([1, 0]))

    plain, roomy = filled_cache(20), filled_cache(20)
    assert same(rounds(roomy, CacheRoom(roomy, 10_000), 3, select), rounds(plain, None, 3, select))
    assert len(copies) == 3 * 4


def test_only_plain_dynamic_layers_take_part(copies):
    class Own(DynamicLayer):
        pass

    sliding = DynamicSlidingWindowLayer(sliding_window=8)
    for layer in (Own(), sliding, DynamicLayer()):
        cache = DynamicCache()
        cache.layers = [layer]
        with CacheRoom(cache, 10_000):
            cache.update(*states(5, 0), 0)
            assert ("update" in vars(layer)) == (type(layer) is DynamicLayer)
            cache.update(*states(5, 1), 0)
        assert "update" not in vars(layer)
    assert len(copies) == 2  # the last one's, once it had been initialised as usual
    users = filled_cache(5).layers[0]
    own = users.update = lambda *states: DynamicLayer.update(users, *states)
    cache.layers = [users]
    with CacheRoom(cache, 10_000):
        pass
    assert vars(users)["update"] is own
    offloaded = filled_cache(5)
    offloaded.offloading = True
    with CacheRoom(offloaded, 10_000):
        assert not any("update" in vars(layer) for layer in offloaded.layers)


def test_an_error_leaves_the_layers_their_own():
    cache = filled_cache(5)
    with pytest.raises(RuntimeError), CacheRoom(cache, 100):
        raise RuntimeError
    assert not any("update" in vars(layer) for layer in cache.layers)


def test_a_batch_copies_each_layer_once(tiny_target, tiny_drafter, copies):
    """Its rows leave holes: more slots are used than its longest text has."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=[[0], [1], [0, 0]])
    ids = torch.cat([prompt_ids(VOCAB, 6, seed) for seed in range(5)])
    target.generate(ids, max_new_tokens=60, do_sample=False, assistant_model=drafter, pad_token_id=0)
    assert drafter.last_generation.rounds > 10
    assert len(copies) <= 2 * 2 * target.config.num_hidden_layers


def test_a_compiled_target_appends_as_it_did(tiny_target, tiny_drafter, copies):
    target = copy.deepcopy(tiny_target(VOCAB))
    target.forward = torch.compile(target.forward, backend="eager", dynamic=True)
    drafter = tiny_drafter(target, 2)
    target.generate(prompt_ids(VOCAB, 6), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert drafter.last_generation.rounds > 1
    assert copies == []


def test_generation_copies_each_layer_once_and_returns_a_cache_that_goes_on(tiny_target, tiny_drafter, copies):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2)
    options = {"do_sample": False, "return_dict_in_generate": True}
    ids = prompt_ids(VOCAB, 6)
    out = target.generate(ids, max_new_tokens=40, assistant_model=drafter, **options)
    assert drafter.last_generation.rounds > 3
    assert len(copies) == 2 * target.config.num_hidden_layers
    cache = returned_cache(out)
    assert not any("update" in vars(layer) for layer in cache.layers)
    longer = target.generate(out.sequences, max_new_tokens=10, **{cache_key(target): cache}, **options)
    assert torch.equal(longer.sequences, target.generate(ids, max_new_tokens=50, **options).sequences)
