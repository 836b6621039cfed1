"""The cache after the last round is the cache of plain decoding: by next-token logits, beside a broken control."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from falcon_hf.runtime.committed_cache import CommittedCache
from falcon_hf.runtime.target_session import TargetSession, cache_key

from .families import tiny_family
from .helpers import bushy_tree, cache_error, prompt_ids, returned_cache

VOCAB = 24
CHUNK = 16
TREE = bushy_tree(VOCAB, 3, 12)
SAMPLED = {"do_sample": True, "temperature": 0.8}


def final_cache_error(target: Any, drafter: Any, inputs: dict[str, Any], seed: int = 0, **options: Any) -> float:
    """Generate, and compare the returned cache's next-token logits with a cache-free forward's."""
    torch.manual_seed(seed)
    out = target.generate(**inputs, assistant_model=drafter, return_dict_in_generate=True, **options)
    assert drafter.last_generation.accepted > 0
    return cache_error(target, out.sequences, returned_cache(out))


def tiny_errors(target: Any, drafter: Any, **options: Any) -> list[float]:
    """Errors of six short texts, each ending elsewhere in a round."""
    return [
        final_cache_error(
            target, drafter, {"input_ids": prompt_ids(VOCAB, 4 + seed, seed)}, seed, max_new_tokens=9 + seed, **options
        )
        for seed in range(6)
    ]


def no_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the compaction: drop the right number of rows, but whichever lie last."""
    monkeypatch.setattr(CommittedCache, "_gather", lambda *args: None)


def positions_one_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the positions: every node sits one further than it is."""
    plain = TargetSession.verify

    def verify(self, *args):
        self.committed.slots.next_position = self.committed.slots.next_position + 1
        return plain(self, *args)

    monkeypatch.setattr(TargetSession, "verify", verify)


def test_a_prefill_in_chunks_keeps_windows_alone(tiny_drafter, monkeypatch):
    """Else a long prompt, cut into chunks because memory is short, would stay whole in every sliding layer."""
    target, plain, kept = tiny_family("gemma3_text"), DynamicSlidingWindowLayer.update, []

    def update(self, keys, *args, **kwargs):
        found = plain(self, keys, *args, **kwargs)
        if keys.shape[-2] == CHUNK:
            kept.append(self.keys.shape[-2])
        return found

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", update)
    options = {"prefill_chunk_size": CHUNK, "do_sample": False, "max_new_tokens": 12}
    most = []
    for drafter in ({}, {"assistant_model": tiny_drafter(target, tree=TREE)}):
        kept.clear()
        target.generate(prompt_ids(VOCAB, 6 * CHUNK), **options, **drafter)
        most.append(max(kept))
    assert most[0] == most[1] < 6 * CHUNK


def test_rows_are_moved_when_an_offloaded_cache_is_back(tiny_target, tiny_drafter, monkeypatch):
    """The last layer sends for the first one, which is on its way when accepted rows are moved."""
    target, waited = tiny_target(VOCAB), []
    stream = SimpleNamespace(wait_stream=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for cache in (DynamicCache(config=target.config), DynamicCache(config=target.config)):
        drafter = tiny_drafter(target, tree=TREE)
        target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, max_new_tokens=20, **{cache_key(target): cache})
        assert bool(waited) == hasattr(cache, "prefetch_stream")
        monkeypatch.setattr(DynamicCache, "prefetch_stream", "the stream", raising=False)
    assert set(waited) == {"the stream"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_final_cache_is_plain_decodings(tiny_target, tiny_drafter, attention, block_size, options):
    target = tiny_target(VOCAB, attention=attention)
    assert max(tiny_errors(target, tiny_drafter(target, block_size, tree=TREE), **options)) < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("break_it", [no_gather, positions_one_late])
def test_final_cache_comparison_sees_a_broken_cache(tiny_target, tiny_drafter, monkeypatch, attention, break_it):
    target = tiny_target(VOCAB, attention=attention)
    break_it(monkeypatch)
    assert max(tiny_errors(target, tiny_drafter(target, 2, tree=TREE), do_sample=False)) > 1e-2


def test_final_cache_after_an_early_end(tiny_target, tiny_drafter):
    """An eos token inside an accepted path: what was verified behind it is not in the cache."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE)
    ids = prompt_ids(VOCAB, 6)
    text = target.generate(ids, max_new_tokens=30, do_sample=False)[0, 6:].tolist()
    for eos in set(text[3:20]):
        out = target.generate(
            ids, max_new_tokens=30, do_sample=False, eos_token_id=eos, return_dict_in_generate=True,
            assistant_model=drafter,
        )  # fmt: skip
        assert out.sequences[0, 6:].tolist() == text[: text.index(eos) + 1]
        assert cache_error(target, out.sequences, returned_cache(out)) < 1e-4


def test_final_cache_with_left_padding(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE)
    ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt_ids(VOCAB, 5)), dim=1)
    mask = (ids != 0).long()
    out = target.generate(
        ids, attention_mask=mask, max_new_tokens=14, do_sample=False, return_dict_in_generate=True,
        assistant_model=drafter,
    )  # fmt: skip
    whole = torch.cat((mask, mask.new_ones(1, 14)), dim=1)
    assert cache_error(target, out.sequences, returned_cache(out), whole) < 1e-4


@pytest.mark.parametrize("with_falcon", [True, False], ids=["falcon", "plain"])
def test_returned_cache_can_be_continued(tiny_target, tiny_drafter, with_falcon):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE)
    ids = prompt_ids(VOCAB, 6)
    first = target.generate(
        ids, max_new_tokens=11, do_sample=False, return_dict_in_generate=True, assistant_model=drafter
    )
    turn = torch.cat((first.sequences, prompt_ids(VOCAB, 3, seed=8)), dim=1)
    cache = {cache_key(target): returned_cache(first)}
    assistant = {"assistant_model": drafter} if with_falcon else {}
    second = target.generate(turn, max_new_tokens=12, do_sample=False, **cache, **assistant)
    assert second.tolist() == target.generate(turn, max_new_tokens=12, do_sample=False).tolist()


def test_users_own_cache_is_filled(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE)
    cache = DynamicCache()
    options = {"max_new_tokens": 10, "do_sample": False, cache_key(target): cache}
    sequences = target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, **options)
    assert cache_error(target, sequences, cache) < 1e-4


@pytest.mark.parametrize("number", [0, 2])
def test_real_final_cache(smollm2, trained_drafter, chat, prompts, number):
    target, _ = smollm2
    inputs = dict(chat(prompts[number]))
    assert final_cache_error(target, trained_drafter, inputs, max_new_tokens=40, do_sample=False) < 1e-4


def test_real_final_cache_eager(smollm2, trained_drafter, chat, prompts):
    target, _ = smollm2
    target.set_attn_implementation("eager")
    try:
        inputs = dict(chat(prompts[3]))
        assert final_cache_error(target, trained_drafter, inputs, max_new_tokens=32, do_sample=False) < 1e-4
    finally:
        target.set_attn_implementation("sdpa")


def test_real_final_cache_comparison_sees_a_broken_compaction(smollm2, trained_drafter, chat, prompts, monkeypatch):
    target, _ = smollm2
    no_gather(monkeypatch)
    inputs = dict(chat(prompts[0]))
    assert final_cache_error(target, trained_drafter, inputs, max_new_tokens=40, do_sample=False) > 1e-2
