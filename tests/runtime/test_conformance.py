"""The conformance table: family x attention x cache x batch, each greedy and sampled; kept in ``docs/conformance.md``.

A cell passes if tokens and random state are those of plain ``generate()`` and the final cache's next-token logits
those of a forward without a cache, with prompts beyond the window of 8 where a family has one. Each row's control, a
cache whose accepted rows are not moved into place (for chain families: a tree), must fail the second comparison.

After a change: ``FALCON_HF_WRITE_TABLE=1 pytest -m slow tests/runtime/test_conformance.py``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import StaticLayer

from falcon_hf.runtime import generation
from falcon_hf.runtime.committed_cache import CommittedCache
from falcon_hf.runtime.target import FAMILIES, TREE_FAMILIES
from falcon_hf.runtime.target_session import cache_key

from .families import CHAIN_FAMILIES, SHAPE, tiny_family
from .helpers import assert_same_text, bushy_tree, prompt_ids, returned_cache
from .test_batch import VOCAB, batch
from .test_families import PAIRS, class_of
from .test_static_cache import CROPPABLE

TABLE = Path(__file__).parents[2] / "docs" / "conformance.md"
CACHES = ("default", "own dynamic", "static", "continued")
BATCHES = {1: (11,), 4: (3, 13, 6, 9)}
MODES: tuple[dict[str, Any], ...] = ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 12})
# Families that are not served, with what their config needs to be made here.
REFUSED: dict[str, dict[str, Any]] = {"mamba": {}, "qwen3_next": {}}
CHAIN_PAIRS = [
    (family, attention)
    for family in CHAIN_FAMILIES
    for attention in ("eager", "sdpa")
    if attention == "eager" or class_of(family.split()[0])._supports_sdpa
]
# One family of each kind of mask; test_attention_implementations.py has the others.
FLEX_PAIRS = [(family, "flex_attention") for family in ("llama", "mistral", "gemma2", "cohere2")]
# Cells that cannot be: by family and cache or batch, what the error says, and what the table says.
REFUSED_CELLS: dict[tuple[str, str | int], tuple[str, str]] = {
    ("falcon (ALiBi)", "static"): ("too many values to unpack|size of tensor", "not in transformers"),
    ("lfm2", "static"): ("convolution states in it", "refused: convolutions"),
    ("lfm2", 4): ("one by one", "refused: one row at a time"),
    ("mpt", 4): ("one by one", "refused: one row at a time"),
}
_ROWS: dict[tuple[str, str], list[str]] = {}


def final_cache_error(target: Any, sequences: torch.Tensor, prompt_mask: torch.Tensor, cache: Any) -> float:
    """Largest difference of the next-token logits, with the cache and without, over the largest; ``[B, L]`` rows."""
    if target.config._attn_implementation == "flex_attention":
        # By the same model in eager attention: transformers' own flex mask for a static cache counts one slot too many
        # (it looks at the cache's length after the first layer has moved it).
        target = tiny_family(target.config.model_type)
    mask = torch.cat((prompt_mask, torch.ones_like(sequences[:, prompt_mask.shape[1] :])), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    held = mask
    if target.config.model_type == "bloom" and isinstance(cache.layers[0], StaticLayer):
        held = torch.nn.functional.pad(mask, (0, cache.layers[0].max_cache_len - mask.shape[1]))  # it wants it whole
    last = {"attention_mask": held, "position_ids": positions[:, -1:], "use_cache": True, cache_key(target): cache}
    with torch.no_grad():
        free = target(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        cached = target(sequences[:, -1:], **last).logits[:, -1]
    return float((free - cached).abs().max() / free.abs().max())


def generate_cell(target: Any, drafter: Any, cache: str, rows: int, mode: dict[str, Any]) -> float:
    """One generation, its tokens and random state compared with plain's; returns the final cache's error."""
    inputs = batch(BATCHES[rows])
    key = cache_key(target)
    per_call: list[dict[str, Any]] = [{}, {}]  # for the plain call and for Falcon's
    if cache == "own dynamic":
        config = {"config": target.config} if target.config.model_type == "lfm2" else {}  # it has no other kind
        per_call = [{key: DynamicCache(**config)} for _ in per_call]
    elif cache == "static":
        per_call[1] = {"cache_implementation": "static"}
    elif cache == "continued":
        first = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        turns = [target.generate(**inputs, **first) for _ in per_call]
        per_call = [{key: returned_cache(turn)} for turn in turns]
        ids = torch.cat((turns[0].sequences, prompt_ids(VOCAB, 3)), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 16, "pad_token_id": 0, "return_dict_in_generate": True, **mode}
    falcon = assert_same_text(target, drafter, inputs, per_call=iter(per_call), **options)
    return final_cache_error(target, falcon.sequences, inputs["attention_mask"], returned_cache(falcon))


def cell(target: Any, drafter: Any, family: str, cache: str, rows: int) -> str:
    """What the table says of a cell, after trying it."""
    if cache == "static" and not CROPPABLE:
        return "refused: this transformers cannot crop static layers"
    refused = REFUSED_CELLS.get((family, cache)) or REFUSED_CELLS.get((family, rows))
    if refused is not None:
        message, entry = refused
        with pytest.raises((ValueError, RuntimeError), match=message):
            generate_cell(target, drafter, cache, rows, MODES[0])
        return entry
    for mode in MODES:
        assert generate_cell(target, drafter, cache, rows, mode) < 1e-4
    return "chain" if family in CHAIN_FAMILIES else "pass"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("family", "attention"), PAIRS + CHAIN_PAIRS + FLEX_PAIRS)
def test_row(family, attention, tiny_drafter, monkeypatch):
    target = tiny_family(family, attention)
    drafter = tiny_drafter(target, tree=bushy_tree(VOCAB, 3, 12), intermediate_size=96)
    # Compiled flex attention does not build on every CPU, see test_attention_implementations.py.
    with torch.compiler.set_stance("force_eager" if attention == "flex_attention" else "default"):
        cells = [
            cell(target, drafter, family, cache, rows)
            for cache in CACHES
            for rows in BATCHES
            if cache != "continued" or rows == 1
        ]
        _ROWS[family, attention] = cells
        if family in CHAIN_FAMILIES:
            monkeypatch.setattr(generation, "chain_shape", lambda *_: None)
        else:
            monkeypatch.setattr(CommittedCache, "_gather", lambda *_: None)
        broken = 0.0
        for seed in range(8):  # a tree may by chance accept nothing but its first path
            torch.manual_seed(seed)
            inputs = batch(BATCHES[1], seed)
            out = target.generate(
                **inputs, max_new_tokens=16, do_sample=False, assistant_model=drafter, return_dict_in_generate=True
            )
            error = final_cache_error(target, out.sequences, inputs["attention_mask"], returned_cache(out))
            broken = max(broken, error)
            if broken > 1e-3:
                return
        raise AssertionError("the comparison did not see the broken cache")


@pytest.mark.parametrize("family", REFUSED)
def test_refused_family(family, tiny_target, tiny_drafter):
    shape = {key: value for key, value in SHAPE.items() if key != "max_position_embeddings"}
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(shape | REFUSED[family])))
    drafter = tiny_drafter(tiny_target(VOCAB))
    ids = prompt_ids(VOCAB, 5)
    with pytest.raises(ValueError, match="generate without assistant_model"):
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, assistant_model=drafter)


def table() -> str:
    """The table as Markdown."""
    headings = [f"{cache}, batch {rows}" for cache in CACHES for rows in BATCHES if cache != "continued" or rows == 1]
    lines = [
        "# Conformance",
        "",
        "Tokens and random state equal plain `generate()`, greedy and sampled, and the final cache's logits equal a",
        "forward without a cache; float32, small random models, prompts beyond the sliding window where there is one,",
        "batches left-padded. Written by `tests/runtime/test_conformance.py`, which says how.",
        "",
        "| family | attention | " + " | ".join(headings) + " |",
        "|---|---|" + "---|" * len(headings),
    ]
    for family, attention in sorted(_ROWS):
        lines.append(f"| {family} | {attention} | " + " | ".join(_ROWS[family, attention]) + " |")
    refused = "; ".join(f"{name}: {FAMILIES[name].why}" for name in REFUSED)
    chains = "; ".join(f"{name}: {FAMILIES[name].why}" for name in sorted(CHAIN_FAMILIES))
    lines += [
        "",
        f"*chain*: no tree but its likeliest path, in an ordinary causal forward ({chains}).",
        "",
        f"Refused with an error before anything is generated: {refused}.",
        "",
        "gemma2 and gpt_oss have no sdpa attention in transformers themselves, nor have bloom and mpt. Flash attention",
        "falls back to sdpa for the call. flex_attention is run uncompiled here, with one family of each kind of mask;",
        "`test_attention_implementations.py` runs it with all that have it. With a static cache the text is that of a",
        "dynamic one; transformers' own flex mask counts one slot too many there, so that plain `generate()` differs.",
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_the_table_in_the_docs_is_this_one():
    assert {family for family, _ in _ROWS} == set(TREE_FAMILIES) | set(CHAIN_FAMILIES), "run the whole file"
    if os.environ.get("FALCON_HF_WRITE_TABLE"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table()
