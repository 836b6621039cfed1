"""Cards are generated, and every number and field in one is that of the files beside it."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from falcon_hf import FalconDrafter, FalconDrafterConfig
from falcon_hf.cli.publish import render_results
from falcon_hf.hub.cards import CardSource, build_card
from falcon_hf.hub.errors import HubError
from falcon_hf.hub.publish import prepare
from falcon_hf.hub.recipe_file import read_recipe
from falcon_hf.runtime.candidate_generator import config_tree
from falcon_hf.runtime.machine_trees import MachineTrees
from falcon_hf.tree_files import describe_tree

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path for path in (ROOT / "hub_cards").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestPublishedCards:
    def test_it_is_what_publish_writes(self, folder):
        assert not prepare(folder, render_results, check=True), "run falcon-hf publish on the folder"

    def test_front_matter(self, folder):
        data = ModelCard.load(folder / "README.md").data
        config = FalconDrafterConfig.from_pretrained(folder)
        assert data.base_model == config.target_name_or_path
        assert data.base_model_relation == "adapter"
        assert data.library_name == "transformers"
        assert data.pipeline_tag == "text-generation"
        assert {"custom_generate", "falcon-drafter", f"falcon-drafter-{config.vocab_size}x{config.hidden_size}"} <= set(
            data.tags
        )
        assert data.license
        assert data.language

    def test_evaluation_results_are_the_stored_ones(self, folder):
        data = ModelCard.load(folder / "README.md").data
        assert data.model_name == folder.name
        shown = {(entry.dataset_name, entry.metric_type): entry for entry in data.eval_results}
        stored = [json.loads(path.read_text()) for path in (folder / "benchmarks").glob("*.json")]
        measured = [(one, label) for one in stored for label in one["summary"] if label.startswith("falcon")]
        assert len(shown) == len(data.eval_results) == 4 * len(measured)
        for result, label in measured:
            figures = result["summary"][label]
            found = [
                {metric: shown[name, metric].metric_value for metric in ("speedup", "tau", "tau_with_bonus", "alpha")}
                for name in {name for name, _ in shown}
                if ("falcon" if "falcon" not in name else name.rpartition(", ")[2]) == label
                and shown[name, "tau"].dataset_type == Path(result["settings"]["questions"]["file"]).stem
                and shown[name, "tau"].dataset_args["options"] == result["settings"]["options"]
                and shown[name, "tau"].dataset_args["dtype"] == result["settings"]["target"]["dtype"]
                and shown[name, "tau"].dataset_args["batch_size"] == result["settings"]["batch_size"]
                and shown[name, "tau"].dataset_args["turns"] == result["settings"]["questions"]["turns"]
            ]
            assert found == [
                {
                    "speedup": round(figures["speed_ratio"]["median"], 4), "tau": round(figures["tau"], 4),
                    "tau_with_bonus": round(figures["tau_with_bonus"], 4), "alpha": round(figures["alpha"], 4),
                }
            ]  # fmt: skip

    def test_results_are_of_these_weights_and_this_config(self, folder):
        config = FalconDrafterConfig.from_pretrained(folder)
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for path in (folder / "benchmarks").glob("*.json"):
            settings = json.loads(path.read_text())["settings"]
            method = settings["methods"]["falcon"]
            assert method["weights_sha256"] == digest, path
            machine, dtype = settings["machine"], settings["target"]["dtype"]
            # As has_dear_rows on the machine that measured: these CPUs multiply bfloat16 fast if they have AVX-512.
            fast = machine["device"] != "cpu" or (machine["cpu_capability"] == "AVX512" and dtype == "bfloat16")
            tree = config_tree(config)
            if isinstance(tree, MachineTrees):
                tree = tree.where(dear=not fast).for_rows(settings["batch_size"])
            described = describe_tree(tree, config.block_size)["tree"]
            assert method["tree"] == {name: described[name] for name in method["tree"]}, path
            assert method["config"]["lookup"] == config.lookup, path
            assert (method["block_size"], method["fusion"]) == (config.block_size, config.fusion)
            assert settings["target"]["name"] == config.target_name_or_path

    def test_facts(self, folder):
        text = (folder / "README.md").read_text()
        config = FalconDrafterConfig.from_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            sizes = [file.get_slice(name).get_shape() for name in file.keys() if name != "draft_vocab_ids"]  # noqa: SIM118
        count = 0
        for shape in sizes:
            size = 1
            for length in shape:
                size *= length
            count += size
        assert f"| {count / 1e6:.1f} million, 16 bits each |" in text
        assert f"Block size k = {config.block_size}, {config.fusion} fusion" in text
        trees = config_tree(config)
        assert f"| tree | dynamic, {trees.where(dear=False).nodes} nodes at most, in " in text
        assert f" {trees.where(dear=True).nodes} nodes at most, in " in text
        assert (", candidates from the text among them |" in text) == (config.lookup is not None)
        assert f"drafting over {config.draft_vocab_size:,} tokens" in text


def small_source(**changes):
    config = FalconDrafterConfig(
        vocab_size=24, hidden_size=64, intermediate_size=96, num_attention_heads=4, block_size=3, fusion="lstm",
        target_name_or_path="some-org/some-model", target_model_type="llama",
    )  # fmt: skip
    return CardSource(
        **({"name": "a-drafter", "config": config, "parameters": 1_234_000, "bytes_per_weight": 4} | changes)
    )


@pytest.mark.parametrize(
    ("tree", "lookup", "words"),
    [
        ([[0], [1]], None, "| tree | 2 nodes |"),
        ({"kind": "dynamic", "nodes": 7}, None, "| tree | dynamic, 7 nodes at most, in 2 passes |"),
        ({"kind": "dynamic", "nodes": 7, "passes": 1}, {}, "in one pass, candidates from the text among them |"),
        (
            {"kind": "dynamic", "cheap_rows": {"nodes": 16}, "dear_rows": {"nodes": 5, "passes": 1}},
            None,
            "dynamic, 16 nodes at most, in 2 passes; on a CPU in float32, or without fast half precision, "
            "5 nodes at most, in one pass |",
        ),
        (
            {"kind": "dynamic", "cheap_rows": {"nodes": 5}, "dear_rows": {"nodes": 5, "batch_nodes": [[2, 3]]}},
            None,
            "| tree | dynamic, 5 nodes at most, in 2 passes |",
        ),
    ],
)
def test_a_card_says_what_the_tree_is(tree, lookup, words):
    source = small_source()
    source.config.tree, source.config.lookup = tree, lookup
    assert words in build_card(source)


def test_a_card_without_recipe_or_results_says_so():
    text = build_card(small_source())
    data = ModelCard(text).data
    assert data.base_model == "some-org/some-model"
    assert data.eval_results is None
    for words in ("Not measured yet", "No recipe was kept", "What the training used is not known",
                  "1.2 million, 32 bits", "the paper's tree", "Block size k = 3, LSTM fusion"):  # fmt: skip
        assert words in text
    assert "agreement table" not in text


def test_a_recipe_as_training_writes_it():
    recipe = {
        "made_with": {"falcon_hf": "0.1.0", "torch": "2.13.0"},
        "target": {"name": "some-org/some-model", "dtype": "float32"},
        "data": {"sha256": "ab" * 32, "dialogues": 1234, "learned_tokens": 56789, "held_out_dialogues": 100},
        "arguments": {"learning_rate": 0.001},
        "run": {"steps": 4222, "positions_seen": 5_000_000, "seconds": 7200.0},
        "curve": [{"loss": 1.0}, {"eval_top1": 0.426, "eval_runtime": 3.0}, {"train_runtime": 1}],
        "machine": {"cpu": "A CPU", "device": "cpu"},
        "card": {"license": "mit", "language": "en", "datasets": ["some/data"], "training": [["One", "paragraph."]]},
    }
    text = build_card(small_source(recipe=recipe))
    for words in ("| dialogues | 1,234 |", "| steps | 4,222 |", "| duration | 2.0 hours |",
                  "| held out: top1 | 0.426 |",
                  "One\nparagraph.", "Training took 2.0 hours on A CPU, cpu; emissions were not measured",
                  "| `learning_rate` | `0.001` |"):  # fmt: skip
        assert words in text
    assert "runtime" not in text
    data = ModelCard(text).data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["some/data"])


def test_a_target_in_a_folder_is_no_base_model():
    source = small_source()
    source.config.target_name_or_path = "/data/my-target"
    card = ModelCard(build_card(source))
    assert card.data.base_model is None
    assert "A drafter that makes `/data/my-target` generate faster" in card.content


def test_figures_of_other_weights_are_not_this_drafters(tmp_path):
    """A run may hold other drafters' rows beside this one's; and weights that were trained on have no figures yet."""
    result = json.loads((FOLDERS[0] / "benchmarks" / "gsm8k-float32-greedy.json").read_text())
    methods = result["settings"]["methods"]
    methods["k1"] = methods["falcon"] | {"weights_sha256": "cd" * 32}
    result["summary"]["k1"] = result["summary"]["falcon"]
    for weights, labels in (
        (methods["falcon"]["weights_sha256"], ["", ", falcon_compiled"]),
        ("cd" * 32, [", k1"]),
        ("ef" * 32, []),
    ):
        entries = ModelCard(build_card(small_source(results=[result], weights_sha256=weights))).data.eval_results or []
        assert {entry.dataset_config for entry in entries} == {f"float32, greedy{label}" for label in labels}
    folder = tmp_path / "drafter"
    shutil.copytree(FOLDERS[0], folder)
    prepare(folder, render_results)
    drafter = FalconDrafter.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        drafter.fusion.linear.weight.mul_(1.5)
    drafter.save_pretrained(folder)
    with pytest.raises(HubError, match=r"has no figures of these weights: measure anew"):
        prepare(folder, render_results)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"run": None}, "'run' must be a JSON object, got None"),
        ({"data": [1]}, "'data' must be a JSON object"),
        ({"card": {"limits": "English only."}}, "'card.limits' must be a list of texts, .*, got 'English only.'"),
        ({"card": {"training": "A paragraph."}}, "'card.training' must be a list"),
        ({"card": {"training": [3]}}, r"'card.training' must be a list of .*, got \[3\]"),
        ({"card": {"limits": [["a line", 3]]}}, "'card.limits' must be a list"),
        ({"card": {"results": None}}, "'card.results' must be a list of texts"),
        ({"card": {"results": [1]}}, "'card.results' must be a list of texts"),
        ({"card": {"language": 5}}, "'card.language' must be a text, or a list of texts, got 5"),
        ({"card": {"license": {}}}, "'card.license' must be a text"),
        ({"card": {"impact": [["two"], "lines"]}}, "'card.impact' must be a text, or a list of texts"),
        ({"curve": None}, "'curve' must be a list of JSON objects, got None"),
        ({"curve": [1.5]}, "'curve' must be a list of JSON objects"),
        ({"run": {"seconds": "2h"}}, "'run.seconds' must be a number, got '2h'"),
        ({"run": {"steps": True}}, "'run.steps' must be a number"),
        ({"data": {"sha256": ["ab"]}}, "'data.sha256' must be a text"),
        ({"target": {"dtype": ["bfloat16"]}}, "'target.dtype' must be a text"),
        ({"made_with": {"torch": [2, 13]}}, "'made_with' must be a JSON object of texts and numbers"),
        ({"machine": ["A CPU"]}, "'machine' must be a JSON object, or a text"),
        ({"machine": {"cpu": 2}}, "'machine.cpu' must be a text"),
    ],
)
def test_entries_of_another_kind_are_told(tmp_path, recipe, words):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(HubError, match=words):
        read_recipe(tmp_path)


def test_what_is_not_known_or_in_lines_is_taken(tmp_path):
    recipe = {
        "data": {"dialogues": None}, "run": {"seconds": None}, "machine": {"cpu": None}, "target": {"dtype": None},
        "card": {"license": None, "language": None, "impact": ["Two", "lines."], "limits": [["One", "bullet."]]},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    text = build_card(small_source(recipe=read_recipe(tmp_path)))
    assert "see its card.\n\nTwo\nlines.\n" in text
    assert "- One bullet.\n" in text
    assert "None" not in text
    (tmp_path / "recipe.json").write_text(json.dumps({"machine": "A CPU", "run": {"seconds": 60}}))
    assert "Training took 1 minutes on A CPU; emissions" in build_card(small_source(recipe=read_recipe(tmp_path)))


def test_results_of_several_machines_are_told_apart():
    """A model-index keeps one set of settings for what has one config."""
    result = json.loads((FOLDERS[0] / "benchmarks" / "gsm8k-float32-greedy.json").read_text())
    other = copy.deepcopy(result)
    other["settings"]["machine"]["device"] = "NVIDIA H200"
    weights = result["settings"]["methods"]["falcon"]["weights_sha256"]
    source = small_source(results=[result, other], weights_sha256=weights)
    entries = ModelCard(build_card(source)).data.eval_results
    hardware = {entry.dataset_config: entry.dataset_args["hardware"] for entry in entries}
    assert len(entries) == len({(entry.dataset_config, entry.metric_type) for entry in entries})
    assert "H200" in hardware["float32, greedy (2)"]
    assert "H200" not in hardware["float32, greedy"]


def of_other_questions(settings):
    settings["questions"]["count"] = 3


def of_another_file(settings):
    settings["questions"]["sha256"] = "cd" * 32


def of_other_seeds(settings):
    settings["seeds"] = [1, 2]


def repeated(settings):
    settings["repeats"] = 2


def with_other_attention(settings):
    settings["target"]["attention"] = "eager"


@pytest.mark.parametrize(
    "change", [of_other_questions, of_another_file, of_other_seeds, repeated, with_other_attention]
)
def test_results_of_other_questions_are_told_apart(change):
    """Results that differ in one thing are two entries of the model-index, not one with the first's settings."""
    result = json.loads((FOLDERS[0] / "benchmarks" / "gsm8k-float32-greedy.json").read_text())
    other = copy.deepcopy(result)
    change(other["settings"])
    weights = result["settings"]["methods"]["falcon"]["weights_sha256"]
    source = small_source(results=[result, other], weights_sha256=weights)
    entries = ModelCard(build_card(source)).data.eval_results
    args = {entry.dataset_config: entry.dataset_args for entry in entries}
    assert len(entries) == 2 * 4 * 2
    assert args["float32, greedy"] != args["float32, greedy (2)"]
    assert args["float32, greedy"]["questions"] == result["settings"]["questions"]["count"]
    assert args["float32, greedy"]["sha256"] == result["settings"]["questions"]["sha256"][:12]
