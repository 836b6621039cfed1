"""Where half precision has kernels, and the warning where it has none."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from falcon_hf.runtime import half_precision
from falcon_hf.runtime.half_precision import drafting_dtype, has_dear_rows, multiplies_fast, verifies_fast

CPU = torch.device("cpu")
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def kernels(monkeypatch):
    """``kernels(True)``: a CPU with kernels for bfloat16; ``kernels(False)``: one without."""

    def has(answer: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: answer, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    half_precision._warn_once.cache_clear()
    monkeypatch.setattr(half_precision, "has_native_products", lambda: False)
    return has


def test_a_cpu_says_whether_it_has_kernels(kernels):
    kernels(True)
    assert multiplies_fast(CPU, torch.bfloat16)
    kernels(False)
    assert not multiplies_fast(CPU, torch.bfloat16)
    assert multiplies_fast(CPU, torch.float32)


def test_a_cpu_without_one_dnn_has_none(kernels, monkeypatch):
    kernels(True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_fast(CPU, torch.bfloat16)


def test_float16_is_asked_about_by_itself(kernels, monkeypatch):
    kernels(True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False, raising=False)
    assert not multiplies_fast(CPU, torch.float16)


def test_a_gpu_that_emulates_bfloat16_does_not_count(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_fast(torch.device("cuda"), torch.bfloat16)
    assert multiplies_fast(torch.device("cuda"), torch.float16)


def test_rows_are_dear_on_a_cpu_but_for_half_precision_with_kernels(kernels):
    kernels(True)
    assert has_dear_rows(CPU, torch.float32)
    assert not has_dear_rows(CPU, torch.bfloat16)
    kernels(False)
    assert has_dear_rows(CPU, torch.bfloat16)
    assert not has_dear_rows(torch.device("cuda"), torch.float32)


def test_a_drafter_is_loaded_in_what_is_fast(kernels):
    kernels(True)
    assert drafting_dtype(CPU, torch.bfloat16) == torch.bfloat16
    kernels(False)
    assert drafting_dtype(CPU, torch.bfloat16) == torch.float32
    assert drafting_dtype(CPU, torch.float32) == torch.float32


def test_a_float32_drafter_drafts_for_a_half_precision_target(tiny_target, tiny_drafter):
    target = copy.deepcopy(tiny_target(24)).to(torch.bfloat16)
    trees: dict[torch.dtype, list[int]] = {}
    for one in (target, copy.deepcopy(target).float()):  # the same weights
        drafter = tiny_drafter(target, 2, "linear").float()
        drafter.on_round = lambda tree, paths, one=one: trees.setdefault(one.dtype, tree.tokens[0].tolist())
        one.generate(PROMPT, assistant_model=drafter, max_new_tokens=12, do_sample=False)
        assert drafter.last_generation.rounds > 0
        assert drafter.dtype == torch.float32
    # The root and the likeliest of 24 tokens, in their order; further down two roundings may part.
    assert trees[torch.bfloat16][:6] == trees[torch.float32][:6]


def test_a_slow_target_is_told_once(kernels, caplog, tiny_target, tiny_drafter):
    kernels(False)
    target = copy.deepcopy(tiny_target(24)).to(torch.bfloat16)
    drafter = tiny_drafter(target, 2, "linear").to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            target.generate(PROMPT, assistant_model=drafter, max_new_tokens=3, do_sample=False)
    told = [record.getMessage() for record in caplog.records if "no kernels" in record.getMessage()]
    assert len(told) == 1
    assert "torch.float32" in told[0]
    assert "auto_off" in told[0]


@pytest.mark.parametrize(
    ("dtype", "torchs", "own"),
    [(torch.float32, False, False), (torch.bfloat16, True, False), (torch.bfloat16, False, True)],
)
def test_a_fast_target_is_told_nothing(kernels, caplog, monkeypatch, tiny_target, tiny_drafter, dtype, torchs, own):
    kernels(torchs)
    monkeypatch.setattr(half_precision, "has_native_products", lambda: own)
    assert verifies_fast(CPU, dtype)
    target = copy.deepcopy(tiny_target(24)).to(dtype)
    drafter = tiny_drafter(target, 2, "linear").to(dtype)
    with caplog.at_level(logging.WARNING):
        target.generate(PROMPT, assistant_model=drafter, max_new_tokens=3, do_sample=False)
    assert "no kernels" not in caplog.text
