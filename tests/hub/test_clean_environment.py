"""The published drafter and the real target without ``falcon_hf``: both ways in give plain generation's text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .isolated import run_isolated

DRAFTER = Path(__file__).parents[2] / "hub_cards" / "falcon-smollm2-135m-instruct"


@pytest.mark.slow
def test_both_ways_on_the_real_target(smollm2, tmp_path):
    target, tokenizer = smollm2
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    script = (
        f"import runpy; runpy.run_path({str(Path(__file__).with_name('clean_environment.py'))!r}, run_name='__main__')"
    )
    found = json.loads(run_isolated(script, tmp_path, tmp_path / "target", DRAFTER, "float32", 48).splitlines()[-1])
    assert found["identical"] == {"plain": True, "assistant_model": True, "custom_generate": True}
    assert found["tau"] > 0.2
