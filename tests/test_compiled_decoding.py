"""``compiled``: keywords that transformers understands, with room for the drafter's tree."""

from __future__ import annotations

from transformers import CompileConfig

from falcon_hf import compiled


def test_keywords(tiny_target, tiny_drafter):
    keywords = compiled()
    assert keywords.keys() == {"cache_implementation", "compile_config"}
    assert keywords["cache_implementation"] == "static"
    assert keywords["compile_config"]._compile_all_devices
    assert keywords["compile_config"].mode == CompileConfig().mode
    assert compiled(mode="default")["compile_config"].mode == "default"
    assert compiled() == compiled(), "equal, or transformers would compile anew for each call"
    assert isinstance(keywords["compile_config"], CompileConfig)
    drafter = tiny_drafter(tiny_target(24), 2, tree=[[0], [1], [0, 0]])
    assert compiled(100)["max_cache_len"] == 100
    assert compiled(100, drafter)["max_cache_len"] == 100 + 4
