"""A generation that an error ends: the user's cache and random state are those of the text so far."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from falcon_hf.runtime.target_session import TargetSession, cache_key

from .families import VOCAB, tiny_family
from .helpers import bushy_tree, cache_error, prompt_ids, run
from .test_batch import batch

TREE = bushy_tree(VOCAB, 3, 12)
LENGTH = 24


class GoneError(Exception):
    """The client has gone."""


class Leaving(BaseStreamer):
    """Takes so many tokens, then raises."""

    def __init__(self, tokens: int) -> None:
        self.left, self.taken = tokens, []

    def put(self, value: torch.Tensor) -> None:
        if self.taken and self.left == 0:
            raise GoneError
        self.left -= bool(self.taken)
        self.taken += value.flatten().tolist()

    def end(self) -> None:
        raise AssertionError("never reached")


def interrupted(target: Any, drafter: Any, tokens: int, **options: Any) -> tuple[torch.Tensor, Any]:
    """The text ``[1, L]`` that was streamed, and the user's cache."""
    cache, streamer = DynamicCache(config=target.config), Leaving(tokens)
    options = {"do_sample": False, "max_new_tokens": LENGTH} | options | {cache_key(target): cache}
    with pytest.raises(GoneError):
        run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, streamer=streamer, **options)
    return torch.tensor([streamer.taken]), cache


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("tokens", [3, 4, 5, 13])
def test_the_cache_goes_on_from_what_was_streamed(tiny_drafter, family, processed, tokens):
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE)
    options = {"repetition_penalty": 1.2} if processed else {}
    whole, _ = run(target, 0, prompt_ids(VOCAB, 6), do_sample=False, max_new_tokens=LENGTH, **options)
    text, cache = interrupted(target, drafter, tokens, **options)
    assert text.tolist() == whole[:, : 6 + tokens].tolist()
    held = int(cache.get_seq_length())
    assert 6 <= held < text.shape[1]
    rest = {"max_new_tokens": LENGTH - tokens, "do_sample": False, cache_key(target): cache} | options
    assert run(target, 0, text, **rest)[0].tolist() == whole.tolist()


def test_without_undoing_the_cache_holds_drafts(tiny_drafter, monkeypatch):
    target = tiny_family("llama")
    drafter = tiny_drafter(target, tree=TREE)
    text, cache = interrupted(target, drafter, 5)
    held = int(cache.get_seq_length())
    assert cache_error(target, text[:, : held + 1], cache) < 1e-4

    monkeypatch.setattr(TargetSession, "undone_on_error", lambda self, nodes: contextlib.nullcontext())
    text, cache = interrupted(target, drafter, 5)
    assert int(cache.get_seq_length()) > text.shape[1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("undone", [True, False])
def test_an_error_within_a_verification(tiny_drafter, monkeypatch, family, undone):
    """Out of memory in the second layer: the first has the tree's keys then, and the next call goes by its length."""
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE)
    options = {"do_sample": False, "max_new_tokens": LENGTH}
    whole, _ = run(target, 0, prompt_ids(VOCAB, 6), **options)
    streamer, cache, calls = Leaving(LENGTH), DynamicCache(config=target.config), 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the prefill and two rounds went well
            raise GoneError

    if not undone:  # the control
        monkeypatch.setattr(TargetSession, "whole_on_error", contextlib.nullcontext)
    hook = target.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(GoneError):
        run(
            target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, streamer=streamer, **options,
            **{cache_key(target): cache},
        )  # fmt: skip
    hook.remove()
    lengths = {int(layer.get_seq_length()) for layer in cache.layers}
    assert (len(lengths) == 1) == undone
    if undone:
        text = torch.tensor([streamer.taken])
        assert lengths == {text.shape[1] - 1}
        rest = {"do_sample": False, "max_new_tokens": LENGTH - text.shape[1] + 6, cache_key(target): cache}
        assert run(target, 0, text, **rest)[0].tolist() == whole.tolist()


def test_the_random_state_is_behind_the_last_step(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, tree=TREE)
    steps = 0

    def leave(prompt: int, ids: torch.Tensor) -> list[int]:
        nonlocal steps
        steps = max(steps, ids.shape[0] - batch()["input_ids"].shape[1])
        if steps == 9:
            raise GoneError
        return list(range(VOCAB))

    options = {"do_sample": True, "max_new_tokens": LENGTH, "pad_token_id": 0}
    with pytest.raises(GoneError):
        run(target, 0, batch(), assistant_model=drafter, prefix_allowed_tokens_fn=leave, **options)
    state = torch.get_rng_state()
    _, plain = run(target, 0, batch(), **options | {"max_new_tokens": 9})
    assert torch.equal(state, plain)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_returned_cache_keeps_no_more_than_its_windows(tiny_drafter, leaves):
    target = tiny_family("gemma3_text")
    drafter = tiny_drafter(target, tree=TREE)
    if leaves:
        _, cache = interrupted(target, drafter, 9)
    else:
        cache = DynamicCache(config=target.config)
        options = {"do_sample": False, "max_new_tokens": LENGTH, cache_key(target): cache}
        run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, **options)
    layers = [layer for layer in cache.layers if hasattr(layer, "record_past")]
    assert layers
    assert not any(layer.record_past for layer in layers)
