"""A target's name as drafters note it: Hub repos and absolute folders as given, relative folders with a dot."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from falcon_hf import FalconDrafterConfig
from falcon_hf.runtime.repo_card import is_repo_id
from falcon_hf.runtime.target_name import target_name


@pytest.mark.parametrize("given", ["models/llama", "./models/llama", "models/llama/", "llama", "../here/llama"])
def test_a_folder_is_no_repo(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("models/llama", "llama"):
        (tmp_path / "here" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    noted = target_name(given)
    assert noted is not None
    assert Path(noted).samefile(given)
    assert noted.startswith(".")
    assert not is_repo_id(noted)
    assert target_name(noted) == noted
    config = LlamaConfig(name_or_path=given)
    assert FalconDrafterConfig.from_target(config).target_name_or_path == noted


def test_others_are_as_given(tmp_path: Path) -> None:
    assert target_name("models/llama") == "models/llama"
    assert target_name(str(tmp_path)) == str(tmp_path)
    assert target_name("") is None
    assert target_name(None) is None
