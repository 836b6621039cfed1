"""What a user hears of a generation as it runs and after: processors, criteria, streamers, the output object.

All against the plain call: the same calls with the same arguments in the same order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .helpers import assert_same_text, bushy_tree, cache_error, prompt_ids, returned_cache, run

VOCAB = 24
SAMPLED = {"do_sample": True}
GREEDY = {"do_sample": False}
LENGTH = 24


@pytest.fixture(scope="module")
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.fixture(scope="module")
def drafter(target, tiny_drafter):
    return tiny_drafter(target, 2, tree=bushy_tree(VOCAB, 3, 12))


class Recorder:
    """A processor and criterion that keep what they are shown, and change the scores by it."""

    def __init__(self) -> None:
        self.prefixes: list[list[int]] = []
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prefixes.append(input_ids[0].tolist())
        self.scores.append(scores.clone())
        for row, ids in enumerate(input_ids):
            scores[row, ids[-2:]] -= 3.0  # in place, as some processors do
        return scores


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_processors_see_each_prefix_once_and_in_order(target, drafter, options):
    recorders = []
    for assistant in ({}, {"assistant_model": drafter}):
        recorder = Recorder()
        run(
            target, 0, prompt_ids(VOCAB, 6), max_new_tokens=LENGTH,
            logits_processor=LogitsProcessorList([recorder]), **assistant, **options,
        )  # fmt: skip
        recorders.append(recorder)
    plain, falcon = recorders
    assert falcon.prefixes == plain.prefixes
    assert len(falcon.prefixes) == LENGTH
    assert torch.allclose(torch.cat(falcon.scores), torch.cat(plain.scores), atol=1e-4)
    assert drafter.last_generation.accepted > 0


class Until:
    """A criterion that ends the text once its tokens sum up to ``total``, and keeps what it is shown."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.calls: list[tuple[list[int], int | None]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((input_ids[0].tolist(), None if scores is None else len(scores)))
        return (input_ids.sum(-1) > self.total).bool()


@pytest.mark.parametrize("recorded", [{}, {"return_dict_in_generate": True, "output_scores": True}], ids=["", "scores"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("total", [100, 131, 200])
def test_criteria_are_asked_once_a_token(target, drafter, options, total, recorded):
    criteria = []
    for assistant in ({}, {"assistant_model": drafter}):
        criterion = Until(total)
        run(
            target, 0, prompt_ids(VOCAB, 6), max_new_tokens=40,
            stopping_criteria=StoppingCriteriaList([criterion]), **assistant, **options, **recorded,
        )  # fmt: skip
        criteria.append(criterion)
    assert criteria[1].calls == criteria[0].calls
    assert len(criteria[1].calls) < 40


class Tape(BaseStreamer):
    """A streamer that keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.calls.append((tuple(value.shape), value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, GREEDY | {"eos_token_id": [2, 5]}], ids=str)
def test_streamers_get_the_same_calls(target, drafter, options):
    tapes = []
    for assistant in ({}, {"assistant_model": drafter}):
        tape = Tape()
        run(target, 0, prompt_ids(VOCAB, 6), max_new_tokens=LENGTH, streamer=tape, **assistant, **options)
        tapes.append(tape)
    assert tapes[1].calls == tapes[0].calls
    assert tapes[1].calls[-1] == "end"


def assert_same_tensors(one: Any, other: Any) -> None:
    """Nested tuples of tensors: same nesting and shapes, values within float32 rounding."""
    assert type(one) is type(other)
    if isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_tensors(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = float(other[other.isfinite()].abs().max())
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize(
    "options",
    [GREEDY, SAMPLED | {"top_k": 5}, GREEDY | {"repetition_penalty": 1.2, "eos_token_id": [0, 12]}],
    ids=str,
)
@pytest.mark.parametrize(
    "wanted",
    [["output_scores"], ["output_logits"], ["output_hidden_states"], ["output_scores", "output_logits"], []],
    ids=str,
)
def test_output_object_is_plain_generates(target, drafter, options, wanted):
    options = options | dict.fromkeys(wanted, True) | {"max_new_tokens": LENGTH, "return_dict_in_generate": True}
    plain, _ = run(target, 0, prompt_ids(VOCAB, 6), **options)
    falcon = assert_same_text(target, drafter, prompt_ids(VOCAB, 6), **options)
    assert type(falcon) is type(plain)
    assert set(falcon.keys()) == set(plain.keys())
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert_same_tensors(falcon.get(name), plain.get(name))
    assert cache_error(target, falcon.sequences, returned_cache(falcon)) < 1e-4
    assert drafter.last_generation.accepted > 0


def test_hidden_states_keep_no_whole_trees(target, drafter):
    options = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_hidden_states": True}
    output = target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, **options)
    for states in output.hidden_states[1:]:
        for state in states:
            assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_statistics_are_there_when_a_streamer_ends(target, drafter):
    seen: list[Any] = []

    class Reader(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            pass

        def end(self) -> None:
            seen.append(drafter.last_generation.new_tokens)

    drafter.last_generation = None
    target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, streamer=Reader(), do_sample=False, max_new_tokens=9)
    assert seen == [9]


def test_processors_that_write_in_place_do_not_reach_the_logits(target, drafter):
    """Plain ``generate()`` hands the same tensor to processors and record; so do we, whatever that gives."""
    kept = []
    for assistant in ({}, {"assistant_model": drafter}):
        out, _ = run(
            target, 0, prompt_ids(VOCAB, 6), max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
            output_logits=True, logits_processor=LogitsProcessorList([Recorder()]), **assistant,
        )  # fmt: skip
        kept.append(out.logits)
    assert_same_tensors(kept[1], kept[0])
