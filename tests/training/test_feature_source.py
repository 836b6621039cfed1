"""Features that are there already are used; the target computes the others."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from falcon_hf.training import feature_source
from falcon_hf.training.dataset import joined, load_training_data
from falcon_hf.training.distillation_folder import save_dataset
from falcon_hf.training.feature_source import default_cache_folder, prepare_features
from falcon_hf.training.features import FeatureCache, cache_key, compute_features, target_digest
from falcon_hf.training.pipeline import train_drafter
from falcon_hf.training.plan import TrainingPlan

from .conftest import VOCAB
from .test_pipeline import arguments, plan_of, text_file

__all__ = ["text_file"]


@pytest.fixture
def distilled(tiny_target, text_file, tmp_path):
    """A distillation's folder with features, and the features of each dialogue."""
    folder = tmp_path / "distilled"
    folder.mkdir()
    target, states = tiny_target(VOCAB), []
    with (folder / "dialogues.jsonl").open("w") as file:
        for number, line in enumerate(map(json.loads, text_file.read_text().splitlines())):
            learned = line["loss_mask"].index(1)
            row = {"n": number, "p": line["input_ids"][:learned], "r": line["input_ids"][learned:]}
            file.write(json.dumps(row) + "\n")
            ids = torch.tensor([line["input_ids"]])
            states.append(compute_features(target, ids, torch.ones_like(ids))[0].bfloat16())
    with (folder / "features.bfloat16").open("wb") as file:
        file.write(torch.cat(states).view(torch.int16).numpy().tobytes())
    settings = {"settings": {"feature_layers": [2]}, "target_digest": target_digest(target)}
    (folder / "recipe.json").write_text(json.dumps(settings))
    save_dataset(folder)
    return folder, states


@pytest.fixture
def silent_target(tiny_target):
    """A target that must not be asked for anything."""
    target = copy.deepcopy(tiny_target(VOCAB))
    target.forward = lambda *_, **__: pytest.fail("the target was asked")
    return target


def test_a_cache_that_broke_off_goes_on_with_distilled_features(tiny_target, silent_target, distilled, tmp_path):
    """No forward of the target is done for what came with the text."""
    (folder, states), said = distilled, []
    data = load_training_data(folder, VOCAB, 512)
    key, cache = cache_key(tiny_target(VOCAB), data, 512, None), tmp_path / "cache"
    FeatureCache.build(cache, tiny_target(VOCAB), data, key, shard_bytes=64 * 2 * 150)
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps({**index, "complete": False}))
    (cache / index["shards"][-1]["file"]).unlink()
    plan = plan_of(folder, tmp_path)
    features = prepare_features(plan, silent_target, [data], data, None, said.append)
    assert any("came with the text" in line for line in said)
    assert torch.equal(features.rows(len(data) - 1), states[-1])
    said.clear()
    prepare_features(plan, silent_target, [data], data, None, said.append)  # the control: nothing is lacking
    assert not any("came with the text" in line for line in said)


def test_each_of_several_texts_has_its_own_features(
    tiny_target, silent_target, tiny_text, text_file, distilled, tmp_path, monkeypatch
):
    """One came with features, another's are of an earlier run, and a third's are computed: no others are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (folder, states), target, said = distilled, tiny_target(VOCAB), []
    lines = text_file.read_text().splitlines(keepends=True)
    earlier, fresh = tmp_path / "earlier.jsonl", tmp_path / "fresh.jsonl"
    earlier.write_text("".join(lines[:9]))
    fresh.write_text("".join(lines[9:12]))
    texts = [load_training_data(path, VOCAB, 512) for path in (folder, earlier, fresh)]
    key = cache_key(target, texts[1], 512, None)
    FeatureCache.build(default_cache_folder(key), target, texts[1], key)
    plan = TrainingPlan([folder, earlier], tmp_path / "drafter")
    both = joined(texts[:2])
    cache = prepare_features(plan, silent_target, texts[:2], both, None, said.append)
    wanted = [*states, *states[:9]]
    assert all(torch.equal(cache.rows(row), state) for row, state in enumerate(wanted))
    assert [f"those of {path}" in " ".join(said) for path in (folder, earlier)] == [True, True]
    asked = []
    monkeypatch.setattr(feature_source.FeatureCache, "build", _with_small_shards(FeatureCache.build, 64 * 2 * 150))
    monkeypatch.setattr(
        "falcon_hf.training.features.compute_features",
        lambda target, ids, *rest: asked.extend(ids) or compute_features(target, ids, *rest),
    )
    plan = TrainingPlan([fresh, folder], tmp_path / "drafter", cache=tmp_path / "cache")
    all_three = joined([texts[2], texts[0]])
    cache = prepare_features(plan, target, [texts[2], texts[0]], all_three, None, said.append)
    wanted = [*states[9:12], *states]
    assert all(torch.allclose(cache.rows(row).float(), state.float(), atol=0.02) for row, state in enumerate(wanted))
    assert 3 <= len(asked) < len(all_three) / 2  # the shard with the new text in it


def _with_small_shards(build, size):
    return lambda *args, **kwargs: build(*args, **kwargs, shard_bytes=size)


def test_features_go_to_disk_only_if_half_of_it_is_free(tiny_target, text_file, tmp_path, monkeypatch):
    """All that is to be kept counts, the laws too."""
    target, said, asked = tiny_target(VOCAB), [], []
    for fits in (False, True):
        monkeypatch.setattr(feature_source, "cache_fits", lambda folder, size, fits=fits: asked.append(size) or fits)
        folder = tmp_path / str(fits)
        plan = plan_of(text_file, folder)
        train_drafter(plan, arguments(folder, max_steps=1, eval_strategy="no"), target, report=said.append)
        assert (folder / "cache" / "index.json").is_file() == fits
    assert sum("on the fly" in line for line in said) == 1
    kept = sum(path.stat().st_size for path in (tmp_path / "True" / "cache").rglob("*.safetensors"))
    assert asked == [asked[0]] * 2
    assert kept == pytest.approx(asked[0], rel=0.1)


def test_laws_that_are_not_kept_need_no_room(tiny_target, text_file, tmp_path, monkeypatch):
    """Those of a head with a softcap."""
    target, said, asked = copy.deepcopy(tiny_target(VOCAB)), [], []
    monkeypatch.setattr(feature_source, "cache_fits", lambda folder, size: asked.append(size) or True)
    for softcap in (None, 30.0):
        target.config.final_logit_softcapping = softcap
        folder = tmp_path / str(softcap)
        plan = plan_of(text_file, folder)
        train_drafter(plan, arguments(folder, max_steps=1, eval_strategy="no"), target, report=said.append)
    assert asked[1] < 0.6 * asked[0]
    assert sum("not kept: its head has a softcap" in line for line in said) == 1
    assert not list((tmp_path / "30.0" / "cache").glob("laws-*"))
