"""Converted checkpoints give the published equations' features; what is no such checkpoint is refused unopened."""

from __future__ import annotations

import json
import logging
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

from falcon_hf import FalconDrafter
from falcon_hf.hub import convert as module
from falcon_hf.hub.convert import convert
from falcon_hf.hub.errors import HubError
from falcon_hf.hub.recurrence import is_as_drawn

from ..runtime.helpers import assert_same_text, prompt_ids
from .upstream import VOCAB, H, reference, settings, weights, write

LENGTH = 11


def ours(drafter, state, features, tokens):
    embeddings = state["embed_tokens.weight"][tokens]
    with torch.no_grad():
        return drafter(features[None], embeddings[None], torch.zeros(1, dtype=torch.long))[0]


def inputs(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LENGTH, H, generator=generator), torch.randint(0, VOCAB, (LENGTH,), generator=generator)


@pytest.mark.parametrize("recurrent", [True, False], ids=["lstm", "lstm_stateless"])
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize(
    "variant",
    [{}, {"attention_bias": True, "config": {"qkv_bias": True, "rope_theta": 1e6}, "rope": {"base": 1e6}}],
    ids=["llama", "qwen2"],
)
def test_falcon_features(tmp_path, k, recurrent, variant):
    state = weights("lstm", seed=k, attention_bias=variant.get("attention_bias", False))
    write(tmp_path, settings(k, **variant.get("config", {})), state)
    drafter = convert(tmp_path, "some-org/target", fusion="lstm" if recurrent else "lstm_stateless")
    assert (drafter.config.block_size, drafter.config.fusion_layers) == (k, 2)
    features, tokens = inputs()
    expected = reference(state, features, tokens, k, recurrent, **variant.get("rope", {}))
    found = ours(drafter, state, features, tokens)
    assert (found - expected).abs().max() < 1e-5
    # Controls: another block size, the other recurrence, and unswapped halves are each far off.
    assert (found - reference(state, features, tokens, k - 1, recurrent, **variant.get("rope", {}))).abs().max() > 1e-2
    assert (found - reference(state, features, tokens, k, not recurrent, **variant.get("rope", {}))).abs().max() > 1e-2
    broken = dict(state)
    broken["lstm.weight_ih_l0"] = torch.cat(state["lstm.weight_ih_l0"].split(H, dim=1)[::-1], dim=1)
    assert (found - reference(broken, features, tokens, k, recurrent, **variant.get("rope", {}))).abs().max() > 1e-2


def test_falcon_without_lstm_bias_and_with_scaled_rope(tmp_path):
    state = weights("lstm", fusion_bias=False)
    write(tmp_path, settings(2, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5), state)
    features, tokens = inputs()
    found = ours(convert(tmp_path, fusion="lstm"), state, features, tokens)
    assert (found - reference(state, features, tokens, 2, True, stretch=2.0)).abs().max() < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_eagle_features(tmp_path, bias):
    state = weights("fc", fusion_bias=bias)
    config = settings(1)
    del config["k_mask"]
    write(tmp_path, config, state | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    drafter = convert(tmp_path, "some-org/target")
    assert (drafter.config.block_size, drafter.config.fusion, drafter.config.fusion_bias) == (1, "linear", bias)
    features, tokens = inputs()
    found = ours(drafter, state, features, tokens)
    assert (found - reference(state, features, tokens, 1, False)).abs().max() < 1e-5
    assert (found - reference(state, features, tokens, 2, False)).abs().max() > 1e-2, "control: another mask"


@pytest.mark.parametrize("fusion", ["lstm", "fc"])
def test_a_converted_drafter_drafts_and_is_saved(tiny_target, tmp_path, fusion):
    target = tiny_target(VOCAB)
    state = weights(fusion) | {"embed_tokens.weight": target.get_input_embeddings().weight.detach().clone()}
    half = {name: weight.bfloat16() for name, weight in state.items()}
    write(tmp_path / "theirs", settings(3), half)
    drafter = convert(tmp_path / "theirs", "some-org/target", fusion="lstm" if fusion == "lstm" else None)
    assert drafter.dtype == torch.bfloat16, "as stored"
    drafter.save_pretrained(tmp_path / "ours")
    again = FalconDrafter.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    # The embedding gave the fingerprint, so no TargetMismatchWarning (pytest makes it an error).
    assert_same_text(target, again, prompt_ids(VOCAB, 5), max_new_tokens=16, do_sample=False)
    assert not any("embed" in name for name in again.state_dict())


class TestRecurrence:
    @pytest.mark.parametrize(
        ("config", "trained", "fusion", "words"),
        [
            ({}, False, "lstm_stateless", "training never reached them"),
            ({}, True, "lstm_stateless", "try --fusion lstm too"),
            ({"batch_first": True}, True, "lstm", "batch_first=True"),
            ({"batch_first": False}, True, "lstm_stateless", "batch_first=False"),
        ],
    )
    def test_judged_and_logged(self, tmp_path, caplog, config, trained, fusion, words):
        write(tmp_path, settings(2, **config), weights("lstm", trained=trained))
        with caplog.at_level(logging.WARNING, "falcon_hf"):
            drafter = convert(tmp_path)
        assert drafter.config.fusion == fusion
        assert f"Fusion: {fusion}, because" in caplog.text
        assert words in caplog.text

    def test_torch_leaves_this_trace(self):
        """Training as upstream does it (batch of one, default layout) never touches the recurrent matrices."""
        torch.manual_seed(0)

        def train(batch_first):
            lstm = torch.nn.LSTM(2 * H, H, num_layers=2, batch_first=batch_first)
            optimizer = torch.optim.AdamW(lstm.parameters(), lr=1e-2, weight_decay=0.1)
            for _ in range(20):
                optimizer.zero_grad()
                lstm(torch.randn(1, 8, 2 * H))[0].square().sum().backward()
                optimizer.step()
            return lstm

        upstream, recurrent = train(batch_first=False), train(batch_first=True)
        for layer in range(2):
            for dtype in (torch.float32, torch.bfloat16):
                assert is_as_drawn(getattr(upstream, f"weight_hh_l{layer}").detach().to(dtype))
                assert not is_as_drawn(getattr(recurrent, f"weight_hh_l{layer}").detach().to(dtype))


def test_a_target_in_a_relative_folder_is_no_repo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "theirs", settings(2), weights("lstm"))
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert convert("theirs", "models/llama").config.target_name_or_path == "./models/llama"
    assert convert("theirs", "org/llama").config.target_name_or_path == "org/llama"


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestRefusals:
    def refused(self, folder, match, **options):
        with pytest.raises(HubError, match=match) as caught:
            convert(folder, **options)
        assert "\n" not in str(caught.value)

    def test_a_pickle_with_more_than_tensors(self, tmp_path):
        write(tmp_path, settings(2), weights("lstm"))
        with open(tmp_path / "pytorch_model.bin", "wb") as file:
            pickle.dump({"lstm.weight_ih_l0": Bomb(tmp_path / "boom")}, file, protocol=2)
        self.refused(tmp_path, "Nothing of it was run")
        torch.save({"lstm.weight_ih_l0": Bomb(tmp_path / "boom")}, tmp_path / "pytorch_model.bin")
        self.refused(tmp_path, "Nothing of it was run")
        assert not (tmp_path / "boom").exists()
        torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # control: the bomb works
        assert (tmp_path / "boom").exists()

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda config, state: config.pop("k_mask"), "k_mask is None: add"),
            (lambda config, state: config.update(k_mask=20), "k_mask is 20"),
            (lambda config, state: config.update(num_hidden_layers=2), "2 decoder layers"),
            (lambda config, state: config.update(hidden_size=65), "do not fit|does not describe"),
            (lambda config, state: config.update(num_attention_heads="four"), "does not describe a drafter"),
            (lambda config, state: config.update(rope_scaling={"type": "yarn", "factor": 2.0}), "linear and dynamic"),
            (lambda config, state: state.pop("lstm.weight_hh_l1"), "do not fit"),
            (lambda config, state: state.pop("lstm.weight_ih_l0"), "no checkpoint of Falcon"),
            (lambda config, state: state.update({"midlayer.x": torch.ones(1), "fc.weight": torch.ones(1)}) or
                state.pop("lstm.weight_ih_l0"), "EAGLE-3"),
            (lambda config, state: state.update({"layers.0.other.weight": torch.ones(1)}), "no place for"),
            (lambda config, state: state["layers.0.mlp.up_proj.weight"].fill_(float("nan")), "not finite"),
        ],
    )  # fmt: skip
    def test_other_checkpoints(self, tmp_path, change, match):
        config, state = settings(2), weights("lstm")
        change(config, state)
        self.refused(write(tmp_path, config, state), match)

    def test_files(self, tmp_path):
        self.refused(tmp_path, "has no config.json")
        write(tmp_path, settings(2), weights("lstm"))
        whole = (tmp_path / "pytorch_model.bin").read_bytes()
        (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
        self.refused(tmp_path, "truncated or damaged")
        (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
        self.refused(tmp_path, "is no checkpoint.*Git LFS pointer")
        torch.save([1], tmp_path / "pytorch_model.bin")
        self.refused(tmp_path, "no dictionary of tensors")
        (tmp_path / "pytorch_model.bin").unlink()
        self.refused(tmp_path, "has neither model.safetensors nor pytorch_model.bin")
        (tmp_path / "config.json").write_text("{")
        self.refused(tmp_path, "is not JSON")
        (tmp_path / "config.json").write_text(json.dumps([]))
        self.refused(tmp_path, "not a JSON object")

    def test_fusion(self, tmp_path):
        write(tmp_path / "falcon", settings(2), weights("lstm"))
        self.refused(tmp_path / "falcon", "ask for lstm or lstm_stateless", fusion="linear")
        write(tmp_path / "eagle", settings(1), weights("fc"))
        self.refused(tmp_path / "eagle", "leave the fusion out", fusion="lstm")

    def test_the_hub(self, tmp_path, monkeypatch):
        """Not reached is not the same as not there, though the client's errors are of one class."""

        def given(error):
            def refuse(*_, **__):
                raise error

            monkeypatch.setattr(module, "hf_hub_download", refuse)

        given(LocalEntryNotFoundError("no connection"))
        self.refused("org/repo", "'org/repo' is no folder, and the Hub cannot be reached: try again")
        given(EntryNotFoundError("no such file"))
        self.refused("org/repo", "has no config.json")
        answer = SimpleNamespace(headers={}, request=None, status_code=404)
        given(RevisionNotFoundError("no such revision", response=answer))
        self.refused("org/repo", "repo 'org/repo' has no revision 'v2'", revision="v2")
        given(ConnectionError("no network"))
        self.refused("org/repo", "no such repo or cannot be reached")

    def test_offline_with_one_kind_of_weights_in_the_cache(self, tmp_path, monkeypatch):
        """Nobody can tell then that the other kind is not on the Hub, and nobody needs to."""
        write(tmp_path, settings(2), weights("lstm"))

        def cached(repo, name, revision=None):
            if not (tmp_path / name).is_file():
                raise LocalEntryNotFoundError("no connection")
            return str(tmp_path / name)

        monkeypatch.setattr(module, "hf_hub_download", cached)
        assert convert("org/repo").config.block_size == 2
        (tmp_path / "pytorch_model.bin").unlink()
        self.refused("org/repo", "the Hub cannot be reached")
