"""Malformed and hostile repos: one clear line each, nothing run, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import HF_MODULES_CACHE

from falcon_hf import FalconDrafter
from falcon_hf.drafter_loading import DrafterError, load_drafter

from ..runtime.helpers import prompt_ids

VOCAB = 24


def set_config(**changes):
    def change(folder):
        settings = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            settings[name] = value(settings[name]) if callable(value) else value
        (folder / "config.json").write_text(json.dumps(settings))

    return change


def set_weights(change_them):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        weights = {name: weight.clone() for name, weight in weights.items()}
        change_them(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def write(name, content):
    def change(folder):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def both(*changes):
    def change(folder):
        for each in changes:
            each(folder)

    return change


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def index(**weight_map):
    return both(
        remove("model.safetensors"), write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    )


class Bomb:
    """Unpickling it makes a file in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("canary-pickle",)


def auto_map(config="configuration_falcon_drafter.FalconDrafterConfig", model="modeling_falcon_drafter.FalconDrafter"):
    return set_config(auto_map={"AutoConfig": config, "AutoModel": model})


DAMAGED = {
    "no config": (remove("config.json"), "no config.json"),
    "config no JSON": (write("config.json", "{,"), "config.json is not JSON"),
    "config deeply nested": (write("config.json", "[" * 100_000), "config.json is not JSON"),
    "config a list": (write("config.json", "[]"), "not a JSON object"),
    "config not text": (write("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
    "other kind": (set_config(model_type="llama"), "model_type is 'llama'.*falcon-hf convert"),
    "unknown field": (set_config(block_sice=2), "no field 'block_sice'; did you mean 'block_size'"),
    "impossible value": (set_config(block_size=0), "block_size must be an integer of at least 1"),
    "wrong type": (set_config(hidden_size="wide"), "hidden_size"),
    "a word for a number": (set_config(rms_norm_eps="small"), "rms_norm_eps must be float, got 'small'"),
    "infinite": (set_config(embedding_scale=float("inf")), "embedding_scale must be float, got inf"),
    "dtype a list": (set_config(dtype=[1]), "not a name such as 'bfloat16'"),
    "fingerprint of words": (set_config(target_fingerprint=["a"]), "target_fingerprint must be None or a list"),
    "tree no tree": (set_config(tree=[[0, 0]]), "tree must be None"),
    "future format": (set_config(format_version=9, brand_new=1), "has format 9.*upgrade falcon_hf"),
    "no weights": (remove("model.safetensors"), "no weights.*fetch the repo again"),
    "pickle only": (
        both(remove("model.safetensors"), write("pytorch_model.bin", pickle.dumps(Bomb()))),
        "pickle.*never opened here.*falcon-hf convert",
    ),
    "pickle named safetensors": (write("model.safetensors", pickle.dumps(Bomb())), "truncated or damaged"),
    "truncated": (truncate, "truncated or damaged.*fetch the repo again"),
    "huge header": (write("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "truncated or damaged"),
    "not finite": (
        set_weights(lambda weights: weights["layers.0.mlp.up_proj.weight"].view(-1)[7].fill_(float("nan"))),
        "up_proj.weight has values that are not finite",
    ),
    "weight missing": (set_weights(lambda weights: weights.pop("fusion.lstm.weight_hh_l1")), "weight_hh_l1.*missing"),
    "weight of other shape": (
        set_weights(lambda weights: weights.update({"layers.0.mlp_norm.weight": torch.ones(3)})),
        r"mlp_norm.weight has shape \[3\], its config wants \[64\]",
    ),
    "config of another size": (set_config(hidden_size=10**7), "config wants"),
    "a billion layers": (set_config(num_hidden_layers=10**9), "1000000000 layers"),
    "index out of the folder": (index(a="../outside.safetensors"), "no safetensors file of its own folder"),
    "index absolute": (index(a="/etc/passwd"), "no safetensors file of its own folder"),
    "index to a pickle": (index(a="pytorch_model.bin"), "no safetensors file of its own folder"),
    "shard missing": (index(a="model-00001-of-00002.safetensors"), "lacks the weight file model-00001"),
    "index empty": (both(remove("model.safetensors"), write("model.safetensors.index.json", "{}")), "no weight_map"),
    "draft vocabulary out of range": (
        set_weights(lambda weights: weights["draft_vocab_ids"][-1:].fill_(VOCAB)), "draft_vocab_ids are not ascending",
    ),
    "draft vocabulary unsorted": (
        set_weights(lambda weights: weights["draft_vocab_ids"][:2].fill_(5)), "draft_vocab_ids are not ascending",
    ),
}  # fmt: skip
HOSTILE_CODE = {
    "no code": (set_config(auto_map=None), "no code of its own to trust.*leave trust_remote_code out"),
    "code for one class": (set_config(auto_map={"AutoModel": "a.FalconDrafter"}), "no code of its own to trust"),
    "code of another repo": (auto_map(model="evil/repo--modeling_falcon_drafter.FalconDrafter"), "in its own repo"),
    "code out of the folder": (auto_map(model="../evil.FalconDrafter"), "in its own repo"),
    "code with a path": (auto_map(config="/tmp/evil.FalconDrafterConfig"), "in its own repo"),
    "another class": (auto_map(model="modeling_falcon_drafter.Canary"), "sends AutoModel to"),
    "not a name": (auto_map(model=["modeling_falcon_drafter.FalconDrafter"]), "sends AutoModel to"),
    "code missing": (remove("modeling_falcon_drafter.py"), "lacks modeling_falcon_drafter.py"),
    "no Python": (write("modeling_falcon_drafter.py", "def ("), "no Python"),
}
CANARY = "import os\nos.mkdir('canary-code')\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_target, tiny_drafter):
    folder = tmp_path_factory.mktemp("good") / "drafter"
    tiny_drafter(tiny_target(VOCAB), 2, draft_vocab_size=12).save_pretrained(folder)
    return folder


@pytest.fixture
def repo(good, tmp_path, monkeypatch):
    """A copy of a good repo whose code files all sing if they are run; the working directory is watched."""
    import shutil

    shutil.copytree(good, tmp_path / "drafter")
    for path in (tmp_path / "drafter").glob("*.py"):
        text = path.read_text()
        path.write_text(
            text.replace("from __future__ import annotations\n", f"from __future__ import annotations\n{CANARY}")
        )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "drafter"


def tree(folder):
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(repo, match, trust):
    before, modules = tree(repo), tree_of_modules()
    with pytest.raises(DrafterError, match=match) as caught:
        load_drafter(repo, trust_remote_code=trust)
    assert "\n" not in str(caught.value)
    assert str(repo) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert tree(repo) == before, "the repo was written to"
    assert os.listdir() == [], "something of it was run"
    assert tree_of_modules() == modules, "its code was copied"


def tree_of_modules():
    from pathlib import Path

    return tree(Path(HF_MODULES_CACHE)) if os.path.isdir(HF_MODULES_CACHE) else {}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(repo, name):
    change, match = DAMAGED[name]
    change(repo)
    refused(repo, match, trust=False)


@pytest.mark.parametrize("name", HOSTILE_CODE)
def test_hostile_code_is_not_run_even_if_trusted(repo, name):
    change, match = HOSTILE_CODE[name]
    change(repo)
    refused(repo, match, trust=True)


@pytest.mark.parametrize("name", ["truncated", "pickle only", "index out of the folder", "shard missing", "other kind"])
def test_damaged_and_trusted(repo, name):
    """With trust the damage is found before the code is run."""
    change, match = DAMAGED[name]
    change(repo)
    refused(repo, match, trust=True)


@pytest.mark.parametrize("name", ["pickle only", "pickle named safetensors", "not finite", "weight missing"])
def test_the_class_itself_refuses(repo, name):
    """Without the folder being looked through first, as ``AutoModel`` loads it."""
    change, _ = DAMAGED[name]
    change(repo)
    with pytest.raises(Exception, match=r"safetensors|finite|incomplete|[Hh]eader"):
        FalconDrafter.from_pretrained(repo)
    assert os.listdir() == []


def test_controls(repo, good):
    """A good repo loads; the canaries sing where code is run; the bomb goes off where a pickle is opened."""
    assert load_drafter(good) is not None
    with pytest.warns(match="not the code its weights were saved with"):
        load_drafter(repo)
    assert os.listdir() == []
    with pytest.raises(DrafterError, match="canary-code"):  # every file makes the folder, the second cannot
        load_drafter(repo, trust_remote_code=True)
    assert os.listdir() == ["canary-code"]
    pickle.loads(pickle.dumps(Bomb()))
    assert sorted(os.listdir()) == ["canary-code", "canary-pickle"]


def test_another_vocabulary_is_refused_before_any_token(good, tiny_target):
    drafter = load_drafter(good)
    with pytest.raises(ValueError, match=r"vocabulary of 24 tokens.*Use a drafter trained for this target"):
        tiny_target(48).generate(prompt_ids(48, 4), assistant_model=drafter, max_new_tokens=4)


def test_loading_neither_connects_nor_writes_nor_runs(good):
    """What importing and loading does, as Python's audit events tell: no socket, no new file, no exec, no process."""
    from .isolated import run_isolated

    script = """
        import os, sys
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        torch.zeros(2).sum()
        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)  # fills the module cache, as transformers does
        for name in [name for name in sys.modules if "transformers_modules" in name]:
            del sys.modules[name]
        events = []
        def hook(event, arguments):
            if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "pickle.")):
                events.append((event, str(arguments)[:200]))
            if event == "open" and (
                isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
                or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ) and "__pycache__" not in str(arguments[0]):
                events.append((event, str(arguments)[:200]))
        sys.addaudithook(hook)
        drafter = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        found = list(events)
        assert not found, found
        open("control", "w").close()
        assert events, "the control: the hook sees a file being written"
    """
    run_isolated(script, good.parent, good)
