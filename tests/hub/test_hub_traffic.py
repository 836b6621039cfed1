"""A real upload and download: huggingface_hub's own HTTP calls against a server on this machine."""

from __future__ import annotations

import re

import pytest

from .hub_server import HubServer
from .isolated import run_isolated

VOCAB = 24
REPO = "some-org/falcon-drafter.v1_tiny"

PUSH = """
    import json, sys
    import torch
    import falcon_hf

    folder, repo = sys.argv[1:]
    drafter = falcon_hf.FalconDrafter.from_pretrained(folder)
    urls = [drafter.push_to_hub(repo, tags=["a-tag"], commit_message="first")]
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.mul_(0.5)
    urls.append(drafter.push_to_hub(repo, max_shard_size="60KB"))
    urls.append(drafter.push_to_hub(repo, revision="experiments/one", tags=["b-tag"]))
    urls.append(drafter.push_to_hub(repo, create_pr=True))
    drafter.save_pretrained("named-by-folder", push_to_hub=True, repo_id=repo + "-2", private=True)
    print(json.dumps(urls))
"""

PULL = """
    import json, os, sys
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    target_folder, repo, first = sys.argv[1:]
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    ids = torch.tensor([[3, 9, 4, 1, 7]])
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = target.generate(ids, **options).tolist()

    config = AutoConfig.from_pretrained(repo, revision=first, trust_remote_code=True)
    drafters = {
        "main": AutoModel.from_pretrained(repo, trust_remote_code=True),
        "first": AutoModel.from_pretrained(repo, trust_remote_code=True, revision=first),
    }
    for drafter in drafters.values():
        assert target.generate(ids, assistant_model=drafter, **options).tolist() == plain
        assert drafter.last_generation.rounds > 0

    class Streamer(BaseStreamer):
        got, ended = 0, False
        def put(self, value):
            self.got += value.numel()
        def end(self):
            self.ended = True

    def weights(drafter):
        return drafter.layers[0].mlp.up_proj.weight.abs().mean().item()

    # The second way in: the repo's name, with and without a revision.
    for revision in (None, first):
        streamer = Streamer()
        hub = {} if revision is None else {"revision": revision}
        out = target.generate(
            ids, custom_generate=repo, trust_remote_code=True, streamer=streamer, **options, **hub
        )
        assert out.tolist() == plain
        assert streamer.got == out.numel() and streamer.ended
    loaded = [
        drafter for name, module in sys.modules.items() if name.endswith("custom_generate.generate")
        for _, drafter in module._drafters.values()
    ]
    # By the name alone: the recipe called without generate(), as load_custom_generate allows.
    recipe = target.load_custom_generate(repo, trust_remote_code=True)
    assert recipe(model=target, inputs=ids, **options).tolist() == plain
    print(json.dumps({
        "weights": {name: weights(drafter) for name, drafter in drafters.items()},
        "custom": [weights(drafter) for drafter in loaded],
        "modules": [type(drafter).__module__ for drafter in loaded],
        "stamp": config.code_stamp,
    }))
"""

COMMANDS = """
    import json, shutil, sys
    from pathlib import Path
    from huggingface_hub import HfApi
    from falcon_hf.drafter_loading import DrafterError, load_drafter

    folder, repo = sys.argv[1:]
    good = [type(load_drafter(repo, trust_remote_code=trusted)).__module__ for trusted in (False, True)]
    api, refused = HfApi(), {}
    for name in ("truncated", "another-kind"):
        copy = Path(shutil.copytree(folder, name))
        if name == "truncated":
            path = copy / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-1000])
        else:
            path = copy / "config.json"
            path.write_text(path.read_text().replace('"falcon_drafter"', '"llama"'))
        api.create_repo(repo + name)
        api.upload_folder(repo_id=repo + name, folder_path=copy)
        try:
            load_drafter(repo + name)
        except DrafterError as error:
            refused[name] = str(error)
    print(json.dumps({"good": good, "refused": refused}))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_target, tiny_drafter):
    folder = tmp_path_factory.mktemp("traffic")
    target = tiny_target(VOCAB)
    target.save_pretrained(folder / "target")
    tiny_drafter(target, 2).save_pretrained(folder / "drafter")
    return folder


def test_push_pull_by_revision_and_offline(hub, folders):
    import json

    online = hub.environment | {"HF_HUB_OFFLINE": "0"}
    urls = json.loads(run_isolated(PUSH, folders, folders / "drafter", REPO, block=False, **online).splitlines()[-1])
    repo = hub.repos[REPO]
    first, second, branch = (re.fullmatch(rf"{hub.endpoint}/{REPO}/commit/(\w+)", url)[1] for url in urls[:3])
    assert urls[3] == f"{hub.endpoint}/{REPO}/discussions/1"
    assert repo.branches == {
        "main": second, "experiments/one": branch, "refs/pr/1": repo.branches["refs/pr/1"],
    }  # fmt: skip
    assert {"config.json", "model.safetensors", "custom_generate/generate.py", "README.md"} <= set(repo.commits[first])
    assert "model.safetensors.index.json" in repo.commits[second], "sharded"
    assert repo.commits[first]["README.md"] == repo.commits[second]["README.md"], "a card that is there is kept"
    assert b"\n- a-tag\n" in repo.commits[first]["README.md"]
    tagged = repo.commits[branch]["README.md"]
    assert {"- a-tag", "- b-tag"} <= set(tagged.decode().splitlines()), "but for tags"
    assert "model.safetensors" in hub.repos[f"{REPO}-2"].commits[hub.repos[f"{REPO}-2"].branches["main"]]
    assert ("POST", f"/{REPO}.git/info/lfs/objects/batch") in hub.calls

    pulled = json.loads(run_isolated(PULL, folders, folders / "target", REPO, first, **online).splitlines()[-1])
    assert pulled["weights"]["main"] == pytest.approx(pulled["weights"]["first"] / 2, rel=1e-5)
    assert pulled["custom"] == [pulled["weights"]["main"], pulled["weights"]["first"]]
    assert all(name.startswith("transformers_modules.some_hyphen_org.") for name in pulled["modules"])
    assert pulled["stamp"]

    calls = len(hub.calls)
    again = run_isolated(PULL, folders, folders / "target", REPO, first, HF_HUB_OFFLINE="1")
    assert json.loads(again.splitlines()[-1]) == pulled
    assert len(hub.calls) == calls, "the cache is enough"


def test_the_commands_look_through_a_downloaded_repo(hub, folders):
    import json

    online = hub.environment | {"HF_HUB_OFFLINE": "0"}
    run_isolated(PUSH, folders, folders / "drafter", "org/looked-through", block=False, **online)
    before = len(hub.calls)
    found = json.loads(
        run_isolated(COMMANDS, folders, folders / "drafter", "org/looked-through", block=False, **online).splitlines()[
            -1
        ]
    )
    own, repos = found["good"]
    assert own == "falcon_hf.runtime.modeling_falcon_drafter"
    assert repos.startswith("transformers_modules.")
    assert "truncated" in found["refused"]["truncated"]
    assert "'llama'" in found["refused"]["another-kind"]
    asked = [path for method, path in hub.calls[before:] if method == "GET" and "another-kind/resolve" in path]
    assert asked
    assert all(path.endswith("config.json") for path in asked), "what is no drafter is not downloaded"
