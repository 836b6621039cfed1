"""Compiled verification: texts are plain's with its graph rewritten, and the compiler's settings are as they were."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._inductor import config

from falcon_hf import compiled
from falcon_hf.runtime import tree_graphs
from falcon_hf.runtime.native_products import has_native_products
from falcon_hf.runtime.shared_head_graphs import kernel_shares_heads
from falcon_hf.runtime.tree_graphs import TreeGraphs

from .families import tiny_family
from .helpers import assert_same_text, prompt_ids
from .test_batch import VOCAB
from .test_static_cache import CROPPABLE


def test_the_compilers_settings_are_as_they_were(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert config.post_grad_custom_pre_pass is None
    graphs = TreeGraphs(torch.device("cpu"))

    def fail() -> None:
        assert config.post_grad_custom_pre_pass is tree_graphs._custom_pass()
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError), graphs:
            fail()
        assert config.post_grad_custom_pre_pass is None

    def own(graph: Any) -> None:
        del graph

    with config.patch(post_grad_custom_pre_pass=own), graphs:
        assert config.post_grad_custom_pre_pass is own
    with TreeGraphs(torch.device("meta")):
        assert config.post_grad_custom_pre_pass is None


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """What a rewriting found in each graph."""
    found: list[int] = []
    own = getattr(tree_graphs, name)
    monkeypatch.setattr(tree_graphs, name, lambda graph: found.append(own(graph)))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not CROPPABLE, reason="this transformers refuses static caches: test_static_cache.py holds that")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("tree", "rewriting"),
    [([[0], [1], [0, 0]], "make_products_native"), ([[0], [0, 0]], "turn_products")],
    ids=["native, four rows", "turned, three, padded"],
)
def test_a_compiled_verification_is_rewritten(tiny_drafter, monkeypatch, tree, rewriting):
    """The real compiler: one graph of many lengths, the texts plain's, sampled too. qwen2 has layers with a bias."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    native = rewriting == "make_products_native" and has_native_products()
    monkeypatch.setattr(tree_graphs, "has_native_products", lambda: native)
    rewriting = "make_products_native" if native else "turn_products"
    rewritten, shared = counted(monkeypatch, rewriting), counted(monkeypatch, "share_heads")
    target = copy.deepcopy(tiny_family("qwen2", "sdpa"))
    drafter = tiny_drafter(target, 2, "linear", tree=tree)
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        for seed, sampled in ((0, False), (1, True), (2, False)):
            assert_same_text(
                target, drafter, prompt_ids(VOCAB, 5 + seed, seed), do_sample=sampled, max_new_tokens=20,
                **compiled(40, drafter),
            )  # fmt: skip
    torch._dynamo.reset()
    linear = sum(type(module) is torch.nn.Linear for module in target.modules())
    assert [count for count in rewritten if count] == [linear]
    assert [count for count in shared if count] == [target.config.num_hidden_layers] * kernel_shares_heads()


SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from falcon_hf import FalconDrafter, FalconDrafterConfig, compiled
torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
target = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None, bos_token_id=None, pad_token_id=0)).eval()
drafter = FalconDrafter(FalconDrafterConfig.from_target(target, 2, fusion="linear", tree=[[0], [1]])).eval()
ids = torch.tensor([[3, 1, 4, 1, 5]])
options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
out = target.generate(ids, assistant_model=drafter, **options, **compiled(40, drafter))
assert torch.equal(out, target.generate(ids, **options))
counters = torch._dynamo.utils.counters
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print("hits", hits)
"""


@pytest.mark.slow
@pytest.mark.skipif(not CROPPABLE, reason="this transformers refuses static caches: test_static_cache.py holds that")
def test_a_graph_of_an_earlier_process_is_used(tmp_path):
    """The compiler's cache keeps rewritten graphs, and the next process takes them without rewriting anything."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    hits = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout.split()[-1]))
    assert hits[0] == 0
    assert hits[1] > 0
