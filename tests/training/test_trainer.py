"""``FalconTrainer``: it learns, resumes, and does the same on the fly, on several processes and in pieces."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from falcon_hf import FalconDrafter
from falcon_hf.training.arguments import FalconTrainingArguments
from falcon_hf.training.batches import DialogueDataset
from falcon_hf.training.errors import TrainingError
from falcon_hf.training.features import FeatureCache, cache_key
from falcon_hf.training.initialisation import near_identity_start
from falcon_hf.training.laws import LawCache
from falcon_hf.training.losses import DraftHead
from falcon_hf.training.trainer import FalconTrainer

from .conftest import VOCAB, make_text


def fresh(tiny_drafter, target, block_size=2, fusion="linear", **config):
    drafter = tiny_drafter(target, block_size, fusion, tree=[[0], [0, 0], [0, 0, 0], [1], [2]], **config)
    near_identity_start(drafter, 1.0, 0.5)
    return drafter


def arguments(folder, **given):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "vocabulary_weight": 0.05,
    }
    return FalconTrainingArguments(output_dir=str(folder), **settings | given)


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def train(drafter, target, text, folder, resume=None, features=None, **given):
    trainer = FalconTrainer(drafter, arguments(folder, **given), target, DialogueDataset(text, features))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("block_size", "fusion", "config", "given"),
    [
        (2, "linear", {}, {}),
        (1, "linear", {}, {"rollout_passes": 3, "rollout_start": 0.0}),
        (3, "lstm", {}, {"first_pass_share": 0.25}),
        (4, "linear", {"draft_vocab_size": 16}, {"rollout_passes": 2, "rollout_start": 0.0, "glance_loss": "all"}),
        (2, "linear", {"num_hidden_layers": 2}, {"rollout_passes": 2, "rollout_start": 0.0}),
        (2, "linear", {"feature_layers": [0, 1, 2]}, {"rollout_passes": 2, "rollout_start": 0.0}),
        (2, "lstm_stateless", {}, {"glance_lambda": 0.0, "noise": 0.0, "max_steps": 70}),
    ],
)
def test_it_learns(tiny_target, tiny_drafter, tiny_text, tmp_path, block_size, fusion, config, given):
    """Every kind of drafter: held-out losses of both kinds fall, and the target stays as it was."""
    target = tiny_target(VOCAB)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    trainer = FalconTrainer(
        fresh(tiny_drafter, target, block_size, fusion, **config),
        arguments(tmp_path, **{"max_steps": 30} | given),
        target,
        DialogueDataset(tiny_text),
        DialogueDataset(make_text(target, 8, seed=5)),
    )
    at_first = trainer.evaluate()
    trainer.train()
    at_last = trainer.evaluate()
    assert at_last["eval_smooth_l1"] < 0.97 * at_first["eval_smooth_l1"]
    assert at_last["eval_kl"] < 0.97 * at_first["eval_kl"]
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())
    noted = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"smooth_l1", "kl", "agreement", "positions_seen", "positions_per_second"} <= set(noted)
    assert ("pass2_kl" in noted) == (given.get("rollout_passes", 1) > 1)
    assert ("glanced" in noted) == (given.get("glance_lambda", 0.4) > 0)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_correction_learns_what_the_token_before_tells(tiny_target, tiny_drafter, tmp_path, passes):
    """Sampled text of a target that looks at the last token alone: the law of place 2 is known with it, not without.

    The control is the same law without the correction, which the same training has taught as long.
    """
    target = copy.deepcopy(tiny_target(VOCAB))
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    torch.manual_seed(0)
    text, held_out = (make_text(target, rows, seed=rows, sample=True) for rows in (60, 12))
    trainer = FalconTrainer(
        fresh(tiny_drafter, target, 2, "linear", correction_rank=32),
        arguments(tmp_path, max_steps=120, rollout_passes=passes, rollout_start=0.0, learning_rate=1e-2),
        target,
        DialogueDataset(text),
        DialogueDataset(held_out),
    )
    start = trainer.evaluate()
    assert start["eval_corrected_position2_top3"] == start["eval_pass1_position2_top3"]  # it starts as nothing
    assert "eval_corrected_position1_top1" not in start
    trainer.train()
    end = trainer.evaluate()
    noted = [entry for entry in trainer.state.log_history if "corrected_kl" in entry][-10:]
    assert sum(entry["corrected_kl"] for entry in noted) < 0.7 * sum(entry["kl"] for entry in noted)
    assert end["eval_corrected_position2_top3"] > end["eval_pass1_position2_top3"] + 0.05


@pytest.mark.parametrize(("rows", "measured"), [(1, 1), (2, 1), (4, 1), (16, 2)])
def test_every_step_measures_some_rows(tiny_target, tiny_drafter, tiny_text, tmp_path, rows, measured):
    """However small the batch: an untrained drafter is wrong nearly everywhere, so each step has what to glance at.

    At 16 rows the share decides: an eighth of them.
    """
    target = tiny_target(VOCAB)
    drafter = fresh(tiny_drafter, target)
    seen, plain = [], drafter.forward

    def forward(*args, **given):
        if not torch.is_grad_enabled():
            seen.append(len(given["features"]))
        return plain(*args, **given)

    drafter.forward = forward
    given = {"per_device_train_batch_size": rows, "first_pass_share": 0.125, "max_steps": 9 if rows < 16 else 2}
    trainer = train(drafter, target, tiny_text, tmp_path, **given)
    errors = [entry["first_pass_error"] for entry in trainer.state.log_history if "first_pass_error" in entry]
    assert seen == [measured] * given["max_steps"]
    assert len(errors) == given["max_steps"]
    assert min(errors) > 0.3


def test_an_incomplete_last_batch_is_measured_too(tiny_target, tiny_drafter, tiny_text, tmp_path):
    """40 dialogues in batches of 18 end with one of 4, in which an eighth is no row by itself."""
    target = tiny_target(VOCAB)
    trainer = train(
        fresh(tiny_drafter, target),
        target,
        tiny_text,
        tmp_path,
        per_device_train_batch_size=18,
        first_pass_share=0.125,
        max_steps=9,
    )
    errors = [entry["first_pass_error"] for entry in trainer.state.log_history if "first_pass_error" in entry]
    assert len(errors) == 9
    assert min(errors) > 0.3
    assert trainer._rolled_first([0, 1, 2, 3], 1.0)[1] == 0  # the default: one pass
    trainer.args.rollout_passes = 2
    trainer.args.rollout_share = 0.1
    assert trainer._rolled_first(list(range(18)), 1.0)[1] == 1
    assert trainer._rolled_first([0, 1, 2, 3], 1.0)[1] == 1


@pytest.mark.parametrize("glance_loss", ["unreplaced", "all"])
@pytest.mark.parametrize("block_size", [2, 3])
def test_the_second_pass_is_shown_feature_and_token_of_the_same_pairs(
    tiny_target, tiny_drafter, tiny_text, tmp_path, block_size, glance_loss
):
    """CSGD's coupling, in the trainer itself: both come from a block ahead, in the same columns, inside blocks.

    The first pass sees the true pairs, so it says what the second one's were taken from.
    """
    target = tiny_target(VOCAB)
    drafter = fresh(tiny_drafter, target, block_size)
    passes, plain = [], drafter.forward

    def forward(**given):
        passes.append({name: value.detach().clone() for name, value in given.items()})
        return plain(**given)

    drafter.forward = forward
    given = {"glance_lambda": 0.9, "first_pass_share": 1.0, "noise": 0.0, "glance_loss": glance_loss, "max_steps": 3}
    train(drafter, target, tiny_text, tmp_path, **given)
    assert len(passes) == 6
    shown = 0
    for true, seen in zip(passes[::2], passes[1::2], strict=True):
        columns = true["features"].shape[1]
        replaced = (seen["features"] != true["features"]).any(-1)
        other = (seen["embeddings"] != true["embeddings"]).any(-1)
        assert not (other & ~replaced).any()
        assert other.sum() > 0.7 * replaced.sum()  # a token may be the one it replaces, a feature is not
        rows, places = replaced.nonzero(as_tuple=True)
        for name in ("features", "embeddings"):
            assert torch.equal(seen[name][rows, places], true[name][rows, places + block_size])
        block = (torch.arange(columns)[None] + seen["block_offset"][:, None]) // block_size
        in_block = torch.zeros(len(replaced), columns // block_size + 2, dtype=torch.long)
        in_block.scatter_add_(1, block, replaced.long())
        assert in_block.max() < block_size  # no block is shown all its answers
        chosen = torch.zeros(replaced.numel(), dtype=torch.bool).index_fill(0, seen["select"], True).view_as(replaced)
        learned = torch.zeros(replaced.numel(), dtype=torch.bool).index_fill(0, true["select"], True)
        learned = learned.view_as(replaced)
        assert not (replaced & ~learned).any()
        assert torch.equal(chosen, learned if glance_loss == "all" else learned & ~replaced)
        shown += int(replaced.sum())
    assert shown > 20


class KilledError(RuntimeError):
    pass


class KillAt(TrainerCallback):
    """The process dies in the middle of a step."""

    def __init__(self, step):
        self._step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self._step:
            raise KilledError


def killed(drafter, target, text, folder, step, **given):
    """A training that died in the middle of ``step``."""
    trainer = FalconTrainer(
        drafter, arguments(folder, **given), target, DialogueDataset(text), callbacks=[KillAt(step)]
    )
    with pytest.raises(KilledError):
        trainer.train()
    return trainer


@pytest.mark.parametrize("killed_at", [4, 7])
def test_killed_and_resumed_is_the_same_curve(tiny_target, tiny_drafter, tiny_text, tmp_path, killed_at):
    """Glancing, noise, alignments, rollout, dropout-free layers, order of rows: all as if nothing had happened."""
    target = tiny_target(VOCAB)
    given = {
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 3,
        "rollout_passes": 2,
        "rollout_start": 0.2,
        "first_pass_share": 0.5,
    }
    whole = train(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "whole", **given)
    killed(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "broken", killed_at, **given)
    torch.manual_seed(99)  # nothing may hang on the global generator
    resumed = train(fresh(tiny_drafter, target, seed=8), target, tiny_text, tmp_path / "broken", resume=True, **given)
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 14
    weights, others = (trainer.model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert resumed.positions_seen == whole.positions_seen
    # The control: another seed is another curve.
    other = train(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "other", **given, seed=1)
    assert losses(other) != losses(whole)


def test_what_was_seen_and_taken_is_counted_over_a_resume(tiny_target, tiny_drafter, tiny_text, tmp_path):
    """Between two logs too."""
    target = tiny_target(VOCAB)
    given = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "logging_steps": 50}
    whole = train(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "whole", **given)
    broken = killed(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "broken", 7, **given)
    (saved,) = [entry for entry in broken.state.log_history if entry["step"] == 6 and "seconds" in entry]
    often = given | {"logging_steps": 1}
    resumed = train(fresh(tiny_drafter, target), target, tiny_text, tmp_path / "broken", resume=True, **often)
    assert resumed.positions_seen == whole.positions_seen
    assert resumed.seconds > saved["seconds"] > 0
    assert list(losses(resumed)) == [7, 8, 9]  # logged as often as is asked for now


def test_features_on_the_fly_are_the_cached_ones(tiny_target, tiny_drafter, tiny_text, tmp_path):
    """The same curve; the tolerance is the cache's bfloat16."""
    target = tiny_target(VOCAB)
    key = cache_key(target, tiny_text, 512, None)
    cache = FeatureCache.build(tmp_path / "cache", target, tiny_text, key)
    live = losses(train(fresh(tiny_drafter, target), target, tiny_text, tmp_path, noise=0.0, glance_lambda=0.0))
    cached = losses(
        train(fresh(tiny_drafter, target), target, tiny_text, tmp_path, None, cache, noise=0.0, glance_lambda=0.0)
    )
    assert list(cached.values()) == pytest.approx(list(live.values()), rel=0.01)


@pytest.mark.parametrize("layers", [None, [0, 1, 2]])
def test_cached_laws_are_the_same_curve(tiny_target, tiny_drafter, tiny_text, tmp_path, layers):
    target = tiny_target(VOCAB)
    key = cache_key(target, tiny_text, 512, layers)
    cache = FeatureCache.build(tmp_path / "cache", target, tiny_text, key, layers)
    laws = LawCache.build(cache, DraftHead(target.lm_head.weight.detach()))
    curves = []
    for of in (None, laws):
        data = DialogueDataset(tiny_text, cache, laws=of)
        given = {"vocabulary_weight": 1.0, "rollout_passes": 2, "rollout_start": 0.0}
        drafter = fresh(tiny_drafter, target, feature_layers=layers)
        trainer = FalconTrainer(drafter, arguments(tmp_path, **given), target, data)
        trainer.train()
        curves.append(list(losses(trainer).values()))
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)


def test_accumulated_batches_are_one_batch(tiny_target, tiny_drafter, tmp_path):
    """Rows draw by their place in the global batch, so pieces draw what the whole does."""
    target = tiny_target(VOCAB)
    text = make_text(target, 16, shortest=14, longest=14)
    text = text.subset(
        np.flatnonzero(text.lengths == text.lengths[0])
    )  # rows of one length: a mean of means is the mean
    given = {"glance_lambda": 0.0, "max_steps": 3, "rollout_passes": 1}
    whole = losses(train(fresh(tiny_drafter, target), target, text, tmp_path, per_device_train_batch_size=4, **given))
    parts = losses(
        train(
            fresh(tiny_drafter, target),
            target,
            text,
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **given,
        )
    )
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)


def test_bfloat16_is_near_float32(tiny_target, tiny_drafter, tiny_text, tmp_path):
    target = tiny_target(VOCAB)
    curves = [
        list(losses(train(fresh(tiny_drafter, target), target, tiny_text, tmp_path, bf16=bf16)).values())
        for bf16 in (False, True)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=0.03)
    assert curves[1] != curves[0]


def test_a_checkpoint_is_a_drafter(tiny_target, tiny_drafter, tiny_text, tmp_path):
    target = tiny_target(VOCAB)
    trainer = train(
        fresh(tiny_drafter, target), target, tiny_text, tmp_path, max_steps=2, save_strategy="steps", save_steps=2
    )
    loaded = FalconDrafter.from_pretrained(tmp_path / "checkpoint-2")
    trained = trainer.model.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in loaded.state_dict().items())
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"glance_loss": "some"}, "glance_loss"),
        ({"rollout_passes": 0}, "rollout_passes"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"first_pass_share": 0.0}, "first_pass_share"),
        ({"glance_lambda": 1.5}, "glance_lambda"),
        ({"glance_longest_run": 0}, "glance_longest_run"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **given)


def test_a_rollout_of_a_recurrent_fusion_is_refused(tiny_target, tiny_drafter, tiny_text, tmp_path):
    target = tiny_target(VOCAB)
    with pytest.raises(TrainingError, match="linear"):
        train(fresh(tiny_drafter, target, fusion="lstm"), target, tiny_text, tmp_path, rollout_passes=2)


def test_several_gpus_without_torchrun_are_one(tiny_target, tiny_drafter, tiny_text, tmp_path, caplog):
    """DataParallel would split rows and hand each part the flat indices of all."""
    target, args = tiny_target(VOCAB), arguments(tmp_path, max_steps=1)
    assert args.n_gpu <= 1
    rows = args.rows_a_step
    args._n_gpu = 2
    assert args.rows_a_step == rows  # what a resume is held to, before and after there is a trainer
    with caplog.at_level("WARNING", logger="falcon_hf.training.trainer"):
        trainer = FalconTrainer(fresh(tiny_drafter, target), args, target, DialogueDataset(tiny_text))
    assert "torchrun" in caplog.text
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 4
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


@pytest.mark.parametrize("mapped", [False, True])
def test_features_on_the_fly_move_the_whole_target_once(tiny_target, tiny_drafter, tiny_text, tmp_path, mapped):
    """Its embeddings are moved before, so that its device says it is there; a target with a device map is let alone."""
    target, moved = copy.deepcopy(tiny_target(VOCAB)), []
    if mapped:
        target.hf_device_map = {"": "cpu"}
    target.to = lambda device: moved.append(device)
    trainer = train(fresh(tiny_drafter, target), target, tiny_text, tmp_path, max_steps=2)
    assert moved == ([] if mapped else [trainer.args.device])
