"""Batches: rows of different lengths that accept, advance and end on their own, against plain ``generate()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from falcon_hf.runtime import committed_cache
from falcon_hf.runtime.committed_cache import CommittedCache
from falcon_hf.runtime.configuration_falcon_drafter import FUSIONS
from falcon_hf.runtime.target_session import cache_key

from .families import FAMILIES, tiny_family
from .helpers import assert_same_text, bushy_tree, prompt_ids, returned_cache, run
from .test_families import WINDOWED
from .test_outputs import Recorder, Tape

VOCAB = 24
LENGTHS = (3, 9, 6, 1)
TREE = bushy_tree(VOCAB, 3, 12)
GREEDY = {"do_sample": False, "max_new_tokens": 24}
ENDING = {"eos_token_id": [5, 7], "pad_token_id": 0}


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts of these lengths."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt_ids(VOCAB, length, seed * 10 + row)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def both(target: Any, drafter: Any, inputs: Any, **options: Any) -> tuple[Any, Any]:
    """Plain and Falcon's output, greedy; their tokens are the same."""
    plain, _ = run(target, 0, inputs, **options)
    falcon, _ = run(target, 0, inputs, assistant_model=drafter, **options)
    plain_ids, falcon_ids = (getattr(output, "sequences", output) for output in (plain, falcon))
    assert falcon_ids.tolist() == plain_ids.tolist()
    assert drafter.last_generation.accepted > 0
    return plain, falcon


def ends(sequences: torch.Tensor, prompt: int) -> list[int]:
    """How many tokens each row has until its end, the eos token included."""
    return [
        next((at + 1 for at, token in enumerate(row[prompt:]) if token in ENDING["eos_token_id"]), len(row) - prompt)
        for row in sequences.tolist()
    ]


def cache_difference(plain: Any, falcon: Any, inputs: Any, new_tokens: list[int]) -> float:
    """Largest difference of keys and values over the slots of real tokens, relative to the largest."""
    worst = 0.0
    layers = zip(returned_cache(plain).layers, returned_cache(falcon).layers, strict=True)
    for one, other in layers:
        for a, b in ((one.keys, other.keys), (one.values, other.values)):
            for row, mask in enumerate(inputs["attention_mask"]):
                slots = slice(int((mask == 0).sum()), len(mask) + new_tokens[row] - 1)
                difference = (a[row, :, slots] - b[row, :, slots]).abs().max()
                worst = max(worst, float(difference / a[row, :, slots].abs().max()))
    return worst


@pytest.fixture(scope="module")
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.fixture(scope="module")
def drafter(target, tiny_drafter):
    return tiny_drafter(target, 2, tree=TREE)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_batch_text_is_plain_text(tiny_target, tiny_drafter, attention, block_size, fusion):
    target = tiny_target(VOCAB, attention=attention)
    drafter = tiny_drafter(target, block_size, fusion, tree=TREE)
    for options in ({}, ENDING, {"repetition_penalty": 1.3}, ENDING | {"no_repeat_ngram_size": 2}):
        both(target, drafter, batch(), **(GREEDY | options))


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_rows_end_at_different_times(target, drafter, seed):
    _, falcon = both(target, drafter, batch(seed=seed), **(GREEDY | ENDING | {"max_new_tokens": 50}))
    lengths = ends(falcon, max(LENGTHS))
    assert len(set(lengths)) > 1
    for row, length in zip(falcon.tolist(), lengths, strict=True):
        assert set(row[max(LENGTHS) + length :]) <= {0}
    stats = drafter.last_generation
    assert stats.new_tokens == sum(lengths)
    assert stats.row_rounds + stats.accepted + stats.rows == stats.new_tokens
    assert stats.rounds < stats.row_rounds < stats.rounds * stats.rows


@pytest.mark.parametrize("options", [{}, ENDING, ENDING | {"repetition_penalty": 1.2}], ids=str)
def test_records_are_plain_generates_until_a_row_ends(target, drafter, options):
    wanted = dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"), True)
    plain, falcon = both(target, drafter, batch(), **(GREEDY | options | wanted))
    new_tokens = ends(falcon.sequences, max(LENGTHS)) if options else [24] * 4
    for name in ("scores", "logits"):
        assert len(falcon[name]) == len(plain[name])
        for step, (ours, theirs) in enumerate(zip(falcon[name], plain[name], strict=True)):
            assert ours.shape == theirs.shape
            open_rows = [row for row, length in enumerate(new_tokens) if step < length]
            assert torch.allclose(ours[open_rows], theirs[open_rows], rtol=1e-5, atol=1e-3)
    assert len(falcon.hidden_states) == len(plain.hidden_states)
    for step, (ours, theirs) in enumerate(zip(falcon.hidden_states, plain.hidden_states, strict=True)):
        open_rows = [row for row, length in enumerate(new_tokens) if step < length]
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one[open_rows], other[open_rows], atol=1e-5 * float(other.abs().max()))
    assert cache_difference(plain, falcon, batch(), new_tokens) < 1e-5


def always_compact(monkeypatch):
    monkeypatch.setattr(committed_cache, "_WASTE_SHARE", 0.0)


def never_compact(monkeypatch):
    monkeypatch.setattr(committed_cache, "_WASTE_SHARE", 1.0)


@pytest.mark.parametrize("when", [always_compact, never_compact])
@pytest.mark.parametrize("options", [{}, ENDING], ids=["", "ending"])
def test_final_cache_is_plain_generates(target, drafter, monkeypatch, when, options):
    when(monkeypatch)
    compactions = []
    plain_compact = CommittedCache.compact
    monkeypatch.setattr(CommittedCache, "compact", lambda self: compactions.append(1) or plain_compact(self))
    for seed in range(3):
        inputs = batch(seed=seed)
        plain, falcon = both(target, drafter, inputs, **(GREEDY | options | {"return_dict_in_generate": True}))
        new_tokens = ends(falcon.sequences, max(LENGTHS)) if options else [24] * 4
        assert cache_difference(plain, falcon, inputs, new_tokens) < 1e-5
    assert (len(compactions) > 3) == (when is always_compact)  # one at the end of each is for the user


def no_gather(monkeypatch):
    monkeypatch.setattr(CommittedCache, "_gather", lambda *args: None)


def no_final_compaction(monkeypatch):
    monkeypatch.setattr(CommittedCache, "compact", lambda self: None)


def valid_holes(monkeypatch):
    plain = CommittedCache.keep

    def keep(self, paths, nodes):
        plain(self, paths, nodes)
        self.slots.valid = torch.ones_like(self.slots.valid)

    monkeypatch.setattr(CommittedCache, "keep", keep)


@pytest.mark.parametrize("break_it", [no_gather, no_final_compaction, valid_holes])
def test_final_cache_comparison_sees_a_broken_cache(target, drafter, monkeypatch, break_it):
    inputs, options = batch(), GREEDY | {"return_dict_in_generate": True}
    plain, _ = run(target, 0, inputs, **options)
    break_it(monkeypatch)
    falcon, _ = run(target, 0, inputs, assistant_model=drafter, **options)
    same = falcon.sequences.tolist() == plain.sequences.tolist()
    lengths = {int(returned_cache(output).get_seq_length()) for output in (plain, falcon)}
    assert not same or len(lengths) > 1 or cache_difference(plain, falcon, inputs, [24] * 4) > 1e-2


def test_returned_cache_can_be_continued(target, drafter):
    inputs = batch()
    _, first = both(target, drafter, inputs, **(GREEDY | {"return_dict_in_generate": True}))
    turn = torch.cat((first.sequences, prompt_ids(VOCAB, 8).view(4, 2)), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(4, 26, dtype=torch.long)), dim=1)
    options = {"input_ids": turn, "attention_mask": mask} | GREEDY
    whole = target.generate(**options)
    cache = {cache_key(target): returned_cache(first)}
    assert target.generate(assistant_model=drafter, **options, **cache).tolist() == whole.tolist()


def test_prefix_constraint_knows_its_row(target, drafter):
    def allowed(row, ids):
        return [(int(ids[-1]) * step + row) % VOCAB for step in (1, 5, 7)] + [row]

    _, falcon = both(target, drafter, batch(), prefix_allowed_tokens_fn=allowed, **GREEDY)
    assert falcon.shape == (4, max(LENGTHS) + 24)


def test_processors_that_write_in_place(target, drafter):
    both(target, drafter, batch(), logits_processor=LogitsProcessorList([Recorder()]), **GREEDY)


@pytest.mark.parametrize("options", [{}, ENDING], ids=["", "ending"])
def test_streamers_get_plain_generates_steps(target, drafter, options):
    tapes = []
    for assistant in ({}, {"assistant_model": drafter}):
        tape = Tape()
        run(target, 0, batch(), streamer=tape, **GREEDY, **options, **assistant)
        tapes.append(tape)
    assert tapes[1].calls == tapes[0].calls
    assert tapes[1].calls[-1] == "end"


def test_several_sequences_of_one_prompt(target, drafter):
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3, "max_new_tokens": 20}
    one, _ = run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, **options)
    again, _ = run(target, 0, prompt_ids(VOCAB, 6), assistant_model=drafter, **options)
    other, _ = run(target, 1, prompt_ids(VOCAB, 6), assistant_model=drafter, **options)
    assert one.shape == (3, 26)
    assert len(set(map(tuple, one.tolist()))) == 3
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    batched, _ = run(target, 0, batch(), assistant_model=drafter, **options)
    assert batched.shape == (12, max(LENGTHS) + 20)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, ENDING, {"num_return_sequences": 3}, {"top_p": 0.8}], ids=str)
def test_sampled_rows_are_plain_generates(target, drafter, options, seed):
    """Seed for seed, though rows come to a step of the text in different rounds."""
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 24} | options
    assert_same_text(target, drafter, batch(seed=seed), seed=seed, **options)
    assert drafter.last_generation.accepted > 0


def test_sampling_from_one_candidate_is_greedy(target, drafter):
    sampled = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 24}
    out, _ = run(target, 0, batch(), assistant_model=drafter, **sampled)
    greedy, _ = run(target, 0, batch(), **GREEDY)
    assert out.tolist() == greedy.repeat_interleave(2, dim=0).tolist()


@pytest.mark.parametrize("family", WINDOWED)
def test_families_with_windows(tiny_drafter, family):
    target = tiny_family(family)
    both(target, tiny_drafter(target, 2, tree=TREE), batch(), **(GREEDY | {"max_new_tokens": 20}))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WINDOWED])
def test_families_without_windows(tiny_drafter, family):
    target = tiny_family(family)
    both(target, tiny_drafter(target, 2, tree=TREE), batch(), **(GREEDY | {"max_new_tokens": 12}))


def assert_refused(target: Any, drafter: Any, message: str, **inputs: Any) -> None:
    """A ValueError before the target's forward."""
    called: list[int] = []
    handle = target.register_forward_pre_hook(lambda *_: called.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            target.generate(assistant_model=drafter, **inputs)
    finally:
        handle.remove()
    assert not called


def test_a_users_window_cache_is_refused(tiny_drafter):
    target = tiny_family("mistral")
    cache = {cache_key(target): DynamicCache(config=target.config)}
    assert_refused(target, tiny_drafter(target, 2), "sliding-window cache", **batch((4, 4)), **GREEDY, **cache)


@pytest.mark.parametrize("option", ["criterion", "time"])
def test_rows_that_cannot_be_filled_up_are_refused(target, drafter, option):
    """Without an eos token plain decoding lets an ended row run on until all have ended."""
    criterion = StoppingCriteriaList([lambda ids, scores, **kwargs: (ids.sum(-1) > 90).bool()])
    options = {"criterion": {"stopping_criteria": criterion}, "time": {"max_time": 5.0}}[option]
    assert_refused(target, drafter, "eos_token_id and pad_token_id.* one by one", **batch(), **GREEDY, **options)


def test_criteria_end_rows_that_can_be_filled_up(target, drafter):
    criterion = StoppingCriteriaList([lambda ids, scores, **kwargs: (ids.sum(-1) > 150).bool()])
    both(target, drafter, batch(), stopping_criteria=criterion, **(GREEDY | ENDING))


class RowStops(StoppingCriteria):
    """A criterion that goes by a row's place in the batch: each row has an end token of its own."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([int(row[-1]) == end for row, end in zip(input_ids, self.ends, strict=True)])


def test_criteria_know_their_row(target, drafter):
    inputs = batch((3, 5))
    texts, _ = run(target, 0, inputs, **GREEDY)
    stops = [int(texts[0, 12]), int(texts[1, 16])]
    assert stops[0] != stops[1]
    criteria = StoppingCriteriaList([RowStops(stops)])
    plain, _ = both(target, drafter, inputs, stopping_criteria=criteria, **ENDING, **GREEDY)
    other, _ = run(
        target, 0, inputs, stopping_criteria=StoppingCriteriaList([RowStops(stops[::-1])]), **ENDING, **GREEDY
    )
    assert plain.tolist() != other.tolist()  # the control: the place matters


def test_padding_is_no_waste(target, drafter, monkeypatch):
    """Compaction closes holes behind the prompt; padding in front of it must not set it off every round."""
    calls = []
    compact = CommittedCache.compact
    monkeypatch.setattr(CommittedCache, "compact", lambda session: (calls.append(session), compact(session)))
    both(target, drafter, batch((3, 40)), **GREEDY)
    assert len(calls) <= 1 + drafter.last_generation.rounds // 4
