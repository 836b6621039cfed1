"""From text to a drafter's folder: new, continued, adapted; and its recipe."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from falcon_hf import FalconDrafter, FalconDrafterConfig
from falcon_hf.runtime.repo_card import card_fields
from falcon_hf.runtime.target import fingerprint
from falcon_hf.training import pipeline
from falcon_hf.training.arguments import FalconTrainingArguments, check_rollout
from falcon_hf.training.errors import TrainingError
from falcon_hf.training.features import compute_features
from falcon_hf.training.new_drafter import make_drafter
from falcon_hf.training.pipeline import default_learning_rate, train_drafter
from falcon_hf.training.plan import TrainingPlan

from ..runtime.helpers import assert_same_text, prompt_ids
from .conftest import VOCAB


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, tiny_text):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with path.open("w") as file:
        for begin, end in zip(tiny_text.offsets, tiny_text.offsets[1:], strict=False):
            row = {
                "input_ids": tiny_text.tokens[begin:end].tolist(),
                "loss_mask": tiny_text.loss_mask[begin:end].astype(int).tolist(),
            }
            file.write(json.dumps(row) + "\n")
    (path.parent / "recipe.json").write_text('{"temperature": 0}')
    return path


def arguments(folder, **given):
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "warmup_steps": 2,
        "logging_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return FalconTrainingArguments(output_dir=str(folder / "checkpoints"), **settings | given)


def plan_of(text_file, folder, **given):
    settings = {"held_out": 6, "cache": folder / "cache", "save_dtype": "float32", "tree": [[0], [1], [0, 0]]}
    return TrainingPlan([text_file], folder / "drafter", **settings | given)


def train(text_file, target, folder, resume=False, given=None, **plan):
    args = arguments(folder, **given or {})
    return train_drafter(plan_of(text_file, folder, **plan), args, target, resume=resume)


def test_a_folder_that_generate_takes_and_a_recipe(tiny_target, text_file, tmp_path):
    target = tiny_target(VOCAB)
    train(text_file, target, tmp_path, draft_vocab_size=20)
    drafter = FalconDrafter.from_pretrained(tmp_path / "drafter")
    assert_same_text(target, drafter, prompt_ids(VOCAB, 5), max_new_tokens=20)
    assert drafter.config.target_fingerprint
    assert drafter.config.embedding_scale != 1.0
    assert len(drafter.draft_vocab_ids) == 20
    recipe = json.loads((tmp_path / "drafter" / "recipe.json").read_text())
    assert [text["recipe"] for text in recipe["data"]["texts"]] == [{"temperature": 0}]
    assert recipe["data"]["dialogues"] == 34
    assert len(recipe["data"]["sha256"]) == 64
    assert recipe["plan"]["block_size"] == 2
    assert recipe["arguments"]["max_steps"] == 8
    assert recipe["arguments"]["glance_lambda"] == 0.4
    assert recipe["run"]["steps"] == 8
    assert recipe["run"]["positions_seen"] > 100
    assert recipe["run"]["peak_memory_bytes"] > 1e7
    assert [entry["step"] for entry in recipe["curve"] if "eval_tau" in entry] == [4, 8]
    assert recipe["made_with"]["falcon_hf"]


def test_resume_and_a_folder_in_use(tiny_target, text_file, tmp_path):
    target = tiny_target(VOCAB)
    with pytest.raises(TrainingError, match="no checkpoint"):
        train(text_file, target, tmp_path, resume=True)
    train(text_file, target, tmp_path)
    with pytest.raises(TrainingError, match="resume it"):
        train(text_file, target, tmp_path)
    train(text_file, target, tmp_path, resume=True, given={"max_steps": 12})
    recipe = json.loads((tmp_path / "drafter" / "recipe.json").read_text())
    assert recipe["run"]["steps"] == 12


@pytest.mark.parametrize("steps", [8, 6])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_finished_training_resumes_without_another_step(
    tiny_target, tiny_drafter, text_file, tmp_path, steps, lora_rank
):
    """Cut off behind its last checkpoint, or asked for fewer steps: the drafter is that checkpoint's, and evaluated."""
    target, plan = tiny_target(VOCAB), {}
    if lora_rank:
        tiny_drafter(target, 2, "linear").save_pretrained(tmp_path / "first")
        plan = {"init_from": str(tmp_path / "first"), "lora_rank": lora_rank}
    train(text_file, target, tmp_path, **plan)
    folder, again = tmp_path / "drafter", tmp_path / "again"
    folder.rename(again)
    path = tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] = [entry for entry in state["log_history"] if "eval_loss" not in entry]
    path.write_text(json.dumps(state))  # which is evaluated at its end, if it was not before
    train(text_file, target, tmp_path, resume=True, given={"max_steps": steps}, **plan)
    one, other = (FalconDrafter.from_pretrained(path).state_dict() for path in (again, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (json.loads((path / "recipe.json").read_text()) for path in (again, folder))
    assert (second["run"]["steps"], first["run"]["steps"]) == (8, 8)
    assert second["run"]["positions_seen"] == first["run"]["positions_seen"]
    evaluated = [[entry for entry in made["curve"] if "eval_loss" in entry][-1] for made in (first, second)]
    assert evaluated[0]["eval_loss"] == pytest.approx(evaluated[1]["eval_loss"], rel=1e-5)
    train(text_file, target, tmp_path, resume=True, given={"max_steps": 9}, **plan)  # the control
    assert json.loads((folder / "recipe.json").read_text())["run"]["steps"] == 9


def test_dialogues_that_are_held_out_are_not_trained_on(tiny_target, text_file, tmp_path):
    """Two texts may share some; the features and laws of the others are still their own."""
    target, said, seen = tiny_target(VOCAB), [], []
    lines = text_file.read_text().splitlines(keepends=True)
    both = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    both[0].write_text("".join(lines[-3:] + lines[:20]))
    both[1].write_text("".join(lines[20:]))

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **_):
            seen.append(train_dataloader.dataset)

    plan = TrainingPlan(both, tmp_path / "drafter", held_out=6, cache=tmp_path / "cache", tree=[[0], [1], [0, 0]])
    train_drafter(plan, arguments(tmp_path, max_steps=2), target, report=said.append, callbacks=[Watch()])
    assert "3 dialogues are among those held out, and not trained on" in said
    (data,) = seen
    rows = [json.loads(line)["input_ids"] for line in lines]
    assert [item["input_ids"].tolist() for item in data] == rows[:34]
    for item in data:
        ids = torch.from_numpy(item["input_ids"]).long()[None]
        features = compute_features(target, ids, torch.ones_like(ids))[0]
        assert torch.allclose(item["features"].float(), features, atol=0.05)
        assert len(item["labels"]) == ids.shape[1]
    recipe = json.loads((tmp_path / "drafter" / "recipe.json").read_text())
    assert (recipe["data"]["dialogues"], recipe["data"]["held_out_dialogues"]) == (34, 6)
    both[0].write_text("".join(lines[-3:]))
    both[1].write_text("".join(lines[-6:]))
    again = TrainingPlan(both, tmp_path / "other", held_out=6, cache=tmp_path / "cache")
    with pytest.raises(TrainingError, match="Every dialogue to train on is among those held out"):
        train_drafter(again, arguments(tmp_path / "other", max_steps=2), target)


def test_a_finished_drafter_is_not_overwritten(tiny_target, tiny_drafter, text_file, tmp_path):
    target = tiny_target(VOCAB)
    tiny_drafter(target, 2, "linear").save_pretrained(tmp_path / "drafter")
    before = {path: path.read_bytes() for path in (tmp_path / "drafter").rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match="holds a drafter already"):
        train(text_file, target, tmp_path)
    assert before == {path: path.read_bytes() for path in (tmp_path / "drafter").rglob("*") if path.is_file()}
    assert not (tmp_path / "cache").exists()  # told before anything is computed


@pytest.mark.parametrize(
    ("change", "words"), [("held_out", ": held_out changed"), ("target", ": target_digest changed")]
)
def test_a_resume_with_other_text_or_target_is_refused(tiny_target, text_file, tmp_path, change, words):
    """A fine-tune that leaves the embeddings alone has the same fingerprint: the digest sees it."""
    target, brief = tiny_target(VOCAB), {"max_steps": 4, "eval_strategy": "no"}
    train(text_file, target, tmp_path, given=brief)
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    assert fingerprint(other) == fingerprint(target)
    plan = {"held_out": 5} if change == "held_out" else {}
    with pytest.raises(TrainingError, match=words):
        train(text_file, other if change == "target" else target, tmp_path, resume=True, given=brief, **plan)
    train(text_file, target, tmp_path, resume=True, given={**brief, "max_steps": 5})  # the control


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"config": {"block_mixing": True}}, ": block_mixing changed"),
        ({"config": {"num_attention_heads": 2}}, "num_attention_heads"),
        ({"config": {"input_norm": False}}, "input_norm"),
        ({"config": {"rms_norm_eps": 1e-3}}, ": rms_norm_eps changed"),  # the weights would fit
    ],
)
def test_a_resume_with_another_config_is_refused(tiny_target, text_file, tmp_path, plan, words):
    target = tiny_target(VOCAB)
    train(text_file, target, tmp_path, given={"max_steps": 4, "eval_strategy": "no"})
    with pytest.raises(TrainingError, match=words) as caught:
        train(text_file, target, tmp_path, resume=True, given={"max_steps": 5, "eval_strategy": "no"}, **plan)
    assert "\n" not in str(caught.value)
    dynamic = {"kind": "dynamic", "nodes": 6}  # the control: what training does not look at may change
    free = {"tree": dynamic, "config": {"lookup": {}, "auto_off": True}}
    train(text_file, target, tmp_path, resume=True, given={"max_steps": 5, "eval_strategy": "no"}, **free)


@pytest.mark.parametrize(
    "given",
    [{"learning_rate": 1e-4}, {"seed": 1}, {"noise": 0.2}, {"warmup_steps": 1}, {"gradient_accumulation_steps": 2}],
)
def test_a_resume_with_other_arguments_is_refused(tiny_target, text_file, tmp_path, given):
    """They would be taken up in part: the optimizer's go on with the checkpoint's values."""
    target, brief = tiny_target(VOCAB), {"max_steps": 4, "eval_strategy": "no"}
    train(text_file, target, tmp_path, given=brief)
    name = next(iter(given)).replace("gradient_accumulation_steps", "batch_size")
    with pytest.raises(TrainingError, match=f": {name} changed"):
        train(text_file, target, tmp_path, resume=True, given=brief | given)
    free = {"max_steps": 5, "logging_steps": 1, "save_steps": 2, "vocabulary_chunk": 64}  # the control
    train(text_file, target, tmp_path, resume=True, given=brief | free)


def test_a_resume_from_another_drafter_is_refused(tiny_target, tiny_drafter, text_file, tmp_path):
    """A checkpoint of low-rank additions has nothing else of what they are added to."""
    target, brief = tiny_target(VOCAB), {"max_steps": 4, "eval_strategy": "no"}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        train(text_file, target, tmp_path / name, given=brief | {"seed": seed})
    first, second = (str(tmp_path / name / "drafter") for name in ("first", "second"))
    train(text_file, target, tmp_path, given=brief, init_from=first, lora_rank=2, tree=None)
    longer = brief | {"max_steps": 5}
    with pytest.raises(TrainingError, match=": init_from changed"):
        train(text_file, target, tmp_path, resume=True, given=longer, init_from=second, lora_rank=2, tree=None)
    train(text_file, target, tmp_path, resume=True, given=longer, init_from=first, lora_rank=2, tree=None)
    train(text_file, target, tmp_path / "new", given=brief)
    with pytest.raises(TrainingError, match=": init_from changed"):  # or its recipe would tell of another start
        train(text_file, target, tmp_path / "new", resume=True, given=longer, init_from=first, tree=None)


def test_fsdp_on_a_cpu_is_refused_rather_than_left_out(tiny_target, text_file, tmp_path):
    with pytest.raises(TrainingError, match="accelerate ignores fsdp"):
        train(text_file, tiny_target(VOCAB), tmp_path, given={"fsdp": "full_shard"})


def test_a_rollout_that_cannot_be_is_refused_before_anything_is_computed(tiny_target, text_file, tmp_path):
    with pytest.raises(TrainingError, match="rollout_passes=1"):
        train(text_file, tiny_target(VOCAB), tmp_path, given={"rollout_passes": 2}, fusion="lstm")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("rows", "share", "refused"), [(3, 0.25, True), (4, 0.25, False), (3, 0.0, False)])
def test_pieces_need_a_row_that_rolls_on_in_every_process(tmp_path, rows, share, refused):
    """Else the processes would gather the layers' pieces different numbers of times, and wait for each other."""
    args = arguments(tmp_path, per_device_train_batch_size=rows, rollout_passes=2, rollout_share=share)
    config = FalconDrafterConfig(vocab_size=8, hidden_size=8, num_attention_heads=2, fusion="linear")
    check_rollout(args, config)
    args.fsdp = True
    with pytest.raises(TrainingError, match="Raise batch size") if refused else contextlib.nullcontext():
        check_rollout(args, config)


def test_a_note_of_an_earlier_version_has_fewer_fields(tiny_target, text_file, tmp_path):
    target = tiny_target(VOCAB)
    train(text_file, target, tmp_path, given={"max_steps": 4, "eval_strategy": "no"})
    path = tmp_path / "checkpoints" / "training.json"
    note = json.loads(path.read_text())
    path.write_text(json.dumps({name: note[name] for name in ("data", "block_size", "target_fingerprint")}))
    train(text_file, target, tmp_path, resume=True, given={"max_steps": 5, "eval_strategy": "no"})


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: No space left on device"),
    ],
    ids=["python", "torch"],
)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tiny_target, text_file, tmp_path, monkeypatch, error):
    """The training ends with an error; the checkpoint before it is whole, and is what a resume goes on from."""
    target, plain = tiny_target(VOCAB), torch.save

    def save(value, path, *more, **given):
        if "checkpoint-8" in str(path):
            raise error
        return plain(value, path, *more, **given)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(TrainingError, match=r"No space left on device.*resume"):
        train(text_file, target, tmp_path, given={"max_steps": 12})
    assert (tmp_path / "checkpoints" / "checkpoint-8").is_dir()  # a piece of one
    monkeypatch.setattr(torch, "save", plain)
    train(text_file, target, tmp_path, resume=True, given={"max_steps": 12})
    train(text_file, target, tmp_path / "whole", given={"max_steps": 12})
    broken, whole = (
        [(entry["step"], entry["loss"]) for entry in json.loads(path.read_text())["curve"] if "loss" in entry]
        for path in (tmp_path / "drafter" / "recipe.json", tmp_path / "whole" / "drafter" / "recipe.json")
    )
    assert broken == whole


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_trained_drafter_goes_on(tiny_target, tiny_drafter, text_file, tmp_path, lora_rank):
    """All weights, or low-rank additions that are merged: the change of each matrix has that rank."""
    target = tiny_target(VOCAB)
    first = tiny_drafter(target, 2, "linear", draft_vocab_size=20)
    first.draft_vocab_ids.copy_(torch.arange(4, 24))
    first.config.tree, first.config.lookup = {"kind": "dynamic", "nodes": 5}, {}
    first.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "recipe.json").write_text('{"run": {"steps": 5}, "card": {"license": "mit"}}')
    train(
        text_file, target, tmp_path, init_from=str(tmp_path / "first"), lora_rank=lora_rank,
        given={"learning_rate": 1e-2}, tree=[[0], [1], [2]],
    )  # fmt: skip
    second = FalconDrafter.from_pretrained(tmp_path / "drafter")
    made = json.loads((tmp_path / "drafter" / "recipe.json").read_text())
    assert made["started_from"] == {"run": {"steps": 5}}
    assert second.draft_vocab_ids.tolist() == list(range(4, 24))
    assert (second.config.tree, second.config.lookup) == ([[0], [1], [2]], None)
    assert set(second.state_dict()) == set(first.state_dict())
    change = (second.fusion.linear.weight - first.fusion.linear.weight).double()
    assert change.abs().max() > 1e-3
    rank = int((torch.linalg.svdvals(change) > 1e-4 * torch.linalg.svdvals(change)[0]).sum())
    assert rank == 2 if lora_rank else rank > 20
    assert_same_text(target, second, prompt_ids(VOCAB, 5), max_new_tokens=12)


def test_a_trained_drafter_gains_a_correction(tiny_target, tiny_drafter, text_file, tmp_path, tiny_text):
    """It starts as the drafter that it was, and is trained with the rest; one that is there stays."""
    target = tiny_target(VOCAB)
    first = tiny_drafter(target, 2, "linear")
    first.save_pretrained(tmp_path / "first")
    plan = plan_of(text_file, tmp_path, init_from=str(tmp_path / "first"), config={"correction_rank": 4})
    made = make_drafter(plan, target, tiny_text, tiny_text)
    assert made.config.correction_rank == 4
    assert torch.equal(made.fusion.linear.weight, first.fusion.linear.weight)
    assert not made.correction.up.any()
    args = arguments(tmp_path, learning_rate=1e-2)
    trained = train_drafter(plan, args, target)
    assert trained.correction.up.any()
    assert_same_text(
        target, FalconDrafter.from_pretrained(tmp_path / "drafter"), prompt_ids(VOCAB, 5), max_new_tokens=12
    )
    again = plan_of(text_file, tmp_path, init_from=str(tmp_path / "drafter"), config={"correction_rank": 8})
    with pytest.raises(TrainingError, match="has a correction of rank 4, which stays"):
        make_drafter(again, target, tiny_text, tiny_text)
    for rank, words in ((0, "at least 1"), ("x", "correction_rank must be")):
        wrong = plan_of(text_file, tmp_path, init_from=str(tmp_path / "first"), config={"correction_rank": rank})
        with pytest.raises(TrainingError, match=words):
            make_drafter(wrong, target, tiny_text, tiny_text)


def test_a_trained_drafter_gains_draft_vocabulary(tiny_target, tiny_drafter, text_file, tmp_path, tiny_text):
    """It keeps its tokens and weights; the text's most frequent of the others come in."""
    target = tiny_target(VOCAB)
    first = tiny_drafter(target, 2, "linear", draft_vocab_size=12)
    first.save_pretrained(tmp_path / "first")
    source, said = str(tmp_path / "first"), []
    made = make_drafter(
        plan_of(text_file, tmp_path, init_from=source, draft_vocab_size=18), target, tiny_text, tiny_text,
        report=said.append,
    )  # fmt: skip
    held, grown = (set(drafter.draft_vocab_ids.tolist()) for drafter in (first, made))
    assert (made.config.draft_vocab_size, len(grown), held < grown) == (18, 18, True)
    assert "18 tokens" in said[0]
    counts = torch.bincount(torch.from_numpy(tiny_text.tokens[tiny_text.loss_mask].astype("int64")), minlength=VOCAB)
    others = [counts[token] for token in range(VOCAB) if token not in grown]
    assert min(counts[token] for token in grown - held - {target.config.eos_token_id}) >= max(others)
    assert torch.equal(made.fusion.linear.weight, first.fusion.linear.weight)
    train_drafter(plan_of(text_file, tmp_path, init_from=source, draft_vocab_size=18), arguments(tmp_path), target)
    trained = FalconDrafter.from_pretrained(tmp_path / "drafter")
    assert set(trained.draft_vocab_ids.tolist()) == grown
    assert_same_text(target, trained, prompt_ids(VOCAB, 5), max_new_tokens=12)
    for size in (12, VOCAB):
        with pytest.raises(TrainingError, match=f"drafts over 12 of {VOCAB} tokens, and cannot grow to {size}"):
            make_drafter(
                plan_of(text_file, tmp_path, init_from=source, draft_vocab_size=size), target, tiny_text, tiny_text
            )


def test_bad_plans_are_told(tiny_target, tiny_drafter, text_file, tmp_path, tiny_text):
    target = tiny_target(VOCAB)
    for given, words in (
        ({"features": "some"}, "cached, live"),
        ({"save_dtype": "int8"}, "save_dtype"),
        ({"lora_rank": 4}, "init_from"),
        ({"lora_rank": 4, "init_from": "x", "config": {"correction_rank": 8}}, "new correction untrained"),
    ):
        with pytest.raises(TrainingError, match=words):
            plan_of(text_file, tmp_path, **given)
    for given, words in (
        ({"block_size": 99}, "block_size"),
        ({"fusion": "sum"}, "fusion"),
        ({"config": {"depth": 3}}, "depth"),
        ({"draft_vocab_size": 99}, "draft_vocab_size"),
        ({"config": {"feature_layers": [1, 99]}}, "must end with 2"),
        ({"config": {"feature_layers": [0, 1]}}, "must end with 2"),
    ):
        with pytest.raises(TrainingError, match=words):
            make_drafter(plan_of(text_file, tmp_path, **given), target, tiny_text, tiny_text)
    tiny_drafter(tiny_target(VOCAB + 1), 2).save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="25 tokens"):
        make_drafter(plan_of(text_file, tmp_path, init_from=str(tmp_path / "other")), target, tiny_text, tiny_text)


def test_a_tree_or_target_that_a_drafter_cannot_go_on_with(tiny_target, tiny_drafter, text_file, tmp_path, tiny_text):
    """Refused before anything is trained: a calibration of another k, and features of a layer that is not the last."""
    target = tiny_target(VOCAB)
    tiny_drafter(target, 3, "linear").save_pretrained(tmp_path / "three")
    table = {"log_probability": [-1.0, 0.0], "acceptance": [[[0.5, 1.0]] * 2]}
    of_two = {"kind": "dynamic", "nodes": 4, "calibration": table}
    with pytest.raises(TrainingError, match="needs 3 tables"):
        make_drafter(
            plan_of(text_file, tmp_path, init_from=str(tmp_path / "three"), tree=of_two), target, tiny_text, []
        )
    tiny_drafter(target, 2, "linear", feature_layers=[1, 2]).save_pretrained(tmp_path / "layers")
    plan = plan_of(text_file, tmp_path, init_from=str(tmp_path / "layers"))
    make_drafter(plan, target, tiny_text, [])  # the control
    deeper = copy.deepcopy(target)
    deeper.config.num_hidden_layers = 3
    with pytest.raises(TrainingError, match="must end with 3"):
        make_drafter(plan, deeper, tiny_text, [])


def test_the_draft_vocabularys_share_of_each_text(tiny_target, text_file, tmp_path, tiny_text):
    said: list[str] = []
    plan = plan_of(text_file, tmp_path, draft_vocab_size=12)
    for held_out in (tiny_text, []):
        make_drafter(plan, tiny_target(VOCAB), tiny_text, held_out, report=said.append)
    both, alone = (line for line in said if line.startswith("draft vocabulary"))
    assert re.fullmatch(r"draft vocabulary of 12 tokens: ([\d.]+%) of the training text, \1 of the held-out text", both)
    assert both.startswith(alone)
    assert alone.endswith("% of the training text")
    with pytest.raises(TrainingError, match="draft_vocab_size"):  # not the default
        make_drafter(plan_of(text_file, tmp_path, draft_vocab_size=0), tiny_target(VOCAB), tiny_text, [])


def test_the_recipe_of_a_hub_drafter_is_an_ancestor(monkeypatch, tmp_path):
    """It is read where the repo was downloaded to; a folder beside a drafter is no ancestor's."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "recipe.json").write_text('{"run": 1}')
    monkeypatch.setattr(pipeline, "drafter_folder", lambda source: tmp_path / "cache")
    assert pipeline._drafter_recipe("org/drafter") == {"run": 1}
    monkeypatch.undo()
    (tmp_path / "cache" / "drafter").mkdir()
    assert pipeline._drafter_recipe(str(tmp_path / "cache" / "drafter")) is None
    with pytest.raises(TrainingError, match="not a folder here"):
        pipeline._drafter_recipe(str(tmp_path / "nowhere"))


def test_a_drafter_that_goes_on_is_the_new_targets(tiny_target, tiny_drafter, text_file, tmp_path, tiny_text):
    first, second = tiny_target(VOCAB, seed=3), tiny_target(VOCAB)
    tiny_drafter(first, 3, "linear", target_name_or_path="elsewhere").save_pretrained(tmp_path / "first")
    plan = plan_of(text_file, tmp_path, init_from=str(tmp_path / "first"))
    config = make_drafter(plan, second, tiny_text, tiny_text).config
    assert config.target_fingerprint == fingerprint(second) != fingerprint(first)
    assert config.target_name_or_path is None
    assert config.target_model_type == "llama"
    assert config.block_size == 3


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_target_in_a_relative_folder_is_no_repo(
    tiny_target, tiny_drafter, text_file, tmp_path, tiny_text, monkeypatch, goes_on
):
    """``--target models/llama``: neither the Hub's models/llama, nor a path that says whose machine it was."""
    monkeypatch.chdir(tmp_path)
    tiny_target(VOCAB).save_pretrained("models/llama")
    tiny_drafter(tiny_target(VOCAB)).save_pretrained("first")
    target = LlamaForCausalLM.from_pretrained("models/llama")
    assert target.config._name_or_path == "models/llama"
    plan = plan_of(text_file, tmp_path, init_from="first" if goes_on else None)
    config = make_drafter(plan, target, tiny_text, tiny_text).config
    assert config.target_name_or_path == "./models/llama"
    assert "base_model" not in card_fields(config)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"block_size": 3}, "its block_size: leave out that"),
        ({"fusion": "lstm"}, "fusion"),
        ({"target_layers": True}, "target_layers"),
        ({"config": {"num_hidden_layers": 2}}, "num_hidden_layers"),
        ({"config": {"feature_layers": [1, 2]}, "block_size": 4}, "block_size, feature_layers: leave out those"),
    ],
)
def test_a_drafter_that_goes_on_keeps_its_shape(text_file, tmp_path, given, words):
    with pytest.raises(TrainingError, match=words):
        plan_of(text_file, tmp_path, init_from="somewhere", **given)
    plan_of(text_file, tmp_path, **given)  # the control


def test_a_system_without_the_resource_module(monkeypatch):
    """Windows: neither the import of the module nor the measurement fails."""
    assert pipeline.peak_memory() > 1e7
    monkeypatch.setitem(sys.modules, "resource", None)
    assert not hasattr(pipeline, "resource")
    assert pipeline.peak_memory() is None


def test_independent_heads_are_trained_and_roll_out(tiny_target, text_file, tmp_path):
    """The baseline without dependence is one more drafter: same text, trainer and passes."""
    config = {"attention": False, "block_mixing": True}
    train(text_file, tiny_target(VOCAB), tmp_path, config=config, given={"rollout_start": 0.0, "rollout_passes": 2})
    drafter = FalconDrafter.from_pretrained(tmp_path / "drafter")
    assert_same_text(tiny_target(VOCAB), drafter, prompt_ids(VOCAB, 5), max_new_tokens=12)
    curve = json.loads((tmp_path / "drafter" / "recipe.json").read_text())["curve"]
    assert all(entry["loss"] > 0 for entry in curve if "loss" in entry)


def test_default_learning_rate_meets_both_known_points():
    assert default_learning_rate(576) == pytest.approx(1e-3)
    assert default_learning_rate(64) == pytest.approx(1e-3)
    assert default_learning_rate(4096) == pytest.approx(3e-5, rel=0.05)
