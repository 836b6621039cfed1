"""Results in a drafter's folder: listed once each, finished, and of this drafter as its config now is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from falcon_hf import FalconDrafterConfig
from falcon_hf.hub.errors import HubError
from falcon_hf.hub.recipe_file import read_recipe
from falcon_hf.hub.stored_results import check_result, result_files

FOLDER = next(path for path in sorted((Path(__file__).parents[2] / "hub_cards").iterdir()) if path.is_dir())
FILE = FOLDER / "benchmarks" / "gsm8k-float32-greedy.json"


@pytest.fixture
def config():
    return FalconDrafterConfig.from_pretrained(FOLDER)


@pytest.fixture
def result():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture
def weights(result):
    return result["settings"]["methods"]["falcon"]["weights_sha256"]


def test_results_that_the_recipe_leaves_out(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "a.json").write_text("{}")
    assert [path.name for path in result_files(tmp_path, {})] == ["a.json"]
    with pytest.raises(HubError, match="list each once"):
        result_files(tmp_path, {"card": {"results": []}})
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(HubError, match="is not a recipe"):
        read_recipe(tmp_path)


def test_a_result_of_this_drafter(result, config, weights):
    check_result(FILE, result, config, weights)


def test_an_unfinished_result(result, config, weights):
    with pytest.raises(HubError, match="is not finished"):
        check_result(FILE, result | {"complete": False}, config, weights)


def test_a_result_of_other_weights(result, config):
    with pytest.raises(HubError, match="no figures of these weights"):
        check_result(FILE, result, config, "ef" * 32)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.tree["dear_rows"].update(nodes=6),
        lambda config: setattr(config, "tree", [[0], [1]]),
        lambda config: setattr(config, "lookup", None),
        lambda config: setattr(config, "auto_off", True),
    ],
    ids=["nodes", "static", "look-up", "auto_off"],
)
def test_a_result_from_before_the_config_was_changed(result, config, weights, change):
    changed = copy.deepcopy(config)
    change(changed)
    with pytest.raises(HubError, match="falcon was measured with another tree or look-up"):
        check_result(FILE, result, changed, weights)


def test_rows_that_set_something_of_the_config_are_no_figures_of_it(result, config, weights):
    """A row of another name may have any tree."""
    methods = result["settings"]["methods"]
    methods["chain"] = methods.pop("falcon") | {"tree": [[0]]}
    del methods["falcon_compiled"]
    check_result(FILE, result, config, weights)
