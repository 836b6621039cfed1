"""``falcon-hf train``, as a user types it."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import typer

from falcon_hf import FalconDrafter

from .conftest import assert_refused


@pytest.fixture(scope="session")
def text(tmp_path_factory, repos, tiny_target):
    from ..bench.tiny import VOCABULARY

    target, path = tiny_target(vocab_size=VOCABULARY), tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = []
    for seed in range(16):
        prompt = torch.randint(1, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(seed))
        out = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
        rows.append({"p": prompt[0].tolist(), "r": out[0, 5:].tolist()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(repos, text, output, *more):
    fixed = ("--held-out", 4, "--log-every", 3, "--eval-every", 3, "--save-every", 3, "--device", "cpu", "--threads", 1)
    return (
        "train", "--data", text, "--target", repos / "target", "--output", output, "--cache", output / "cache",
        "--dtype", "float32", *fixed, *more,
    )  # fmt: skip


def test_a_drafter_from_one_command(run, repos, text, tmp_path):
    tree = tmp_path / "tree.json"
    tree.write_text("[[0], [1], [0, 0]]")
    result = run(
        *command(repos, text, tmp_path, "--steps", 6, "--tree", tree, "--block-size", 3, "--warmup", 1),
        "--config", "intermediate_size=32", "--option", "rollout_weight=0.5", "--compute", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    for words in ("12 dialogues", "step 3/6", "held out: loss", "tokens a round", "pass 1, top 1 / 3 / 10", "saved to"):
        assert words in result.stderr
    assert "falcon-hf tune" not in result.stderr  # it was given a tree
    drafter = FalconDrafter.from_pretrained(tmp_path)
    assert drafter.config.block_size == 3
    assert drafter.config.intermediate_size == 32
    assert drafter.config.tree == [[0], [1], [0, 0]]
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["arguments"]["rollout_weight"] == 0.5
    assert recipe["machine"]["threads"] == 1
    shape = ("--block-size", 3, "--config", "intermediate_size=32")
    other = run(*command(repos, text, tmp_path, "--steps", 9, "--resume"))
    assert other.exit_code == 2
    assert "another training" in other.stderr
    assert "block_size" in other.stderr
    assert "intermediate_size" in other.stderr
    same = (*shape, "--warmup", 1, "--option", "rollout_weight=0.5", "--compute", "float32")
    again = run(*command(repos, text, tmp_path, "--steps", 9, "--resume", *same))
    assert again.exit_code == 0, again.output
    assert "step 9/9" in again.stderr
    assert "step 6/9" not in again.stderr
    assert "falcon-hf tune" in again.stderr


def test_whatever_is_wrong_is_one_line(run, repos, text, tmp_path, no_hub):
    assert_refused(run(*command(repos, tmp_path / "none.jsonl", tmp_path)), "no training data")
    assert_refused(run(*command(repos, text, tmp_path, "--compute", "int8")), "--compute")
    assert_refused(run(*command(repos, text, tmp_path, "--option", "x")), "NAME=JSON")
    assert_refused(run(*command(repos, text, tmp_path, "--option", "depth=3")), "depth")
    assert_refused(run(*command(repos, text, tmp_path, "--config", "fusion_layers=two")), "JSON")
    assert_refused(run(*command(repos, text, tmp_path, "--feature-layers", "a,b")), "--feature-layers")
    assert_refused(run(*command(repos, text, tmp_path, "--tree", tmp_path / "none.json")), "none.json")
    assert_refused(run(*command(repos, text, tmp_path, "--lora-rank", 2)), "init_from")
    assert_refused(run(*command(repos, text, tmp_path, "--held-out", 16)), "16 dialogues")
    assert_refused(run(*command(repos, text, tmp_path, "--steps", 4, "--epochs", 2)), "--epochs: --steps says")
    assert_refused(run(*command(repos, text, tmp_path, "--features", "live", "--no-cached-laws")), "--cached-laws: not")
    assert_refused(run(*command(repos, text, tmp_path, "--rollout-passes", 1, "--rollout-start", 0.1)), "2 or more")
    assert_refused(run(*command(repos, text, tmp_path, "--rollout-share", 0.5, "--option", "rollout_passes=1")), "2 or")
    assert_refused(run(*command(repos, text, tmp_path, "--held-out", 0, "--eval-every", 9)), "nothing to evaluate")
    assert_refused(run(*command(repos, text, tmp_path, "--glance-lambda", 0, "--first-pass-share", 0.5)), "first pass")
    started = ("--init-from", repos / "drafter", "--block-size", 2)  # the default, said aloud
    assert_refused(run(*command(repos, text, tmp_path, *started)), "--block-size: not with --init-from")
    parquet = tmp_path / "text.parquet"
    parquet.write_bytes(b"PAR1")
    assert_refused(run(*command(repos, parquet, tmp_path)), "text.parquet", ".jsonl", "saved datasets.Dataset")
    taken = tmp_path / "taken"
    taken.write_text("")
    assert_refused(run(*command(repos, text, taken)), "taken", "another output folder")


def test_a_drafter_to_go_on_from_must_be_one(run, repos, text, tmp_path):
    result = run(*command(repos, text, tmp_path, "--init-from", repos / "target"))
    assert result.exit_code == 2
    assert "not a Falcon drafter" in result.stderr


def test_each_process_of_torchrun_has_its_gpu(monkeypatch):
    module = importlib.import_module("falcon_hf.cli.train")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert module._device(None) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert module._device(None) == torch.device("cuda", 3)
    assert module._device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module._device(None) == torch.device("cpu")


def test_another_gpu_than_the_first_is_refused(monkeypatch, capsys):
    """The trainer takes the first it sees: what it would do otherwise is to load the target elsewhere."""
    module = importlib.import_module("falcon_hf.cli.train")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(module, "parse_device", torch.device)
    assert module._device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(typer.Exit):
        module._device("cuda:1")
    assert "CUDA_VISIBLE_DEVICES=1" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert module._device("cuda:1") == torch.device("cuda", 1)
