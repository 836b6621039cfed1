"""Each folder of ``hub_cards/`` is what a Hub repo holds: code, weights, config and card, in step with the source."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModel

from falcon_hf import FalconDrafterConfig
from falcon_hf.runtime.candidate_generator import config_tree
from falcon_hf.runtime.repo_files import code_stamp

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "src" / "falcon_hf" / "runtime"
FOLDERS = sorted(path for path in (ROOT / "hub_cards").iterdir() if path.is_dir())


def test_there_is_a_card():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestFolder:
    def test_its_code_is_the_runtime(self, folder):
        ours = {path.name: path.read_text() for path in RUNTIME.glob("*.py") if path.name != "__init__.py"}
        copies = {path.name: path.read_text() for path in folder.glob("*.py")}
        assert copies == ours, "the copies are stale: see CONTRIBUTING.md, refresh the code copies"

    def test_it_holds_nothing_else(self, folder):
        others = {path.name for path in folder.iterdir() if path.suffix != ".py" and path.name != "__pycache__"}
        assert others <= {
            "README.md",
            "config.json",
            "custom_generate",
            "model.safetensors",
            "benchmarks",
            "recipe.json",
        }

    def test_its_second_way_in_is_there(self, folder):
        names = {path.name for path in (folder / "custom_generate").iterdir() if path.name != "__pycache__"}
        assert names == {"generate.py", "requirements.txt"}
        assert (folder / "custom_generate" / "generate.py").read_text() == (RUNTIME / "remote_generate.py").read_text()

    def test_its_stamp_is_its_codes(self, folder):
        assert FalconDrafterConfig.from_pretrained(folder).code_stamp == code_stamp(folder) == code_stamp()

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
    def test_its_code_has_the_same_bytes_where_git_writes_other_line_ends(self, folder, tmp_path):
        names = [str(path.relative_to(ROOT)) for path in folder.glob("*.py")]
        git = ["git", "-C", str(ROOT), "-c", "core.autocrlf=true"]  # as on Windows
        subprocess.run([*git, "checkout-index", f"--prefix={tmp_path}/", *names], check=True)
        for name in names:
            assert b"\r" not in (tmp_path / name).read_bytes(), name

    def test_its_config_is_ours_and_complete(self, folder):
        config = FalconDrafterConfig.from_pretrained(folder)
        assert config.target_name_or_path
        assert config.target_fingerprint
        assert config_tree(config).size > 1
        entries = json.loads((folder / "config.json").read_text())["auto_map"]
        assert entries == {
            "AutoConfig": "configuration_falcon_drafter.FalconDrafterConfig",
            "AutoModel": "modeling_falcon_drafter.FalconDrafter",
        }

    def test_its_weights_are_the_drafters_alone(self, folder):
        path = folder / "model.safetensors"
        assert path.stat().st_size < 32e6
        drafter = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        assert set(weights) == set(drafter.state_dict())
        for name, weight in weights.items():
            assert weight.isfinite().all(), name
            assert weight.dtype == (torch.long if name == "draft_vocab_ids" else torch.bfloat16), name
        ids = weights.get("draft_vocab_ids")
        if ids is not None:
            assert len(ids) == drafter.config.draft_vocab_size
            assert (ids.diff() > 0).all()
            assert ids.max() < drafter.config.vocab_size
            assert drafter.config.eos_token_id in ids

    def test_its_card_says_what_it_is(self, folder):
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert data["base_model"] == FalconDrafterConfig.from_pretrained(folder).target_name_or_path
        assert data["license"]
        assert data["library_name"] == "transformers"
        for heading in ("## Use", "## Training", "## Results", "## Limits"):
            assert heading in card.content
