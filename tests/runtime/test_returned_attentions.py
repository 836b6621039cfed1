"""``output_attentions``: for each emitted token what plain ``generate()`` returns, of the same shape and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from falcon_hf.runtime.target_session import TargetSession, cache_key

from .families import CHAIN_FAMILIES, FAMILIES, tiny_family
from .helpers import assert_same_text, bushy_tree, prompt_ids, returned_cache, run
from .test_batch import VOCAB, batch, ends
from .test_families import WINDOWED
from .test_static_cache import CROPPABLE, REFUSAL

TREE = bushy_tree(VOCAB, 3, 12)
WANTED = {"return_dict_in_generate": True, "output_attentions": True}
GREEDY = {"do_sample": False, "max_new_tokens": 14}
ENDING = {"eos_token_id": [5, 7], "pad_token_id": 0}


def difference(plain: Any, falcon: Any, rows: list[int], mask: Any = None) -> float:
    """Largest difference of weights over the steps that each row has (``rows`` tokens of each), without padding's.

    Shapes must be equal.
    """
    assert len(falcon.attentions) == len(plain.attentions)
    worst = 0.0
    for step, (ours, theirs) in enumerate(zip(falcon.attentions, plain.attentions, strict=True)):
        alive = [row for row, tokens in enumerate(rows) if step < tokens]
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            gap = (one[alive] - other[alive]).abs()
            if step == 0 and mask is not None:
                gap = gap * mask[alive, None, -gap.shape[2] :, None]
            worst = max(worst, float(gap.max()))
    return worst


def errors(target: Any, drafter: Any, inputs: Any, seed: int = 0, **options: Any) -> float:
    """Falcon's attentions against plain's."""
    drafter.last_generation = None
    theirs, _ = run(target, seed, inputs, **WANTED, **options)
    ours, _ = run(target, seed, inputs, assistant_model=drafter, **WANTED, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert drafter.last_generation is not None
    prompt = inputs.shape[1] if isinstance(inputs, torch.Tensor) else inputs["input_ids"].shape[1]
    rows = ends(ours.sequences, prompt) if "eos_token_id" in options else [len(ours.attentions)] * len(ours.sequences)
    return difference(theirs, ours, rows, None if isinstance(inputs, torch.Tensor) else inputs["attention_mask"])


@pytest.mark.parametrize("family", [*FAMILIES, *CHAIN_FAMILIES])
def test_every_family(tiny_drafter, family):
    """Prompts that end before and behind the window of 8, where there is one."""
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE, intermediate_size=96)
    for length in (4, 13):
        assert errors(target, drafter, prompt_ids(VOCAB, length), **GREEDY) < 5e-4
        assert family in CHAIN_FAMILIES or drafter.last_generation.accepted > 0


@pytest.mark.parametrize("family", ["llama", *WINDOWED])
@pytest.mark.parametrize("options", [GREEDY, GREEDY | ENDING, {"do_sample": True, "max_new_tokens": 10}], ids=str)
def test_batches(tiny_drafter, family, options):
    target = tiny_family(family)
    assert errors(target, tiny_drafter(target, tree=TREE), batch((3, 13, 6)), **options) < 5e-4


def test_rows_that_end_with_their_first_token(tiny_drafter):
    """Nothing is recorded of a row that ends with the prefill's token."""
    target = tiny_family("llama")
    inputs = batch((3, 13, 6))
    first = run(target, 0, inputs, do_sample=False, max_new_tokens=1)[0][:, -1].tolist()
    options = GREEDY | {"eos_token_id": first[0], "pad_token_id": 0, "output_hidden_states": True}
    out, _ = run(target, 0, inputs, assistant_model=tiny_drafter(target, tree=TREE), **WANTED, **options)
    assert {step[0].shape[0] for step in (*out.attentions, *out.hidden_states)} == {3}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "llama4_text"])
@pytest.mark.parametrize("lengths", [(4,), (13,), (3, 13, 6)], ids=str)
def test_static_caches(tiny_drafter, family, lengths):
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE)
    if not CROPPABLE:  # and 5.17 cannot prefill a static cache in chunks of attention at all
        with pytest.raises((ValueError, TypeError), match=f"{REFUSAL}|block_sequence_ids"):
            errors(target, drafter, batch(lengths), **GREEDY, cache_implementation="static")
        return
    assert errors(target, drafter, batch(lengths), **GREEDY, cache_implementation="static") < 5e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_continued_cache(tiny_drafter, family):
    target = tiny_family(family)
    drafter = tiny_drafter(target, tree=TREE)
    turns = [run(target, 0, prompt_ids(VOCAB, 11), **GREEDY, return_dict_in_generate=True)[0] for _ in range(2)]
    ids = torch.cat((turns[0].sequences, prompt_ids(VOCAB, 3, seed=8)), dim=1)
    outputs = [
        run(target, 0, ids, **WANTED, **GREEDY, **{cache_key(target): returned_cache(turn)}, **assistant)[0]
        for turn, assistant in zip(turns, ({}, {"assistant_model": drafter}), strict=True)
    ]
    assert difference(*outputs, [len(outputs[0].attentions)]) < 5e-4


def test_the_users_own_cache(tiny_drafter):
    """A dynamic cache that keeps everything, though the model has windows: full-width rows."""
    target = tiny_family("mistral")
    drafter = tiny_drafter(target, tree=TREE)
    caches = iter([{cache_key(target): DynamicCache()} for _ in range(2)])
    outputs = [
        run(target, 0, prompt_ids(VOCAB, 13), **WANTED, **GREEDY, **next(caches), **assistant)[0]
        for assistant in ({}, {"assistant_model": drafter})
    ]
    assert outputs[1].attentions[-1][0].shape[-1] == 13 + 13
    assert difference(*outputs, [14]) < 5e-4


def test_the_comparison_sees_a_neighbours_columns(tiny_drafter, monkeypatch):
    """The control: the last slots instead of the node's own path."""
    target = tiny_family("llama")
    plain = TargetSession.attentions

    def careless(self, tree, outputs, row, node):
        path = torch.zeros_like(tree.ancestors)
        path[:, :, : int(tree.depths[row, node]) + 1] = True
        return plain(self, dataclasses.replace(tree, ancestors=path), outputs, row, node)

    monkeypatch.setattr(TargetSession, "attentions", careless)
    drafter = tiny_drafter(target, tree=TREE)
    assert max(errors(target, drafter, prompt_ids(VOCAB, 5, seed), **GREEDY) for seed in range(4)) > 1e-2


def test_sdpa_has_none_to_return(tiny_target, tiny_drafter):
    """Transformers warns, and returns an empty tuple a token."""
    target = tiny_target(VOCAB)
    falcon = assert_same_text(target, tiny_drafter(target, tree=TREE), prompt_ids(VOCAB, 5), **WANTED, **GREEDY)
    assert falcon.attentions == ((),) * 14 == run(target, 0, prompt_ids(VOCAB, 5), **WANTED, **GREEDY)[0].attentions


def test_sdpa_that_returns_wrong_ones_is_refused(tiny_drafter):
    """TII's falcon adds sdpa's bool mask to its scores, so that plain decoding's very text is another one."""
    target = tiny_family("falcon", "sdpa")
    ids = prompt_ids(VOCAB, 5)
    assert run(target, 0, ids, **WANTED, **GREEDY)[0].sequences.tolist() != run(target, 0, ids, **GREEDY)[0].tolist()
    with pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\) first, or drop output_attentions"):
        run(target, 0, ids, assistant_model=tiny_drafter(target), **WANTED, **GREEDY)


def test_without_the_output_object_nothing_is_recorded(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    assert_same_text(target, tiny_drafter(target, tree=TREE), prompt_ids(VOCAB, 5), output_attentions=True, **GREEDY)
