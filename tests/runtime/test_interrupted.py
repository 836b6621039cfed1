"""A generation that an error ends: the user's cache and random state are those of the text so far."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from falcon_hf.runtime.committed_cache import CommittedCache
from falcon_hf.runtime.few_rows import FewRowProducts
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

    monkeypatch.setattr(CommittedCache, "whole_on_error", contextlib.nullcontext)
    text, cache = interrupted(target, drafter, 5)
    assert int(cache.get_seq_length()) > text.shape[1]


def fails_in_layer(target: Any, layer: int, call: int, run_it: Callable[[], Any]) -> None:
    """Run what ends with an error at the n-th forward of a layer."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise GoneError

    hook = target.model.layers[layer].register_forward_pre_hook(fail)
    with pytest.raises(GoneError):
        run_it()
    hook.remove()


def streamed(target: Any, drafter: Any, streamer: Leaving, cache: Any) -> Any:
    """A greedy text into a streamer and a cache of the user's."""
    options = {"do_sample": False, "max_new_tokens": LENGTH, cache_key(target): cache}
    return run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, streamer=streamer, **options)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("undone", [True, False])
def test_an_error_within_a_verification(tiny_drafter, monkeypatch, family, undone):
    """Out of memory in the second layer: the first has the tree's keys then, and the next call goes by its length."""
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE)
    options = {"do_sample": False, "max_new_tokens": LENGTH}
    whole, _ = run(target, 0, prompt_ids(VOCAB, 6), **options)
    streamer, cache = Leaving(LENGTH), DynamicCache(config=target.config)
    if not undone:  # the control
        monkeypatch.setattr(CommittedCache, "whole_on_error", contextlib.nullcontext)
    # The prefill and some rounds go well.
    fails_in_layer(target, 1, 4, lambda: streamed(target, drafter, streamer, cache))
    lengths = {int(layer.get_seq_length()) for layer in cache.layers}
    assert (len(lengths) == 1) == undone
    if undone:
        text = torch.tensor([streamer.taken])
        assert lengths == {text.shape[1] - 1}
        rest = {"do_sample": False, "max_new_tokens": LENGTH - text.shape[1] + 6, cache_key(target): cache}
        assert run(target, 0, text, **rest)[0].tolist() == whole.tolist()


def broken_at(monkeypatch: pytest.MonkeyPatch, layer: int, call: int) -> None:
    """The cache fails in its n-th call of a layer's ``crop``."""
    calls, own = 0, DynamicLayer.crop

    def fail(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += self is broken[0]
        if self is broken[0] and calls == call:
            raise GoneError
        return own(self, *given)

    broken: list[Any] = [None]
    init = TargetSession.prefill

    def prefill(session: TargetSession, *given: Any) -> Any:
        outputs = init(session, *given)
        broken[0] = session.cache.layers[layer]
        return outputs

    monkeypatch.setattr(TargetSession, "prefill", prefill)
    monkeypatch.setattr(DynamicLayer, "crop", fail)


@pytest.mark.parametrize("undone", [True, False])
def test_an_error_while_drafts_are_dropped(tiny_drafter, monkeypatch, undone):
    """Some layers have dropped them then, and others not."""
    target = tiny_family("llama")
    drafter = tiny_drafter(target, tree=TREE)
    options = {"do_sample": False, "max_new_tokens": LENGTH}
    whole, _ = run(target, 0, prompt_ids(VOCAB, 6), **options)
    if not undone:  # the control
        monkeypatch.setattr(CommittedCache, "whole_on_error", contextlib.nullcontext)
    streamer, cache = Leaving(LENGTH), DynamicCache(config=target.config)
    with monkeypatch.context() as patched:
        broken_at(patched, layer=1, call=2)
        with pytest.raises(GoneError):
            streamed(target, drafter, streamer, cache)
    lengths = {int(layer.get_seq_length()) for layer in cache.layers}
    assert (len(lengths) == 1) == undone
    if undone:
        text = torch.tensor([streamer.taken])
        assert max(lengths) < text.shape[1]
        rest = {"do_sample": False, "max_new_tokens": LENGTH - text.shape[1] + 6, cache_key(target): cache}
        assert run(target, 0, text, **rest)[0].tolist() == whole.tolist()


@pytest.mark.parametrize("undone", [True, False])
def test_an_error_behind_a_convolution(tiny_drafter, monkeypatch, undone):
    """Its states hold drafts then, that no length shows."""
    target = tiny_family("lfm2")
    drafter = tiny_drafter(target, tree=TREE)
    options = {"do_sample": False, "max_new_tokens": LENGTH}
    whole, _ = run(target, 0, prompt_ids(VOCAB, 6), **options)
    streamer, cache = Leaving(LENGTH), DynamicCache(config=target.config)
    if not undone:  # the control
        monkeypatch.setattr(CommittedCache, "whole_on_error", contextlib.nullcontext)
    fails_in_layer(target, -1, 3, lambda: streamed(target, drafter, streamer, cache))
    text = torch.tensor([streamer.taken])
    rest = {"do_sample": False, "max_new_tokens": LENGTH - text.shape[1] + 6, cache_key(target): cache}
    if undone:
        assert run(target, 0, text, **rest)[0].tolist() == whole.tolist()
    else:  # states of more tokens than a convolution sees
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(target, 0, text, **rest)


@pytest.mark.parametrize("undone", [True, False])
def test_an_error_while_holes_are_closed_leaves_the_prompt(tiny_target, tiny_drafter, monkeypatch, undone):
    """A batch's cache is then one of the prompts, not of slots in two orders."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, tree=TREE)
    cache, inputs = DynamicCache(config=target.config), batch()
    own, closing = CommittedCache._gather, False

    def compact(committed: CommittedCache) -> None:
        nonlocal closing
        closing = True
        plain(committed)

    def gather(committed: CommittedCache, slots: int, region: int, index: torch.Tensor) -> None:
        if closing:
            layers = committed.cache.layers
            committed.cache.layers = layers[:1]
            own(committed, slots, region, index)  # the first layer's, and then no memory
            committed.cache.layers = layers
            raise GoneError
        own(committed, slots, region, index)

    plain = CommittedCache.compact
    monkeypatch.setattr(CommittedCache, "compact", compact)
    monkeypatch.setattr(CommittedCache, "_gather", gather)
    if not undone:  # the control
        monkeypatch.setattr(CommittedCache, "_cut", lambda self, length: None)
    with pytest.raises(GoneError):
        run(
            target, 0, inputs, assistant_model=drafter, do_sample=False, max_new_tokens=LENGTH, pad_token_id=0,
            **{cache_key(target): cache},
        )  # fmt: skip
    lengths = {int(layer.get_seq_length()) for layer in cache.layers}
    assert (lengths == {inputs["input_ids"].shape[1]}) == undone


@pytest.mark.parametrize("within", ["__enter__", "__exit__"])
def test_an_interrupt_while_forwards_are_lent(tiny_target, monkeypatch, within):
    model = copy.deepcopy(tiny_target(VOCAB))
    products = FewRowProducts(model)
    own = products._forwards
    assert len(own) > 4

    class Stopping(list):  # type: ignore[type-arg]
        stops = True

        def __iter__(self) -> Any:
            for index, entry in enumerate(list.__iter__(self)):
                if index == 3 and self.stops:
                    self.stops = False
                    raise KeyboardInterrupt
                yield entry

    if within == "__exit__":
        products.__enter__()
    products._forwards = Stopping(own)
    with pytest.raises(KeyboardInterrupt):
        products.__enter__() if within == "__enter__" else products.__exit__(None, None, None)
    assert all("forward" not in vars(module) for module in model.modules())


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
