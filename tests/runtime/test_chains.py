"""Families whose order of tokens rules out siblings: a chain in an ordinary causal forward, and its cache after."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from falcon_hf.runtime import generation
from falcon_hf.runtime.committed_cache import CommittedCache
from falcon_hf.runtime.target import FAMILIES

from .families import CHAIN_FAMILIES, tiny_family
from .helpers import assert_same_text, bushy_tree, prompt_ids, returned_cache
from .test_conformance import final_cache_error
from .test_refusals import assert_refused

# So few tokens that a random drafter's likeliest is often right.
VOCAB = 6
TREE = bushy_tree(VOCAB, 4, 8)
OPTIONS = {"max_new_tokens": 20, "pad_token_id": 0, "return_dict_in_generate": True}
MODES = ({"do_sample": False}, {"do_sample": True, "temperature": 2.0})
SEVERAL_ROWS = [name for name in CHAIN_FAMILIES if not FAMILIES[name].why_one_row]


def left_padded(lengths: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    rows = [prompt_ids(VOCAB, length, seed * 10 + row) for row, length in enumerate(lengths)]
    ids = torch.cat([torch.nn.functional.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def chain_drafter(target: Any, tiny_drafter: Any) -> Any:
    return tiny_drafter(target, tree=TREE, intermediate_size=96)


def errors(target: Any, drafter: Any, lengths: tuple[int, ...], padding: int = 0, **options: Any) -> tuple[float, int]:
    """Texts and draws equal plain's; returns the final caches' largest error and how many drafts were accepted."""
    worst, accepted = 0.0, 0
    for seed in range(3):
        for mode in MODES:
            inputs = left_padded(lengths, seed)
            inputs = {name: torch.nn.functional.pad(value, (padding, 0)) for name, value in inputs.items()}
            out = assert_same_text(target, drafter, inputs, seed, **OPTIONS, **mode, **options)
            error = final_cache_error(target, out.sequences, inputs["attention_mask"], returned_cache(out))
            worst = max(worst, error)
            accepted += drafter.last_generation.accepted
            assert drafter.last_generation.drafted <= 4 * drafter.last_generation.row_rounds  # no siblings
    return worst, accepted


def test_every_chain_family_is_tested():
    assert set(CHAIN_FAMILIES) == {name for name, support in FAMILIES.items() if support.drafts == "chain"}


@pytest.mark.parametrize("family", CHAIN_FAMILIES)
@pytest.mark.parametrize(("length", "padding"), [(1, 0), (9, 0), (5, 3)])
def test_one_row(family, length, padding, tiny_drafter):
    target = tiny_family(family, vocab=VOCAB)
    worst, accepted = errors(target, chain_drafter(target, tiny_drafter), (length,), padding)
    assert worst < 1e-4
    assert accepted > 2


@pytest.mark.parametrize("family", SEVERAL_ROWS)
def test_several_rows(family, tiny_drafter):
    target = tiny_family(family, vocab=VOCAB)
    worst, accepted = errors(target, chain_drafter(target, tiny_drafter), (3, 11, 6))
    assert worst < 1e-4
    assert accepted > 2


@pytest.mark.parametrize("family", sorted(set(CHAIN_FAMILIES) - set(SEVERAL_ROWS)))
def test_several_rows_are_refused_where_holes_count(family, tiny_drafter):
    target = tiny_family(family, vocab=VOCAB)
    drafter = chain_drafter(target, tiny_drafter)
    message = "several rows of .* leave empty; generate the rows one by one"
    called: list[int] = []
    with target.register_forward_pre_hook(lambda *_: called.append(1)), pytest.raises(ValueError, match=message):
        target.generate(**left_padded((2, 5), 0), assistant_model=drafter, max_new_tokens=4)
    assert not called


@pytest.mark.parametrize("family", CHAIN_FAMILIES)
def test_comparison_sees_a_tree_in_a_causal_forward(family, tiny_drafter, monkeypatch):
    """The control: without the table's word, siblings would see each other and count as tokens of the text."""
    monkeypatch.setattr(generation, "chain_shape", lambda *_: None)
    target = tiny_family(family, vocab=VOCAB)
    drafter = chain_drafter(target, tiny_drafter)
    wrong = 0.0
    for seed in range(3):
        inputs = left_padded((7,), seed)
        out = target.generate(**inputs, assistant_model=drafter, do_sample=False, **OPTIONS)
        error = final_cache_error(target, out.sequences, inputs["attention_mask"], returned_cache(out))
        wrong = max(wrong, error)
    assert wrong > 1e-3


@pytest.mark.parametrize("family", SEVERAL_ROWS)
def test_comparison_sees_holes_that_count(family, tiny_drafter, monkeypatch):
    """The control for batches: slots that a row left empty are shown to it."""
    plain = CommittedCache.keep

    def keep(self, paths, nodes):
        plain(self, paths, nodes)
        self.slots.valid = torch.ones_like(self.slots.valid)

    target = tiny_family(family, vocab=VOCAB)
    drafter = chain_drafter(target, tiny_drafter)
    monkeypatch.setattr(CommittedCache, "keep", keep)
    with pytest.raises(AssertionError):
        assert errors(target, drafter, (3, 11, 6))[0] < 1e-4


def test_convolutions_in_a_static_cache_are_refused(tiny_drafter):
    target = tiny_family("lfm2", vocab=VOCAB)
    drafter = chain_drafter(target, tiny_drafter)
    assert_refused(target, drafter, "convolution states .*drop cache_implementation", cache_implementation="static")


def test_a_family_that_runs_without_a_cache_by_default(tiny_drafter):
    """Mpt's configs say use_cache=False unless told otherwise."""
    target = tiny_family("mpt", vocab=VOCAB)
    assert_refused(target, chain_drafter(target, tiny_drafter), r"pass use_cache=True", use_cache=False)
