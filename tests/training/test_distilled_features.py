"""Features that came with the text: found, checked, and equal to a forward's."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_hf.runtime.target import fingerprint
from falcon_hf.training.dataset import load_training_data
from falcon_hf.training.distillation import DistillationSettings, distil
from falcon_hf.training.distillation_folder import save_dataset
from falcon_hf.training.distilled_features import find_distilled_features
from falcon_hf.training.features import compute_features

from ..bench.tiny import VOCABULARY, byte_tokenizer

SETTINGS = DistillationSettings(
    dialogues=6, batch_size=3, max_new_tokens=12, stems=["Say", "Sing a"], feature_layers=[1, 2]
)


@pytest.fixture
def target(tiny_target: Any) -> Any:
    target = tiny_target(VOCABULARY, seed=33)
    target.generation_config.eos_token_id = list(range(40))
    return target


@pytest.fixture
def folder(target: Any, tmp_path: Path) -> Path:
    for _ in distil(target, byte_tokenizer(), SETTINGS, tmp_path):
        pass
    save_dataset(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_they_are_those_of_a_forward(target: Any, folder: Path, layers: list[int] | None) -> None:
    data = load_training_data(folder, VOCABULARY, 512)
    found = find_distilled_features(folder, target, data, layers)
    assert found is not None
    assert len(found) == len(data) == 6
    for row in range(6):
        ids = torch.from_numpy(data.tokens[data.offsets[row] : data.offsets[row + 1]]).long()[None]
        expected = compute_features(target, ids, torch.ones_like(ids), layers)[0]
        rows = found.rows(row)
        assert rows.dtype == torch.bfloat16
        assert rows.shape == expected.shape
        torch.testing.assert_close(rows[:-1].float(), expected[:-1], atol=0.05, rtol=0.02)
        assert not torch.allclose(rows[:-1].float(), expected[1:], atol=0.05, rtol=0.02)  # the control


def test_others_are_not_used_and_the_reason_is_told(
    target: Any, tiny_target: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_training_data(folder, VOCABULARY, 512)
    tuned = copy.deepcopy(target)  # with the same embeddings, so the same fingerprint
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(tuned) == fingerprint(target)
    cases = {
        "of the layers": (target, data, [0, 2]),
        "another target's": (tiny_target(VOCABULARY, seed=34), data, None),
        "they are another target's,": (tuned, data, None),
        "of another dtype": (copy.deepcopy(target).bfloat16(), data, None),
        "was cut": (target, load_training_data(folder, VOCABULARY, 30), None),
        "has grown": (target, replace(data, offsets=data.offsets[1:] - data.offsets[1]), None),
    }
    with caplog.at_level(logging.WARNING):
        for reason, (model, text, layers) in cases.items():
            caplog.clear()
            assert find_distilled_features(folder, model, text, layers) is None
            assert reason in caplog.text
        recipe = json.loads((folder / "recipe.json").read_text())
        del recipe["target_digest"]
        broken = {
            "does not tell the target": json.dumps(recipe),
            "cannot be read": "{",
            "recipe.json or": json.dumps({**recipe, "settings": {"feature_layers": None}}),
            "FileNotFoundError": None,
        }
        whole = (folder / "recipe.json").read_text()
        for reason, content in broken.items():
            caplog.clear()
            (folder / "recipe.json").unlink()
            if content is not None:
                (folder / "recipe.json").write_text(content)
                assert load_training_data(folder, VOCABULARY, 512).sha256() == data.sha256()
            assert find_distilled_features(folder, target, data, None) is None
            assert reason in caplog.text
            (folder / "recipe.json").write_text(whole)
        caplog.clear()
        assert find_distilled_features(folder, target, data, None) is not None
        (folder / "features.bfloat16").write_bytes(b"short")
        assert find_distilled_features(folder, target, data, None) is None
        assert "too short" in caplog.text
        caplog.clear()
        (folder / "features.bfloat16").unlink()
        assert find_distilled_features(folder, target, data, None) is None
        assert not caplog.text


def test_a_home_folder_is_found(target: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    short = Path("~") / folder.name
    assert find_distilled_features(short, target, load_training_data(short, VOCABULARY, 512), None) is not None
