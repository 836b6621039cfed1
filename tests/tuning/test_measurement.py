"""Rank records, timings, calibration and check on tiny models: what is recorded is what ``generate()`` does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from falcon_hf import FalconCandidateGenerator, TreeShape
from falcon_hf.cli.tune_check import check_settings
from falcon_hf.runtime.dynamic_tree import DynamicTree
from falcon_hf.runtime.target import family
from falcon_hf.runtime.tree_shape import chain
from falcon_hf.tuning import calibrate as calibrate_module
from falcon_hf.tuning.calibrate import CalibrationPlan, NamedDrafter, Prompt, calibrate
from falcon_hf.tuning.calibration import Calibration, VerifyTime
from falcon_hf.tuning.check import compare, measure, spread_settings, sweep_settings
from falcon_hf.tuning.check_file import CheckFile, read_check
from falcon_hf.tuning.choice import choose
from falcon_hf.tuning.cost_measurement import probe_shape, start_session, time_drafts, time_verification
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.rank_measurement import feature_layers, greedy_text, measure_ranks
from falcon_hf.tuning.static_tree import best_tree, widths
from falcon_hf.tuning.whole_calls import generate_with

from ..runtime.helpers import prompt_ids, with_correction


@pytest.fixture(scope="module", params=[
    (1, "linear", {}), (2, "lstm", {"feature_layers": [1, 2]}), (3, "lstm", {"draft_vocab_size": 21}),
    (2, "linear", {"correction_rank": 8}),
])  # fmt: skip
def pair(request, tiny_target, tiny_drafter):
    """A target and a drafter of its own, so that tests may put trees into it."""
    k, fusion, config = request.param
    target = tiny_target()
    drafter = tiny_drafter(target, k, fusion, **config)
    return target, drafter if drafter.correction is None else with_correction(drafter)


@pytest.fixture(scope="module")
def measured(pair):
    target, drafter = pair
    layers = feature_layers(drafter)
    texts = [greedy_text(target, prompt_ids(24, 7 + seed, seed), 24, layers) for seed in range(4)]
    return target, drafter, texts, measure_ranks(target, drafter, texts, passes=2, width=12)


@pytest.mark.parametrize("kind", ["best", "paper", "chain"])
def test_replay_predicts_the_rounds_of_generate(measured, kind):
    """The record is exact: the number of rounds on the same prompts, to the last one."""
    target, drafter, texts, ranks = measured
    k = drafter.config.block_size
    shape = {
        "best": best_tree(ranks.record.model, 12, 2 * k),
        "paper": TreeShape.paper(k, 2 * k, 10),
        "chain": chain(2 * k),
    }[kind]
    rounds = tokens = 0
    for text in texts:
        counted = generate_with(target, drafter, shape, text.ids[:, : text.prompt_length], 24)
        rounds, tokens = rounds + counted.rounds, tokens + counted.new_tokens - 1
    assert tokens > rounds, "something is accepted, or the test shows nothing"
    assert ranks.record.replay(shape) == pytest.approx(tokens / rounds)


def test_a_record_from_features_one_token_late_predicts_something_else(measured):
    """The control of the test above: it sees a mistake of one position."""
    target, drafter, texts, ranks = measured
    k = drafter.config.block_size
    late = [
        dataclasses.replace(text, states={layer: state.roll(1, dims=1) for layer, state in text.states.items()})
        for text in texts
    ]
    wrong = measure_ranks(target, drafter, late, passes=2, width=12).record
    shapes = [best_tree(ranks.record.model, 12, 2 * k), TreeShape.paper(k, 2 * k, 10), chain(2 * k)]
    assert any(wrong.replay(shape) != pytest.approx(ranks.record.replay(shape)) for shape in shapes)


def test_ranks_of_the_first_pass_are_those_of_a_draft(measured):
    """A flat tree over all candidates lists the first law's tokens in order."""
    target, drafter, texts, ranks = measured
    text = texts[0]
    width = ranks.record.width
    generator = FalconCandidateGenerator(drafter, target, TreeShape.from_paths([[rank] for rank in range(width)]))
    for row in (0, 5):
        fresh = FalconCandidateGenerator(drafter, target, generator.shape)
        root = text.prompt_length + row
        fresh.append(text.features(drafter)[:, :root], text.ids[:, 1 : root + 1])
        drafted = fresh.draft(text.ids[:, root : root + 1], 1).tokens[0, 1:].tolist()
        true = int(text.ids[0, root + 1])
        assert ranks.record.ranks[0][row, 0] == (drafted.index(true) if true in drafted else -1)


def test_tokens_behind_the_end_are_misses(measured):
    _, _, texts, ranks = measured
    for text, array in zip(texts, ranks.record.ranks, strict=True):
        assert len(array) == text.ids.shape[1] - text.prompt_length - 1
        for behind in range(1, array.shape[1]):
            assert (array[-behind, behind:] == -1).all()


def test_confidence_tables_have_a_table_for_each_depth(measured):
    tables, record = measured[3].confidence, measured[3].record
    assert len(tables.acceptance) * len(tables.acceptance[0]) == record.depth


def test_no_answer_is_refused(pair):
    target, drafter = pair
    text = greedy_text(target, prompt_ids(24, 5), 1, feature_layers(drafter))
    with pytest.raises(TuningError, match="answer of two tokens"):
        measure_ranks(target, drafter, [text], 1, 4)


def test_timed_verification_leaves_the_context_alone(pair, monkeypatch):
    target, _ = pair
    sessions = []

    def start(*args):
        sessions.append(start_session(*args))
        return sessions[-1]

    monkeypatch.setattr("falcon_hf.tuning.cost_measurement.start_session", start)
    times = time_verification(target, prompt_ids(24, 9), (1, 4, 8), (6, 20), repeats=2)
    assert [(time.context, time.nodes) for time in times] == [(c, n) for c in (6, 20) for n in (1, 4, 8)]
    assert all(time.seconds > 0 for time in times)
    assert [int(session.cache.get_seq_length()) for session, _ in sessions] == [6, 20]


def test_contexts_beyond_the_target_are_refused(pair):
    with pytest.raises(TuningError, match="512 positions"):
        time_verification(pair[0], prompt_ids(24, 9), (1,), (511,), 1)


def test_probes_have_the_widths_they_stand_for(pair):
    target, drafter = pair
    k = drafter.config.block_size
    for passes, width in ((1, 1), (2, 1), (3, 4)):
        shape = probe_shape(k, passes, width)
        assert widths(shape, k) == (1, *[width] * (passes - 1))
    text = greedy_text(target, prompt_ids(24, 9), 8, feature_layers(drafter))
    times, append = time_drafts(target, drafter, text, 2, (1, 4, 100), repeats=1)
    assert [(time.passes, time.width) for time in times] == [(1, 1), (2, 1), (2, 4)], "100 blocks need 100 candidates"
    assert append > 0


@pytest.fixture(scope="module")
def calibrated(pair):
    target, drafter = pair
    prompts = [Prompt(prompt_ids(24, 6 + seed, seed), task) for seed, task in enumerate(("sums", "tales"))]
    named = NamedDrafter("tiny", drafter, {"block_size": drafter.config.block_size})
    plan = CalibrationPlan(max_new_tokens=12, passes=2, nodes=8, width=6, contexts=(8, 24), repeats=1)
    said = []
    return target, [named], prompts, calibrate(target, [named], prompts, plan, {"note": "x"}, said.append), said


def test_calibration_round_trip(calibrated, tmp_path):
    calibration, said = calibrated[3:]
    calibration.write(tmp_path / "tune.json")
    back = Calibration.read(tmp_path / "tune.json")
    assert back.verify_times == calibration.verify_times
    assert back.drafters[0].draft_times == calibration.drafters[0].draft_times
    assert back.plain_seconds == calibration.plain_seconds > 0
    assert back.lookup == calibration.lookup
    shape = chain(2)
    assert back.options()[0].expected_tokens(shape) == calibration.options()[0].expected_tokens(shape)
    first, again = (choose(own.options(40), 2, 8) for own in (calibration, back))
    assert [prediction.tokens_per_second for prediction in first] == [other.tokens_per_second for other in again]
    assert any("Timing verification" in line for line in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("format"), "not a calibration"),
        (lambda value: value.pop("plain_seconds"), "damaged"),
        (lambda value: value.update(walk_seconds=-1), "damaged"),
        (lambda value: value["verify_times"][0].update(seconds="soon"), "damaged"),
        (lambda value: value["drafters"][0].pop("ranks"), "damaged"),
        (lambda value: value.pop("lookup"), "damaged"),
        (lambda value: value["lookup"].update(hits=[1]), "look-up counts are damaged"),
        (lambda value: value.update(drafters=[]), "incomplete"),
    ],
)
def test_damaged_calibrations_are_refused(calibrated, tmp_path, change, message):
    path = tmp_path / "tune.json"
    calibrated[3].write(path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(TuningError, match=message):
        Calibration.read(path)


def test_costs_are_monotone_and_add_up(calibrated):
    costs = calibrated[3].options(16)[0].costs
    seconds = [costs.verify_seconds(nodes) for nodes in range(1, 20)]
    assert seconds == sorted(seconds)
    assert costs.draft_seconds(()) == 0
    assert costs.draft_seconds((1,)) <= costs.draft_seconds((1, 1)) <= costs.draft_seconds((1, 4))
    assert costs.rest_seconds(2.0) >= costs.rest_seconds(1.0)


def test_check_sets_predictions_beside_measurements(calibrated, tmp_path):
    target, drafters, prompts, calibration, _ = calibrated
    settings = spread_settings(calibration.options(), 5, 2, 8)
    assert len({setting.shape for setting in settings}) == 5
    own_tree = drafters[0].drafter.config.tree
    file = CheckFile(tmp_path / "check.json", {"settings": 5})
    turns = measure(target, drafters, prompts, settings, 10, keep=file.add)
    assert drafters[0].drafter.config.tree == own_tree, "the drafter's tree is back"
    assert [turn.calls[0].tokens for turn in turns if turn.task == "sums"] == [9]
    with pytest.raises(TuningError, match="cut off"):
        read_check(tmp_path / "check.json")
    file.finish(compare(calibration, settings, turns))
    back = read_check(tmp_path / "check.json")
    assert [entry["nodes"] for entry in back["settings"]] == [setting.nodes for setting in settings]
    for entry in back["settings"]:
        ratio = entry["predicted"]["tokens_per_second"] / entry["measured"]["tokens_per_second"]
        assert entry["error"] == pytest.approx(abs(ratio - 1))
        speedups = entry["predicted"]["speedup"] / entry["measured"]["speedup"]
        assert entry["speedup_error"] == pytest.approx(abs(speedups - 1))
    assert set(back["summary"]["best_by_task"]) == {"sums", "tales"}
    best = back["summary"]["best"]
    assert best["speedup"] == max(entry["measured"]["speedup"] for entry in back["settings"])
    assert best["chosen_falls_short_by"] >= 0


def test_a_check_measures_what_is_not_done(calibrated):
    target, drafters, prompts, calibration, _ = calibrated
    settings = spread_settings(calibration.options(), 1, 2, 8)
    first = measure(target, drafters, prompts, settings, 10)
    kept = []
    again = measure(target, drafters, prompts, settings, 10, repeats=2, done=first, keep=kept.append)
    assert again == first + kept
    assert [turn.task for turn in kept] == [prompt.task for prompt in prompts]
    quartiles = compare(calibration, settings, again)["settings"][0]["measured"]["quartiles"]
    assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2]


def test_sweep_has_all_cells(calibrated):
    options = calibrated[3].options()
    assert len(sweep_settings(options, 2, 16)) == 4  # m = 1 and 2; N = 8 and 16, as far as the trees grow
    below = sweep_settings(options, 2, 6)
    assert [one.nodes <= 6 for one in below] == [True, True]


def test_dynamic_trees_take_the_calibration(calibrated):
    target, drafters, prompts, calibration, _ = calibrated
    setting = sweep_settings(calibration.options(), 2, 8)[1]
    dynamic = calibration.dynamic(setting)
    assert dynamic.tree["nodes"] == setting.nodes - 1
    assert dynamic.tree["pass_cost"] > 0
    assert DynamicTree.from_config(dynamic.tree, setting.block_size).calibration is not None
    result = compare(calibration, [dynamic], measure(target, drafters, prompts, [dynamic], 10))
    assert result["settings"][0]["measured"]["tokens_per_round"] >= 1
    assert result["settings"][0]["error"] is result["summary"]["median_error"] is None
    costs = dataclasses.replace(calibration, verify_times=tuple(VerifyTime(8, n, 0.1 * n) for n in (1, 2, 64)))
    assert costs.dynamic(setting).tree["batch_nodes"]  # where each node costs what a token does
    plain = next(one for one in choose(calibration.options(), 1, 4) if one.shape is None)
    with pytest.raises(TuningError, match="no tree"):
        calibration.dynamic(plain)


def test_a_drafter_that_never_hits_is_calibrated_too(calibrated, monkeypatch):
    target, drafters, prompts, _, _ = calibrated
    monkeypatch.setattr(calibrate_module, "best_tree", lambda *_: None)
    plan = CalibrationPlan(max_new_tokens=8, passes=1, nodes=4, contexts=(8,), repeats=1)
    assert calibrate(target, drafters, prompts[:1], plan, {}).plain_seconds > 0


def test_unknown_drafters_and_no_prompts_are_refused(calibrated):
    target, drafters, prompts, calibration, _ = calibrated
    settings = spread_settings(calibration.options(), 1, 2, 8)
    with pytest.raises(TuningError, match="at least one prompt"):
        measure(target, drafters, [], settings, 4)
    stranger = [dataclasses.replace(settings[0], drafter="other")]
    with pytest.raises(TuningError, match="No drafter 'other'"):
        measure(target, drafters, prompts, stranger, 4)


@pytest.mark.parametrize(
    ("plan", "config", "message"),
    [
        ({"contexts": (8, 511)}, {}, "512 positions; ask for contexts up to 510"),
        ({"contexts": (8,)}, {"draft_vocab_size": 9}, "9 tokens is too small to tune for: 10"),
    ],
)
def test_what_cannot_be_timed_is_told_before_anything_is_measured(tiny_target, tiny_drafter, plan, config, message):
    target, said = tiny_target(), []
    drafters = [NamedDrafter(str(own), tiny_drafter(target, 2, **own), {}) for own in ({}, config)]
    with pytest.raises(TuningError, match=message):
        calibrate(target, drafters, [Prompt(prompt_ids(24, 6))], CalibrationPlan(**plan), {}, said.append)
    assert said == []


@pytest.mark.parametrize("count", [1, None])
def test_the_best_tree_is_measured_as_a_dynamic_one_whatever_its_kind(calibrated, count):
    """With two nodes the best tree is the chain of one."""
    calibration, plan = calibrated[3], CalibrationPlan(passes=1, nodes=2)
    best = next(one for one in choose(calibration.options(), 1, 2) if one.nodes == 2)
    assert best.kind == "chain"
    settings = check_settings(calibration, best, plan, count, dynamic=True)
    assert (settings[0].shape, settings[0].dynamic) == (best.shape, None)
    twins = [one for one in settings if one.dynamic is not None]
    assert twins[0].shape == best.shape
    assert not [one for one in check_settings(calibration, best, plan, count, False) if one.dynamic]


def test_targets_that_verify_chains_alone_are_refused(calibrated, monkeypatch):
    target, drafters, prompts, _, _ = calibrated
    chains = dataclasses.replace(family(target), drafts="chain")
    monkeypatch.setattr("falcon_hf.tuning.calibrate.family", lambda target: chains)
    with pytest.raises(TuningError, match="verifies chains alone"):
        calibrate(target, drafters, prompts, CalibrationPlan(), {})


def test_impossible_plans_are_refused():
    with pytest.raises(TuningError, match="at least"):
        CalibrationPlan(contexts=())
    with pytest.raises(TuningError, match="at least"):
        CalibrationPlan(max_new_tokens=1)


def test_statistics_of_tokens_are_those_of_the_text(pair):
    """``generate_with`` answers as plain decoding does."""
    target, drafter = pair
    prompt = prompt_ids(24, 9)
    counted = generate_with(target, drafter, chain(2), prompt, 10)
    assert counted.new_tokens == 10
    with torch.no_grad():
        assert greedy_text(target, prompt, 10).ids.shape[1] == 19
