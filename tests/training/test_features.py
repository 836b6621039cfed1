"""The feature cache: what it holds, and that whatever happens to it is an error, with nothing lost."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from falcon_hf.training import features as module
from falcon_hf.training.errors import TrainingError
from falcon_hf.training.features import (
    FeatureCache,
    cache_fits,
    cache_key,
    compute_features,
    estimate_bytes,
    feature_width,
    free_bytes,
    held_digest,
    is_complete,
    target_digest,
)
from falcon_hf.training.laws import LawCache, compute_laws
from falcon_hf.training.losses import DraftHead

from .conftest import VOCAB, make_text

SHARD = 64 * 2 * 150  # a few dialogues each


def row_ids(text, row):
    return torch.from_numpy(text.tokens[text.offsets[row] : text.offsets[row + 1]]).long()[None]


def build(folder, target, text, layers=None, **given):
    return FeatureCache.build(folder, target, text, cache_key(target, text, 512, layers), layers, **given)


@pytest.fixture
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_cached_features_are_the_targets(target, tiny_text, tmp_path, layers):
    seen = []
    cache = build(tmp_path, target, tiny_text, layers, shard_bytes=SHARD, progress=lambda *given: seen.append(given))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert len(cache) == len(tiny_text)
    assert seen[-1] == (len(tiny_text.tokens), len(tiny_text.tokens))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for row in (0, 7, 8, 39):
        ids = row_ids(tiny_text, row)
        with torch.no_grad():
            states = target(ids, output_hidden_states=True).hidden_states
        alone = states[-1][0] if layers is None else torch.cat([states[layer][0] for layer in layers], dim=-1)
        held = cache.rows(row)
        assert held.dtype == torch.bfloat16
        assert held.shape == (ids.shape[1], feature_width(target, layers))
        assert torch.allclose(held.float(), alone, atol=0.03, rtol=0.01)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total == pytest.approx(estimate_bytes(len(tiny_text.tokens), feature_width(target, layers)), rel=0.05)


def test_padding_does_not_touch_features(target, tiny_text):
    ids = row_ids(tiny_text, 0)
    padded = torch.cat((ids, torch.full((1, 5), 3)), dim=1)
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    alone = compute_features(target, ids, torch.ones_like(ids))
    assert torch.allclose(compute_features(target, padded, mask)[:, : ids.shape[1]], alone, atol=1e-4)


class StoppedError(RuntimeError):
    pass


def test_a_cache_that_broke_off_goes_on(target, tiny_text, tmp_path):
    def stop(done, whole):
        if done > whole // 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        build(tmp_path, target, tiny_text, shard_bytes=SHARD, progress=stop)
    with pytest.raises(TrainingError, match="not finished"):
        FeatureCache.open(tmp_path, cache_key(target, tiny_text, 512, None))
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert kept
    begins = []
    cache = build(tmp_path, target, tiny_text, progress=lambda done, _: begins.append(done))
    assert begins[0] > len(tiny_text.tokens) // 4
    whole = build(tmp_path / "whole", target, tiny_text)
    assert all(torch.equal(cache.rows(row), whole.rows(row)) for row in range(len(cache)))
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_a_finished_cache_is_only_read(target, tiny_text, tmp_path):
    build(tmp_path, target, tiny_text, shard_bytes=SHARD)
    assert is_complete(tmp_path)
    before = sorted((path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir())
    assert len(build(tmp_path, target, tiny_text)) == len(tiny_text)
    assert sorted((path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()) == before
    (tmp_path / "features-00002.safetensors").unlink()
    assert not is_complete(tmp_path)
    assert not is_complete(tmp_path / "nowhere")


def test_a_truncated_shard(target, tiny_text, tmp_path):
    build(tmp_path, target, tiny_text, shard_bytes=SHARD)
    shard = tmp_path / "features-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(TrainingError, match=r"features-00001\.safetensors is missing or truncated"):
        FeatureCache.open(tmp_path, cache_key(target, tiny_text, 512, None))
    others = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors") if path != shard}
    build(tmp_path, target, tiny_text, shard_bytes=SHARD)
    assert shard.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


def test_a_target_that_changed(target, tiny_text, tmp_path):
    """One weight of one layer, a cast, another target: each is another target."""
    build(tmp_path, target, tiny_text)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    tuned = copy.deepcopy(target)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    for changed in (tuned, copy.deepcopy(target).bfloat16()):
        with pytest.raises(TrainingError, match="target has changed"):
            build(tmp_path, changed, tiny_text)
    assert target_digest(copy.deepcopy(target)) == target_digest(target)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before


def test_the_digest_of_ordinary_weights_stays_what_it_was():
    """What was stored with it is recognised by it."""
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6).view(2, 3))
        module.bias.fill_(0.5)
    assert target_digest(module) == "35c5ac760bf953c634bb9523894360c5822fee672b95a9584a190a8565760f45"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("embeddings", [False, True], ids=["", "embeddings"])
def test_a_quantised_target_has_a_digest(target, tmp_path, embeddings):
    """Weights of torchao take no views and strided slices."""
    quantization = pytest.importorskip("torchao.quantization")
    target.save_pretrained(tmp_path)

    def loaded(weights):
        config = TorchAoConfig(weights, include_input_output_embeddings=embeddings)
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)

    eight = quantization.Int8WeightOnlyConfig()
    four = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    digests = [held_digest(model) for model in (target, loaded(eight), loaded(eight), loaded(four))]
    assert digests[1] == digests[2]
    assert len({*digests}) == 3
    tuned = loaded(eight)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.scale.mul_(1.01)
    assert held_digest(tuned) != digests[1]


def test_an_offloaded_target_is_not_cached(target, tiny_text):
    """Its weights are not here to be hashed, so that nothing would tell them from another target's."""
    assert held_digest(target) == target_digest(target)
    offloaded = copy.deepcopy(target).to("meta")
    assert held_digest(offloaded) is None
    with pytest.raises(TrainingError, match="set features to 'live'"):
        cache_key(offloaded, tiny_text, 512, None)


def test_text_that_changed(target, tiny_text, tmp_path):
    build(tmp_path, target, tiny_text)
    with pytest.raises(TrainingError, match="text has changed"):
        build(tmp_path, target, make_text(target, 5, seed=7))
    with pytest.raises(TrainingError, match="other layers"):
        build(tmp_path, target, tiny_text, [1, 2])


def test_no_room_is_told_before_anything_is_computed(target, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    with pytest.raises(TrainingError, match=r"GB are free.*on the fly"):
        build(tmp_path / "cache", target, tiny_text, progress=lambda *_: pytest.fail("it computed"))
    assert not (tmp_path / "cache").exists()
    assert not cache_fits(tmp_path, 501)
    assert cache_fits(tmp_path, 500)


def test_a_disk_that_fills_up(target, tiny_text, tmp_path, monkeypatch):
    """The real error of a full disk, at the third shard: two stay, no piece lies about, and the next run goes on."""
    written, plain = [], module.save_file

    def save(tensors, path):
        if len(written) == 2:
            path.write_bytes(b"half a shard")
            raise OSError(28, "No space left on device")
        written.append(path)
        plain(tensors, path)

    monkeypatch.setattr(module, "save_file", save)
    with pytest.raises(TrainingError, match="No space left on device"):
        build(tmp_path, target, tiny_text, shard_bytes=SHARD)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["features-00000.safetensors", "features-00001.safetensors", "index.json"]
    monkeypatch.setattr(module, "save_file", plain)
    assert len(build(tmp_path, target, tiny_text, shard_bytes=SHARD)) == len(tiny_text)


def test_two_runs_may_fill_one_cache(target, tiny_text, tmp_path, monkeypatch):
    """The second begins, and ends, when the first has written a shard that has not its name yet."""
    plain = module.save_file
    head = DraftHead(target.lm_head.weight.detach().bfloat16())

    def filled():
        cache = build(tmp_path, target, tiny_text, shard_bytes=SHARD)
        return cache, LawCache.build(cache, head)

    others: dict[str, tuple[FeatureCache, LawCache]] = {}

    def save(tensors, path):
        plain(tensors, path)
        kind = path.name.split("-")[0]
        if kind not in others:
            others[kind] = ()
            others[kind] = filled()

    monkeypatch.setattr(module, "save_file", save)
    first, laws = filled()
    assert sorted(others) == [".features", ".laws"]
    for cache, other_laws in others.values():
        assert all(torch.equal(first.rows(row), cache.rows(row)) for row in (0, 20, 39))
        assert all(torch.equal(laws.rows(row)["labels"], other_laws.rows(row)["labels"]) for row in (0, 20, 39))
    assert all(not path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_laws_in_another_precision_are_others(target, tiny_text, tmp_path):
    """A float32 copy of a head in bfloat16 has its values, but not its laws."""
    cache = build(tmp_path, target, tiny_text)
    half = DraftHead(target.lm_head.weight.detach().bfloat16())
    whole = DraftHead(half.weight.float())
    rounded, exact = (LawCache.build(cache, head).rows(3)["negentropy"] for head in (half, whole))
    assert torch.allclose(exact, compute_laws(cache.rows(3).float(), whole).negentropy, atol=1e-6)
    assert not torch.allclose(exact, rounded, atol=1e-6)


def test_a_damaged_index(target, tiny_text, tmp_path):
    build(tmp_path, target, tiny_text)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(TrainingError, match="damaged"):
        build(tmp_path, target, tiny_text)
    (tmp_path / "index.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(TrainingError, match="damaged"):
        build(tmp_path, target, tiny_text)
    with pytest.raises(TrainingError, match="no feature cache"):
        FeatureCache.open(tmp_path / "nowhere", cache_key(target, tiny_text, 512, None))


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_laws_lie_beside_the_features(target, tiny_text, tmp_path):
    """Shard by shard, for each draft vocabulary; a truncated one is made anew."""
    cache = build(tmp_path, target, tiny_text, shard_bytes=SHARD)
    weight = target.lm_head.weight.detach()
    for ids in (range(24), range(4, 20)):
        head = DraftHead(weight[list(ids)].bfloat16())
        laws = LawCache.build(cache, head)
        for row in (0, 11, 39):
            expected = compute_laws(cache.rows(row), head)
            held = laws.rows(row)
            assert torch.equal(held["mean_rows"], expected.mean_rows)
            assert torch.equal(held["labels"], expected.labels)
            assert torch.allclose(held["negentropy"], expected.negentropy)
    folders = sorted(tmp_path.glob("laws-*"))
    assert len(folders) == 2
    shard = folders[0] / "laws-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    for ids in (range(24), range(4, 20)):
        LawCache.build(cache, DraftHead(weight[list(ids)].bfloat16()))
    assert shard.read_bytes() == content
