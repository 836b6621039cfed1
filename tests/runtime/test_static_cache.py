"""Static caches: one of our own where ``generate()`` made one too small, the user's where it has room, else refused."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from falcon_hf.runtime.target_session import cache_key
from falcon_hf.runtime.tree_masks import TreeMasks

from .families import tiny_family
from .helpers import bushy_tree, run
from .test_batch import VOCAB, batch

TREE = bushy_tree(VOCAB, 3, 12)
GREEDY = {"do_sample": False, "max_new_tokens": 24}
# In older transformers (5.17) a static layer cannot give up rejected drafts.
REFUSAL = "cannot give up rejected drafts"
CROPPABLE = getattr(StaticLayer, "is_croppable", False) is not False


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("lengths", [(11,), (3, 11, 6)], ids=["one row", "three rows"])
def test_cache_implementation_static(family, lengths, tiny_drafter):
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE)
    inputs = batch(lengths)
    options = GREEDY | {"cache_implementation": "static", "return_dict_in_generate": True}
    if not CROPPABLE:
        with pytest.raises(ValueError, match=REFUSAL):
            run(target, 0, inputs, assistant_model=drafter, **options)
        return
    plain, _ = run(target, 0, inputs, **GREEDY)
    falcon, _ = run(target, 0, inputs, assistant_model=drafter, **options)
    assert falcon.sequences.tolist() == plain.tolist()
    assert drafter.last_generation.accepted > 0
    # It stayed static, with room for one tree, and no layer of it moved.
    room = plain.shape[1] + len(TREE) + 1
    assert [layer.max_cache_len for layer in falcon.cache.layers] == [room] * target.config.num_hidden_layers
    assert {layer.keys.shape[2] for layer in falcon.cache.layers} == {room}


@pytest.mark.skipif(not CROPPABLE, reason="this transformers refuses static caches: the tests above hold that")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_length_for_all_texts_is_every_texts(family, tiny_drafter):
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE)
    longest = 14 + 24 + len(TREE) + 1
    options = GREEDY | {"cache_implementation": "static", "max_cache_len": longest, "return_dict_in_generate": True}
    sizes = []
    for length in (3, 14):
        falcon, _ = run(target, 0, batch((length,)), assistant_model=drafter, **options)
        sizes += [layer.max_cache_len for layer in falcon.cache.layers]
    assert set(sizes) == {longest}


class TestUsersCache:
    def _run(self, tiny_drafter, slots):
        target = tiny_family("llama")
        drafter = tiny_drafter(target, tree=TREE)
        inputs = batch((7,))
        cache = Cache(layers=[StaticLayer(max_cache_len=slots) for _ in range(target.config.num_hidden_layers)])
        plain, _ = run(target, 0, inputs, **GREEDY)
        falcon, _ = run(target, 0, inputs, assistant_model=drafter, **GREEDY, **{cache_key(target): cache})
        return plain, falcon, cache

    def test_with_room_it_is_used(self, tiny_drafter):
        if not CROPPABLE:
            with pytest.raises(ValueError, match=REFUSAL):
                self._run(tiny_drafter, 7 + 24 + len(TREE) + 1)
            return
        plain, falcon, cache = self._run(tiny_drafter, 7 + 24 + len(TREE) + 1)
        assert falcon.tolist() == plain.tolist()
        assert int(cache.get_seq_length()) == falcon.shape[1] - 1

    def test_without_room_it_is_refused_with_the_size_that_fits(self, tiny_drafter):
        room = 7 + 24 + len(TREE) + 1
        with pytest.raises(ValueError, match=rf"max_cache_len={room}"):
            self._run(tiny_drafter, room - 1)


def test_a_stale_tree_slot_is_never_seen(tiny_drafter, monkeypatch):
    """The control: a mask that shows what lies behind the tree in a static buffer gives another text."""
    target = tiny_family("llama")
    drafter = tiny_drafter(target, tree=TREE)
    inputs = batch((7,))
    options = GREEDY | {"cache_implementation": "static"}
    plain, _ = run(target, 0, inputs, **GREEDY)
    right = TreeMasks.of

    def careless(self, slots, ancestors, positions):
        mask = right(self, slots, ancestors, positions)
        return torch.ones_like(mask) if isinstance(mask, torch.Tensor) else mask

    monkeypatch.setattr(TreeMasks, "of", careless)
    if not CROPPABLE:
        with pytest.raises(ValueError, match=REFUSAL):
            run(target, 0, inputs, assistant_model=drafter, **options)
        return
    falcon, _ = run(target, 0, inputs, assistant_model=drafter, **options)
    assert falcon.tolist() != plain.tolist()


def test_embeddings_alone_take_room_too(tiny_drafter):
    """They stand for ids that ``max_length`` does not count."""
    target = tiny_family("llama")
    drafter = tiny_drafter(target, tree=TREE)
    options = GREEDY | {"assistant_model": drafter, "cache_implementation": "static"}
    for length in (6, 40):
        ids = batch((length,))["input_ids"]
        inputs = {"inputs_embeds": target.get_input_embeddings()(ids).detach()}
        if not CROPPABLE:
            with pytest.raises(ValueError, match=REFUSAL):
                run(target, 0, inputs, **options)
            continue
        plain, _ = run(target, 0, inputs, **GREEDY)
        falcon, _ = run(target, 0, inputs, **options)
        assert falcon.tolist() == plain.tolist()


class Uncroppable(DynamicLayer):
    """As a quantised layer, keeps what it was given."""

    is_croppable = False


def test_a_cache_that_cannot_drop_drafts_is_refused_before_it_is_filled(tiny_drafter):
    """Or the call without a drafter that the error advises would go on behind a prompt that is there already."""
    target = tiny_family("llama")
    cache = Cache(layers=[Uncroppable() for _ in range(target.config.num_hidden_layers)])
    options = GREEDY | {cache_key(target): cache}
    with pytest.raises(ValueError, match=REFUSAL):
        run(target, 0, batch((7,)), assistant_model=tiny_drafter(target), **options)
    assert int(cache.get_seq_length()) == 0
    plain, _ = run(target, 0, batch((7,)), **GREEDY)
    assert run(target, 0, batch((7,)), **options)[0].tolist() == plain.tolist()
