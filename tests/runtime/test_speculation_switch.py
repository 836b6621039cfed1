"""Auto-off: its bound by simulation, and texts and drafts that do not depend on when it drafts."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from falcon_hf import FalconCandidateGenerator
from falcon_hf.runtime import generation, speculation_switch
from falcon_hf.runtime.committed_pairs import CommittedPairs
from falcon_hf.runtime.speculation_switch import SpeculationSwitch

from ..conftest import make_tiny_target
from .helpers import assert_same_text, bushy_tree, prompt_ids, run
from .test_batch import ENDING, GREEDY, batch, both
from .test_candidate_generator import VOCAB, committed, deep_tree
from .test_dynamic_tree import SPEC
from .test_generation import SAMPLED
from .test_static_cache import CROPPABLE

TREE = bushy_tree(VOCAB, 3, 12)


def simulate(
    tokens: int, cost: float, accepted: Callable[[int], float], noise: float = 0.0, seed: int = 0
) -> tuple[float, int]:
    """Time of a text in plain rounds, and how many rounds drafted.

    Args:
        tokens: length of the text.
        cost: time of a round that drafts, a plain one being 1.
        accepted: drafts accepted by a round at a token of the text, on average.
        noise: relative spread of all times.
        seed: of noise and acceptance.
    """
    draw, now, emitted, drafted = random.Random(seed), 0.0, 0, 0
    switch = SpeculationSwitch(True)
    drafts = switch.drafts
    while emitted < tokens:
        drafted += drafts
        seconds = (cost if drafts else 1.0) * (1 + noise * draw.uniform(-1, 1))
        now += seconds
        mean = accepted(emitted) if drafts else 0.0
        new = 1
        while new < 8 and draw.random() < mean / (1 + mean):  # geometric, of that mean
            new += 1
        emitted += new
        drafts = switch.record(new, seconds, drafts)
    return now, drafted


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("tokens", [64, 128, 512, 2000])
@pytest.mark.parametrize("cost", [1.1, 1.35, 2.2])
def test_a_hopeless_drafter_costs_five_percent_at_most(cost, tokens, noise):
    times = [simulate(tokens, cost, lambda _: 0.0, noise, seed)[0] for seed in range(20)]
    assert sum(times) / 20 < 1.05 * tokens


def test_without_the_switch_it_costs_more(monkeypatch):
    """The control: an allowance of everything."""
    monkeypatch.setattr(speculation_switch, "_SHARE", 10.0)
    assert simulate(128, 1.35, lambda _: 0.0)[0] > 1.3 * 128


def short_texts(tokens: int, cost: float, forgets: bool) -> float:
    """Time of 60 texts of ``tokens`` with a hopeless drafter, each with a switch of its own if it ``forgets``."""
    spent, switch = 0.0, SpeculationSwitch(True)
    for _ in range(60):
        switch = SpeculationSwitch(True) if forgets else switch
        drafts = switch.drafts
        for _ in range(tokens):
            taken = cost if drafts else 1.0
            spent += taken
            drafts = switch.record(1, taken, drafts)
    return spent


@pytest.mark.parametrize("tokens", [8, 16, 32])
@pytest.mark.parametrize("cost", [1.35, 4.5, 8.0])
def test_many_short_texts_cost_five_percent_at_most(cost, tokens):
    """The switch of one call goes on in the next; the control is one that forgets."""
    assert short_texts(tokens, cost, forgets=False) < 1.05 * 60 * tokens
    assert short_texts(tokens, cost, forgets=True) > 1.05 * 60 * tokens or cost < 2


@pytest.mark.parametrize(("cost", "mean"), [(1.1, 0.6), (1.35, 1.5), (2.2, 2.5)])
def test_a_good_drafter_drafts_on(cost, mean):
    """Within 12% of drafting in every round: the dearest of these rests for a while when its first are unlucky."""
    times = [simulate(500, cost, lambda _: mean, 0.2, seed)[0] for seed in range(10)]
    capped = sum((mean / (1 + mean)) ** n for n in range(1, 8))
    assert sum(times) / 10 < 1.12 * 500 * cost / (1 + capped)


def test_a_drafter_that_becomes_good_is_found_out():
    time, drafted = simulate(2000, 1.35, lambda at: 0.0 if at < 500 else 2.0)
    assert time < 500 * 1.05 + 1500 * 0.75
    assert drafted > 300


def test_one_that_becomes_bad_is_dropped():
    time, _ = simulate(2000, 1.5, lambda at: 2.0 if at < 500 else 0.0)
    assert time < 500 * 0.8 + 1500 * 1.05


@pytest.mark.parametrize(("stalled", "stall"), [(0, 50.0), (40, 1000.0)], ids=["the first round", "a later one"])
def test_a_round_that_was_held_up_is_not_held_against_the_drafter(stalled, stall):
    """Buffers made at the start, or a machine that slept: drafting goes on within a few rounds."""
    rests, switch = [], SpeculationSwitch(True)
    drafts = switch.drafts
    for index in range(200):
        seconds = (1.2 if drafts else 1.0) + (stall if index == stalled else 0.0)
        rests.append(not drafts)
        drafts = switch.record(3 if drafts else 1, seconds, drafts)
    assert sum(rests) <= 4 + 200 / 40 + 1  # its timings of plain rounds, and no more


def test_off_is_off():
    switch = SpeculationSwitch(False)
    for _ in range(200):
        assert switch.record(1, 1000.0, True)
    assert switch.drafts


def test_calls_that_overlap_book_their_own_rounds():
    """Two calls in turn: a round that drafted, begun before the other call gave it up, is none that did not."""
    switch, spent, plain = SpeculationSwitch(True), 0.0, 0.0
    drafts = [switch.drafts, switch.drafts]
    for _ in range(300):
        for call in (0, 1):
            taken = 3.0 if drafts[call] else 1.0
            spent, plain = spent + taken, plain + 1.0
            drafts[call] = switch.record(1, taken, drafts[call])
    assert spent < 1.05 * plain


def test_threads_may_share_a_switch():
    switch = SpeculationSwitch(True)

    def work(_: int) -> None:
        drafts = switch.drafts
        for _ in range(2000):
            drafts = switch.record(1, 1.2 if drafts else 1.0, drafts)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert switch._rounds == 8000


class Alternating(SpeculationSwitch):
    """Drafts in runs of one to five rounds, whatever the time."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(False)
        self._draw = random.Random(1)
        self._left = 2

    def record(self, tokens: float, seconds: float, drafted: bool) -> bool:
        self._left -= 1
        if self._left == 0:
            self.drafts, self._left = not self.drafts, self._draw.randint(1, 5)
        return self.drafts


class Resting(SpeculationSwitch):
    """Never drafts."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(enabled)
        self.drafts = False

    def record(self, tokens: float, seconds: float, drafted: bool) -> bool:
        return False


@pytest.mark.parametrize("fusion", ["lstm", "linear"])
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_plain_text_whenever_it_drafts(tiny_target, tiny_drafter, monkeypatch, options, fusion):
    monkeypatch.setattr(generation, "SpeculationSwitch", Alternating)
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, fusion, tree=TREE)
    for inputs in (prompt_ids(VOCAB, 6), batch()):
        assert_same_text(target, drafter, inputs, max_new_tokens=60, pad_token_id=0, **options)
        stats = drafter.last_generation
        assert 0 < stats.plain_rounds < stats.rounds
        assert stats.accepted > 0
        assert stats.row_rounds + stats.accepted + stats.rows == stats.new_tokens


@pytest.mark.skipif(not CROPPABLE, reason="older transformers refuse static caches, see test_static_cache")
@pytest.mark.parametrize("further", [{"tree": TREE}, {"tree": SPEC, "lookup": {}}], ids=["static", "dynamic"])
def test_static_caches(tiny_drafter, monkeypatch, further):
    """Trees of all sizes in a cache that verifies one size."""
    monkeypatch.setattr(generation, "SpeculationSwitch", Alternating)
    target = make_tiny_target(VOCAB, seed=11)  # its own, because of what transformers installs in a target
    drafter = tiny_drafter(target, 2, **further)
    for inputs in (prompt_ids(VOCAB, 6), batch()):
        options = {"max_new_tokens": 40, "pad_token_id": 0, "do_sample": False}
        plain, _ = run(target, 0, inputs, **options)
        falcon, _ = run(target, 0, inputs, assistant_model=drafter, cache_implementation="static", **options)
        assert falcon.tolist() == plain.tolist()
        assert 0 < drafter.last_generation.plain_rounds < drafter.last_generation.rounds


def test_rows_that_end_while_it_rests(tiny_target, tiny_drafter, monkeypatch):
    monkeypatch.setattr(generation, "SpeculationSwitch", Alternating)
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree=TREE)
    for seed in range(3):
        both(target, drafter, batch(seed=seed), **(GREEDY | ENDING | {"max_new_tokens": 50}))


def test_with_the_real_clock(tiny_target, tiny_drafter):
    """On a tiny target any drafting loses, and is given up."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree={"kind": "dynamic", "nodes": 8, "passes": 3}, auto_off=True)
    assert_same_text(target, drafter, prompt_ids(VOCAB, 6), max_new_tokens=120, do_sample=False)
    assert drafter.last_generation.plain_rounds > drafter.last_generation.rounds // 2


def test_a_target_that_is_gone_is_forgotten(tiny_target, tiny_drafter):
    """Its id may be the next target's, whose tokens take another time."""
    kept, gone = (copy.deepcopy(tiny_target(VOCAB)) for _ in range(2))
    drafter = tiny_drafter(kept, auto_off=True)
    for target in (kept, gone, gone):
        target.generate(prompt_ids(VOCAB, 5), assistant_model=drafter, do_sample=False, max_new_tokens=4)
    assert {own for own, *_ in drafter.switches} == {id(kept), id(gone)}
    del target, gone
    gc.collect()
    assert {own for own, *_ in drafter.switches} == {id(kept)}


def test_a_plain_round_has_no_mask_to_look_at(tiny_target, tiny_drafter, monkeypatch):
    """As in plain decoding, where transformers drops a mask of ones: looking at it would be a device sync a round."""
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, auto_off=True)
    monkeypatch.setattr(generation, "SpeculationSwitch", Resting)
    masks: list[Any] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        masks.append(given.get("attention_mask"))

    for padding in (0, 2):
        ids = prompt_ids(VOCAB, 6)
        mask = (torch.arange(6) >= padding).long()[None]
        masks.clear()
        hook = target.register_forward_pre_hook(note, with_kwargs=True)
        out = target.generate(ids, attention_mask=mask, assistant_model=drafter, do_sample=False, max_new_tokens=8)
        hook.remove()
        assert out.tolist() == target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8).tolist()
        assert len(masks) == 8
        assert [each is None for each in masks[1:]] == [padding == 0] * 7


def test_the_books_go_on_with_the_next_call(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, tree={"kind": "dynamic", "nodes": 8, "passes": 3}, auto_off=True)
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    plain_rounds = []
    for _ in range(3):
        assert_same_text(target, drafter, prompt_ids(VOCAB, 6), **options)
        plain_rounds.append(drafter.last_generation.plain_rounds / drafter.last_generation.rounds)
    assert min(plain_rounds[1:]) > 0.8
    (one,) = drafter.switches.values()
    target.generate(**batch(), assistant_model=drafter, **options)
    assert len(drafter.switches) == 2  # another batch size costs otherwise
    drafter.config.auto_off = False
    target.generate(**batch(), assistant_model=drafter, **options)
    assert drafter.last_generation.plain_rounds == 0
    assert one in drafter.switches.values()


class Row:
    """What the pairs read of an ``Emission``."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.ids, self.ended = tokens[:, :0], False


@torch.no_grad()
def pairs_error(drafter: Any, target: Any, held: list[bool], lose: bool = False) -> float:
    """Largest difference of the next draft's features between rounds that were held back and not."""
    rows, drafter = 3, drafter.double()
    texts = [committed(target, 30, seed=row) for row in range(rows)]
    features = []
    for holds in (held, [False] * len(held)):
        generator = FalconCandidateGenerator(drafter, target, rows=rows)
        emissions = [Row(tokens) for _, tokens in texts]
        pairs = CommittedPairs(generator, emissions)  # type: ignore[arg-type]
        draw, ends = random.Random(0), [4, 2, 7]
        for row, end in enumerate(ends):
            emissions[row].ids = texts[row][1][:, :end]
        pairs.add_prompt([states[:, :end].double() for (states, _), end in zip(texts, ends, strict=True)])
        for index, hold in enumerate(holds):
            emissions[1].ended = index > 1
            paths, nodes = [], torch.zeros(rows, 6, texts[0][0].shape[-1], dtype=torch.float64)
            for row in range(rows):
                path = sorted(draw.sample(range(6), draw.randint(1, 3)))
                if row == 1 and index > 1:
                    path = []
                nodes[row, path] = texts[row][0][0, ends[row] : ends[row] + len(path)].double()
                ends[row] += len(path)
                emissions[row].ids = texts[row][1][:, : ends[row]]
                paths.append(path)
            if not (lose and hold):
                pairs.add_round(nodes, paths, hold)
        features.append(generator.context.first_pass()[0][[0, 2]])
    return float((features[0] - features[1]).abs().max() / features[1].abs().max())


@pytest.mark.parametrize("fusion", ["lstm", "linear"])
def test_held_rounds_reach_the_drafter(tiny_target, tiny_drafter, fusion):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2, fusion, tree=deep_tree(2))
    held = [False, True, True, False, True, False]
    assert pairs_error(drafter, target, held) < 1e-9
    assert pairs_error(drafter, target, held, lose=True) > 1e-3  # the control
