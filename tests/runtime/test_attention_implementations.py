"""Flash attention is switched for the call and restored; flex attention gets the tree as a ``BlockMask``."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from transformers import AttentionInterface, StoppingCriteriaList
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from falcon_hf.runtime import target_attention

from .families import tiny_family
from .helpers import assert_same_text, break_masks, bushy_tree, cache_error, prompt_ids, returned_cache
from .test_batch import VOCAB, batch
from .test_families import FAMILIES, class_of

TREE = bushy_tree(VOCAB, 3, 12)
GREEDY = {"do_sample": False, "max_new_tokens": 16}
FLASH = ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"]


class Kernel:
    """Stands for a flash kernel: causal attention alone, in eager code; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.calls += 1
        assert attention_mask is None or attention_mask.dim() == 2, "a flash kernel takes no 4D mask"
        queries, keys = query.shape[2], key.shape[2]
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
        if attention_mask is not None:
            causal = causal & attention_mask[:, None, None, -keys:].bool()
        return sdpa_attention_forward(module, query, key, value, causal, **kwargs)


@pytest.fixture
def kernel():
    return Kernel()


def with_attention(target, name, kernel):
    """A copy of a target under ``kernel``, registered as ``name``; only the name is set, for nothing can be loaded."""
    AttentionInterface.register(name, kernel)
    model = copy.deepcopy(target)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name
    return model


@pytest.fixture(autouse=True)
def _forget_kernels():
    known = dict(AttentionInterface._global_mapping)
    yield
    AttentionInterface._global_mapping.clear()
    AttentionInterface._global_mapping.update(known)


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_switched_and_restored(tiny_target, tiny_drafter, kernel, name, caplog):
    model = with_attention(tiny_target(VOCAB), name, kernel)
    drafter = tiny_drafter(model, tree=TREE)
    target_attention._log_once.cache_clear()
    seen = set()
    model.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    with caplog.at_level(logging.WARNING, "falcon_hf"):
        for _ in range(2):
            assert_same_text(model, drafter, prompt_ids(VOCAB, 7), **GREEDY)
    assert seen == {name, "sdpa"}
    assert kernel.calls == 2 * 16 * 2  # by the two plain calls, in two layers
    assert model.config._attn_implementation == model.model.config._attn_implementation == name
    assert [record.message for record in caplog.records if "tree mask" in record.message] == [
        f"{name} takes no tree mask: LlamaForCausalLM decodes with Falcon under sdpa, and has it back after."
    ]


def test_a_batch_under_flash_attention(tiny_target, tiny_drafter, kernel):
    model = with_attention(tiny_target(VOCAB), FLASH[0], kernel)
    falcon = model.generate(**batch(), assistant_model=tiny_drafter(model, tree=TREE), **GREEDY)
    assert falcon.tolist() == tiny_target(VOCAB).generate(**batch(), **GREEDY).tolist()
    assert kernel.calls == 0


def test_without_the_switch_the_kernel_would_get_the_tree(tiny_target, tiny_drafter, kernel, monkeypatch):
    """The control."""
    monkeypatch.setattr(target_attention, "TREE_ATTENTIONS", (*target_attention.TREE_ATTENTIONS, FLASH[0]))
    model = with_attention(tiny_target(VOCAB), FLASH[0], kernel)
    with pytest.raises(AssertionError, match="no 4D mask"):
        model.generate(prompt_ids(VOCAB, 5), assistant_model=tiny_drafter(model, tree=TREE), **GREEDY)


def test_restored_on_exceptions(tiny_target, tiny_drafter, kernel):
    model = with_attention(tiny_target(VOCAB), FLASH[0], kernel)

    def fails(ids, scores, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(
            prompt_ids(VOCAB, 5), assistant_model=tiny_drafter(model), stopping_criteria=StoppingCriteriaList([fails])
        )
    assert model.config._attn_implementation == FLASH[0]


def test_overlapping_calls_restore_at_the_last_end(tiny_target, kernel):
    model = with_attention(tiny_target(VOCAB), FLASH[0], kernel)
    inside, leave = threading.Event(), threading.Event()

    def other_call():
        with target_attention.tree_attention(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other_call)
    with target_attention.tree_attention(model):
        thread.start()
        assert inside.wait(10)
    assert model.config._attn_implementation == "sdpa"
    leave.set()
    thread.join()
    assert model.config._attn_implementation == FLASH[0]


def test_a_family_without_sdpa_goes_to_eager(tiny_drafter, kernel):
    target = tiny_family("gemma2")
    model = with_attention(target, FLASH[0], kernel)
    out = model.generate(prompt_ids(VOCAB, 13), assistant_model=tiny_drafter(model, tree=TREE), **GREEDY)
    assert out.tolist() == target.generate(prompt_ids(VOCAB, 13), **GREEDY).tolist()


def test_a_family_that_cannot_switch_is_refused(tiny_drafter, kernel):
    model = with_attention(tiny_family("falcon"), FLASH[0], kernel)
    with pytest.raises(ValueError, match="cannot change it once loaded; load it with attn_implementation='sdpa'"):
        model.generate(prompt_ids(VOCAB, 5), assistant_model=tiny_drafter(model), **GREEDY)


def test_a_strangers_attention_is_refused(tiny_target, tiny_drafter, kernel):
    model = with_attention(tiny_target(VOCAB), "my_attention", kernel)
    with pytest.raises(ValueError, match=r"'my_attention' is not known .*set_attn_implementation\('sdpa'\) first"):
        model.generate(prompt_ids(VOCAB, 5), assistant_model=tiny_drafter(model), **GREEDY)


FLEX = [name for name in FAMILIES if class_of(name)._supports_flex_attn and name != "gpt_oss"]  # its sinks need a GPU


QUICK = ("llama", "mistral", "gemma2", "llama4_text")


@pytest.fixture
def uncompiled():
    """Compiled flex attention does not build on every CPU (torch 2.13: its C++ template), for plain decoding either."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
class TestFlex:
    @pytest.mark.parametrize(
        "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FLEX]
    )
    def test_text_and_cache(self, tiny_drafter, family):
        target = tiny_family(family, "flex_attention")
        drafter = tiny_drafter(target, tree=TREE)
        options = GREEDY | {"return_dict_in_generate": True}
        falcon = assert_same_text(target, drafter, prompt_ids(VOCAB, 9), **options)
        assert drafter.last_generation.accepted > 0
        assert cache_error(target, falcon.sequences, returned_cache(falcon)) < 1e-4

    def test_a_batch(self, tiny_drafter):
        target = tiny_family("mistral", "flex_attention")
        drafter = tiny_drafter(target, tree=TREE)
        falcon = target.generate(**batch((3, 9)), assistant_model=drafter, **GREEDY)
        assert falcon.tolist() == tiny_family("mistral").generate(**batch((3, 9)), **GREEDY).tolist()

    def test_comparison_sees_a_causal_mask(self, tiny_drafter, monkeypatch):
        target = tiny_family("llama", "flex_attention")
        break_masks(monkeypatch)
        falcon = target.generate(
            prompt_ids(VOCAB, 9),
            assistant_model=tiny_drafter(target, tree=TREE),
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert cache_error(target, falcon.sequences, returned_cache(falcon)) > 1e-2
