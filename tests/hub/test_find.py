"""A drafter is found by its target's name or fingerprint: in folders, in the cache, on the Hub, and offline."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

from falcon_hf import FalconDrafter, find_drafter
from falcon_hf.hub import find
from falcon_hf.hub.errors import HubError
from falcon_hf.hub.find import find_drafters

from .hub_server import HubServer
from .isolated import run_isolated

VOCAB = 24


@pytest.fixture
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.fixture
def family(target, tiny_target, tiny_drafter, tmp_path):
    """Folders: the target's own drafter, one of another target of the same shape, one of another shape, a model."""
    other, wide = tiny_target(VOCAB, seed=7), tiny_target(VOCAB, hidden_size=32)
    for name, model in (("b-own", target), ("a-other", other), ("c-wide", wide)):
        drafter = tiny_drafter(model, 2)
        drafter.config.target_name_or_path = f"org/{name}"
        drafter.save_pretrained(tmp_path / name)
    target.save_pretrained(tmp_path / "d-no-drafter")
    (tmp_path / "e-broken").mkdir()
    (tmp_path / "e-broken" / "config.json").write_text("{")
    return tmp_path


def fine_tuned(target, noise):
    import copy

    tuned = copy.deepcopy(target)
    with torch.no_grad():
        weight = tuned.get_input_embeddings().weight
        weight += noise * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    tuned.config._name_or_path = "someone/a-fine-tune"
    return tuned


def test_in_folders(target, tiny_target, family):
    own = str(family / "b-own")
    assert find_drafter(target, [family], hub=False) == own
    assert find_drafter(target, [family / "b-own"], hub=False) == own
    assert find_drafter(fine_tuned(target, 0.02), [family], hub=False) == own, "by its fingerprint"
    assert find_drafter("org/a-other", [family], hub=False) == str(family / "a-other"), "by the name alone"
    assert find_drafter(tiny_target(VOCAB, seed=7), [family], hub=False) == str(family / "a-other")
    (found,) = find_drafters(target, [family], hub=False)
    assert (found.source, found.same_name) == (own, False)
    assert found.distance < 1e-3


def test_none(target, family):
    for model in (fine_tuned(target, 1.0), "org/unknown"):
        with pytest.raises(HubError, match=r"No drafter for .* in 1 folders\. Train one with falcon-hf train"):
            find_drafter(model, [family], hub=False)


def test_a_name_that_lies(target, family):
    """The name fits, the fingerprint does not: another model under that name."""
    stranger = fine_tuned(target, 1.0)
    stranger.config._name_or_path = "org/b-own"
    assert find_drafters(stranger, [family], hub=False) == []


def test_a_target_in_a_relative_folder(target, family, monkeypatch):
    """Its drafter notes it with a dot (see ``target_name``), however it is asked for."""
    monkeypatch.chdir(family)
    drafter = FalconDrafter.from_pretrained("b-own")
    drafter.config.target_name_or_path = "./d-no-drafter"
    drafter.save_pretrained("b-own")
    assert find_drafter("d-no-drafter", [family], hub=False) == str(family / "b-own")
    own = type(target).from_pretrained("d-no-drafter")
    assert [found.same_name for found in find_drafters(own, [family], hub=False)] == [True]


def test_offline_says_so(target, family, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(find.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(find.constants, "is_offline_mode", lambda: True)
    with caplog.at_level(logging.WARNING), pytest.raises(HubError, match=r"the Hub \(not asked: offline\)"):
        find_drafter(target)
    assert "only what is on this machine was" in caplog.text
    assert find_drafter(target, [family]) == str(family / "b-own")


def test_a_repo_that_cannot_be_looked_into_ends_no_search(target, family, monkeypatch, tmp_path, caplog):
    """A gated one, or one without a config, among those with a drafter's tag."""

    class Api:
        def __init__(self, token=None):
            pass

        def list_models(self, filter, **_):
            return [SimpleNamespace(id=f"org/{name}") for name in ("no-config", "gated", "b-own")]

    def download(repo, file, token=None):
        if repo == "org/no-config":
            raise EntryNotFoundError("no config.json")
        if repo == "org/gated":
            raise GatedRepoError("ask first", response=SimpleNamespace(headers={}, request=None, status_code=403))
        return str(family / "b-own" / file)

    monkeypatch.setattr(find.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(find, "HfApi", Api)
    monkeypatch.setattr(find, "hf_hub_download", download)
    assert find_drafter(target) == "org/b-own"

    def broken_off(repo, file, token=None):
        asked.append(repo)
        raise LocalEntryNotFoundError("no connection")

    asked: list[str] = []
    monkeypatch.setattr(find, "hf_hub_download", broken_off)
    with caplog.at_level(logging.WARNING), pytest.raises(HubError):
        find_drafter(target)
    assert "The Hub was not searched" in caplog.text
    assert len(asked) == 1


SEARCH = """
    import json, os, sys
    import torch
    from transformers import AutoModelForCausalLM
    from falcon_hf import FalconDrafter, find_drafter
    from falcon_hf.hub.find import find_drafters

    folder, push = sys.argv[1], sys.argv[2] == "push"
    target = AutoModelForCausalLM.from_pretrained(folder + "/d-no-drafter")
    if push:
        for name in ("a-other", "b-own", "c-wide"):
            FalconDrafter.from_pretrained(f"{folder}/{name}").push_to_hub(f"tester/drafter-{name}")
    found = find_drafter(target)
    assert isinstance(FalconDrafter.from_pretrained(found), FalconDrafter)
    print(json.dumps([found, [each.source for each in find_drafters(target)],
                      [each.source for each in find_drafters("org/b-own")]]))
"""


def test_on_the_hub_and_then_in_its_cache(family):
    import json

    with HubServer() as hub:
        online = hub.environment | {"HF_HUB_OFFLINE": "0"}
        out = run_isolated(SEARCH, family, family, "push", block=False, **online)
        own = "tester/drafter-b-own"
        assert json.loads(out.splitlines()[-1]) == [own, [own], [own]]
        assert ("GET", "/api/models") in hub.calls
        calls = len(hub.calls)
        out = run_isolated(SEARCH, family, family, "offline", block=False, HF_HUB_OFFLINE="1")
        assert json.loads(out.splitlines()[-1]) == [own, [own], [own]]
        assert len(hub.calls) == calls
