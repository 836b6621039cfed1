"""What ``save_pretrained`` writes: enough to be used without the package, the same each time, and told when edited."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, pipeline

from falcon_hf import CodeStampWarning, FalconDrafter, FalconDrafterConfig
from falcon_hf.runtime.remote_generate import _restored
from falcon_hf.runtime.remote_generate import generate as packaged_recipe
from falcon_hf.runtime.repo_files import code_files, code_stamp

from ..conftest import DRAFTER_FOLDER
from .isolated import run_isolated

VOCAB = 24


@pytest.fixture
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.fixture
def drafter(target, tiny_drafter):
    return tiny_drafter(target, 2, fusion_layers=1)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_holds_all_that_is_needed(drafter, tmp_path):
    drafter.config.target_name_or_path = "some-org/some-target"
    drafter.save_pretrained(tmp_path)
    files = contents(tmp_path)
    code = {path.name for path in code_files()}
    assert "modeling_falcon_drafter.py" in code
    assert set(files) == code | {
        "config.json", "model.safetensors", "README.md",
        "custom_generate/generate.py", "custom_generate/requirements.txt",
    }  # fmt: skip
    assert files["custom_generate/generate.py"] == files["remote_generate.py"]
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_falcon_drafter.FalconDrafterConfig",
        "AutoModel": "modeling_falcon_drafter.FalconDrafter",
    }
    assert config["code_stamp"] == code_stamp(tmp_path) == code_stamp()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some-org/some-target"
    assert card.data.base_model_relation == "adapter"
    assert {"custom_generate", "falcon-drafter", "falcon-drafter-24x64"} <= set(card.data.tags)
    assert "```python" in card.content


def test_a_card_that_is_there_is_kept(drafter, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    drafter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
def test_round_trip_is_byte_identical(drafter, tmp_path, shards):
    size = {"max_shard_size": "40KB"} if shards else {}
    drafter.save_pretrained(tmp_path / "one", **size)
    assert (tmp_path / "one" / "model.safetensors.index.json").exists() == shards
    FalconDrafter.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two", **size)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_another_form_of_weights_replaces_the_first(drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    with torch.no_grad():
        drafter.layers[0].mlp.up_proj.weight.mul_(0.5)
    drafter.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    loaded = FalconDrafter.from_pretrained(tmp_path)
    assert torch.equal(loaded.layers[0].mlp.up_proj.weight, drafter.layers[0].mlp.up_proj.weight)
    drafter.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert FalconDrafter.from_pretrained(tmp_path) is not None


WITHOUT_THE_PACKAGE = """
    import os, sys, warnings
    import torch
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.generation.streamers import BaseStreamer

    warnings.simplefilter("error")
    target = AutoModelForCausalLM.from_pretrained("target")
    ids = torch.tensor([[3, 9, 4, 1, 7]])

    class Streamer(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False
        def put(self, value):
            self.got += value.flatten().tolist()
        def end(self):
            self.ended = True

    letters = {chr(97 + token): token for token in range(24)}
    spelling = Tokenizer(BPE(letters, []))
    spelling.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling)

    def run(seed=0, **options):
        torch.manual_seed(seed)
        streamer = Streamer()
        out = target.generate(ids, streamer=streamer, **options)
        sequences = getattr(out, "sequences", out)
        assert streamer.ended and streamer.got == sequences.flatten().tolist()
        return out

    calls = {
        "greedy": dict(max_new_tokens=16, do_sample=False),
        "sampled": dict(max_new_tokens=16, do_sample=True, temperature=0.8, top_k=9),
        "penalty": dict(max_new_tokens=16, do_sample=False, repetition_penalty=1.3),
        "scores": dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_scores=True),
    }
    stop = run(max_new_tokens=24, do_sample=False)[0, 12].item()
    calls["stop string"] = dict(
        max_new_tokens=24, do_sample=False, stop_strings=[chr(97 + stop)], tokenizer=tokenizer
    )
    plain = {name: run(**options) for name, options in calls.items()}
    assert plain["stop string"].shape[1] < 29

    repo = os.path.abspath("a-drafter.1")
    before = sorted(os.listdir(repo))
    for name, options in calls.items():
        for where in (repo, "a-drafter.1"):
            found = run(custom_generate=where, trust_remote_code=True, **options)
            one, other = (getattr(out, "sequences", out).tolist() for out in (plain[name], found))
            assert one == other, name
        if name == "scores":
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain[name].scores, found.scores, strict=True))
    recipe = [module for name, module in sys.modules.items() if name.endswith("custom_generate.generate")]
    loaded = [drafter for _, drafter in recipe[0]._drafters.values()]
    assert len(recipe) == 1 and len(loaded) == 2, "loaded once for each spelling of the folder"
    os.utime(os.path.join(repo, "config.json"))
    run(custom_generate=repo, trust_remote_code=True, **calls["greedy"])
    kept = [drafter for _, drafter in recipe[0]._drafters.values()]
    assert len(kept) == 2 and kept[0] is not loaded[0], "a folder written anew replaces what it held"
    assert all(drafter.last_generation.accepted > 0 for drafter in loaded)

    drafter = AutoModel.from_pretrained(repo, trust_remote_code=True)
    assert type(drafter).__module__.startswith("transformers_modules.")
    assert AutoConfig.from_pretrained(repo, trust_remote_code=True).block_size == 2
    assert run(assistant_model=drafter, **calls["greedy"]).tolist() == plain["greedy"].tolist()
    assert drafter.last_generation.accepted > 0
    # A drafter passed by hand is the one that is used.
    run(custom_generate=repo, trust_remote_code=True, assistant_model=drafter, max_new_tokens=5, do_sample=False)
    assert drafter.last_generation.new_tokens == 5

    def refused(words, call, **options):
        try:
            call(**options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)

    refused("num_beams", run, custom_generate=repo, trust_remote_code=True, num_beams=2, max_new_tokens=4)
    refused("exclude each", run, custom_generate=repo, trust_remote_code=True, assistant_model=target, max_new_tokens=4)
    refused("trust_remote_code", run, custom_generate=repo, trust_remote_code=False, max_new_tokens=4)
    refused("assistant_model", target.load_custom_generate(repo, trust_remote_code=True), model=target, inputs=ids)

    drafter.save_pretrained("again")
    drafter.save_pretrained("sharded", max_shard_size="40KB")
    AutoModel.from_pretrained("sharded", trust_remote_code=True).save_pretrained("sharded-again", max_shard_size="40KB")
    assert sorted(os.listdir(repo)) == before, "loading writes nothing into the repo"
    assert not [name for name, module in sys.modules.items() if name.startswith("falcon_hf") and module is not None]
"""


def test_both_ways_in_without_the_package(target, tiny_drafter, tmp_path):
    target.save_pretrained(tmp_path / "target")
    from ..runtime.helpers import bushy_tree

    tiny_drafter(target, 2, tree=bushy_tree(VOCAB, 3, 12)).save_pretrained(tmp_path / "a-drafter.1")
    run_isolated(WITHOUT_THE_PACKAGE, tmp_path)
    assert contents(tmp_path / "again") == contents(tmp_path / "a-drafter.1")
    assert contents(tmp_path / "sharded-again") == contents(tmp_path / "sharded")


def test_the_recipe_in_the_packages_own_process(target, drafter, tmp_path):
    drafter.save_pretrained(tmp_path / "repo")
    ids = torch.tensor([[3, 9, 4, 1, 7]])
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = target.generate(ids, **options)
    out = target.generate(ids, custom_generate=str(tmp_path / "repo"), trust_remote_code=True, **options)
    assert out.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="pass it as assistant_model"):
        packaged_recipe(target, inputs=ids)


def test_names_come_back_from_module_names():
    from transformers.dynamic_module_utils import _sanitize_module_name

    for name in ("some-org", "a.b-c_d", "7b-drafter", "plain", "_x"):
        assert _restored(_sanitize_module_name(name)) == name


class TestStamp:
    def load(self, folder):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            FalconDrafter.from_pretrained(folder)
        return [entry for entry in caught if issubclass(entry.category, CodeStampWarning)]

    def test_untouched(self, drafter, tmp_path):
        drafter.save_pretrained(tmp_path)
        assert not self.load(tmp_path)

    @pytest.mark.parametrize("change", ["edited", "removed", "added import", "stamp"])
    def test_changed(self, drafter, tmp_path, change):
        drafter.save_pretrained(tmp_path)
        tree, config = tmp_path / "tree.py", tmp_path / "config.json"
        if change == "edited":
            tree.write_text(tree.read_text() + "\n")
        elif change == "removed":
            tree.unlink()
        elif change == "added import":
            (tmp_path / "other.py").write_text("")
            tree.write_text(tree.read_text() + "\nfrom .other import thing\n")
        else:
            config.write_text(config.read_text().replace(code_stamp(), "0" * 64))
        (warning,) = self.load(tmp_path)
        assert "save_pretrained" in str(warning.message)

    def test_a_config_without_stamp_says_nothing(self, drafter, tmp_path):
        drafter.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | {"code_stamp": None}))
        assert not self.load(tmp_path)

    def test_the_running_copy_is_checked(self, target, drafter, tmp_path):
        drafter.save_pretrained(tmp_path / "repo")
        tree = tmp_path / "repo" / "tree.py"
        tree.write_text(tree.read_text() + "\n")
        script = """
            import warnings
            from transformers import AutoModel
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                AutoModel.from_pretrained("repo", trust_remote_code=True)
            assert ["CodeStampWarning"] == [entry.category.__name__ for entry in caught], caught
        """
        run_isolated(script, tmp_path)


def test_later_formats_are_refused(drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"format_version": 2, "a_new_field": 1}))
    for load in (FalconDrafterConfig.from_pretrained, AutoConfig.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="upgrade falcon_hf, or load it with trust_remote_code=True"):
            load(tmp_path)


def test_pipeline(smollm2, trained_drafter):
    target, tokenizer = smollm2
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)("The moon is", **options)
    trained_drafter.last_generation = None
    fast = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=trained_drafter)
    assert fast("The moon is", **options) == plain
    assert trained_drafter.last_generation.accepted > 0
    recipe = {"custom_generate": str(DRAFTER_FOLDER), "trust_remote_code": True}
    assert pipeline("text-generation", model=target, tokenizer=tokenizer)("The moon is", **options, **recipe) == plain
