"""A compiled target with a static cache: one graph for the prefill, one for all verifications, whatever the round."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from falcon_hf.runtime.target_session import TargetSession

from .families import tiny_family
from .helpers import assert_same_text, bushy_tree, cache_error, prompt_ids, returned_cache, run
from .test_batch import VOCAB, batch
from .test_static_cache import CROPPABLE

TREE = bushy_tree(VOCAB, 3, 12)
STATIC = {"do_sample": False, "max_new_tokens": 20, "cache_implementation": "static"}

pytestmark = [
    pytest.mark.skipif(
        not CROPPABLE, reason="this transformers refuses static caches: test_static_cache.py holds that"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


class Graphs:
    """A compiler that runs what it is given as it is, and keeps the shape of each graph's first input, the tokens."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, ...]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.tokens.append(next(tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)))
        return graph.forward


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def compiled(target: Any, graphs: Graphs) -> Any:
    model = copy.deepcopy(target)
    model.forward = torch.compile(model.forward, backend=graphs)
    return model


def prepared(tiny_drafter: Any, family: str) -> tuple[Any, Any]:
    target = tiny_family(family, "sdpa" if family == "llama" else "eager")
    return target, tiny_drafter(target, tree=TREE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_one_graph_for_all_rounds(tiny_drafter, graphs, family):
    plain, _ = prepared(tiny_drafter, "llama") if family == "llama" else (tiny_family(family), None)
    drafter = tiny_drafter(plain, tree=TREE, intermediate_size=96)
    target = compiled(plain, graphs)
    for seed in range(3):  # texts that go other ways and end at other places of a round
        ids = prompt_ids(VOCAB, 7, seed)
        options = STATIC | {"max_new_tokens": 18 + seed, "max_length": None, "return_dict_in_generate": True}
        falcon, _ = run(target, 0, ids, assistant_model=drafter, **options)
        assert falcon.sequences.tolist() == run(plain, 0, ids, **options)[0].sequences.tolist()
        assert drafter.last_generation.rounds > 5
    assert graphs.tokens[0] == (1, 7)
    # A cache of another size is another graph for each, at the second size one for all sizes to come.
    assert len(graphs.tokens) <= 4
    seen = len(graphs.tokens)
    run(target, 0, prompt_ids(VOCAB, 7, 8), assistant_model=drafter, **options)
    assert len(graphs.tokens) == seen


def test_one_graph_for_one_size(tiny_drafter, graphs):
    plain, drafter = prepared(tiny_drafter, "llama")
    target = compiled(plain, graphs)
    for seed in range(3):
        ids = prompt_ids(VOCAB, 7, seed)
        falcon, _ = run(target, 0, ids, assistant_model=drafter, return_dict_in_generate=True, **STATIC)
        assert falcon.sequences.tolist() == run(plain, 0, ids, **STATIC)[0].tolist()
        assert cache_error(plain, falcon.sequences, returned_cache(falcon)) < 1e-4
    assert drafter.last_generation.accepted > 0
    assert graphs.tokens == [(1, 7), (1, len(TREE) + 1)]


def test_the_count_sees_trees_of_many_sizes(tiny_drafter, graphs, monkeypatch):
    """The control: trees that shrink towards the end of a text."""
    plain, drafter = prepared(tiny_drafter, "llama")
    monkeypatch.setattr(TargetSession, "_fixed_size", lambda self, tree: tree)
    target = compiled(plain, graphs)
    run(target, 0, prompt_ids(VOCAB, 7), assistant_model=drafter, **STATIC)
    assert len(graphs.tokens) > 2


def test_rows_of_a_batch_share_the_graph(tiny_drafter, graphs):
    plain, drafter = prepared(tiny_drafter, "llama")
    target = compiled(plain, graphs)
    for seed in range(2):
        falcon, _ = run(target, 0, batch(seed=seed), assistant_model=drafter, **STATIC)
        assert falcon.tolist() == run(plain, 0, batch(seed=seed), **STATIC)[0].tolist()
    assert graphs.tokens == [(4, 9), (4, len(TREE) + 1)]


def test_outputs_are_the_trees_alone(tiny_drafter):
    """What fills the tree up is not returned."""
    plain, drafter = prepared(tiny_drafter, "llama")
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
    falcon = assert_same_text(plain, drafter, prompt_ids(VOCAB, 7), **STATIC, **wanted)
    theirs, _ = run(plain, 0, prompt_ids(VOCAB, 7), **STATIC, **wanted)
    for one, other in zip(falcon.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        assert len(one) == len(other)
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(one, other, strict=True))
    assert torch.allclose(torch.cat(falcon.logits), torch.cat(theirs.logits), atol=1e-3)


@pytest.mark.parametrize("before", [False, True], ids=["new", "used before"])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_states_are_kept_once(tiny_drafter, family, before):
    """What makes the target keep its states is put in place before a compiler sees it, if it is not there yet."""
    target = copy.deepcopy(tiny_family(family))
    drafter = tiny_drafter(target, tree=TREE, intermediate_size=96)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    if before:
        run(target, 0, prompt_ids(VOCAB, 7), do_sample=False, max_new_tokens=4, **wanted)
    falcon = assert_same_text(target, drafter, prompt_ids(VOCAB, 7), **(STATIC | {"max_new_tokens": 6}), **wanted)
    assert {len(step) for step in falcon.hidden_states} == {target.config.num_hidden_layers + 1}


@pytest.mark.parametrize("lengths", [(7,), (3, 9)], ids=str)
def test_generates_own_compilation(tiny_drafter, graphs, lengths):
    """As on a GPU, where ``generate()`` compiles for static caches: the verification alone, not the prefill."""
    target, drafter = prepared(tiny_drafter, "llama")
    target = copy.deepcopy(target)
    config = CompileConfig(backend=lambda *parts: graphs(*parts), mode=None)  # generate() copies objects
    config._compile_all_devices = True
    inputs = batch(lengths)
    falcon, _ = run(target, 0, inputs, assistant_model=drafter, compile_config=config, **STATIC)
    assert graphs.tokens == [(len(lengths), len(TREE) + 1)]
    assert falcon.tolist() == run(target, 0, inputs, **STATIC)[0].tolist()


@pytest.mark.slow
def test_inductor(tiny_drafter, graphs):
    """The real compiler."""
    plain, drafter = prepared(tiny_drafter, "llama")
    target = copy.deepcopy(plain)
    target.forward = torch.compile(target.forward)
    falcon, _ = run(target, 0, prompt_ids(VOCAB, 7), assistant_model=drafter, **STATIC)
    assert falcon.tolist() == run(plain, 0, prompt_ids(VOCAB, 7), **STATIC)[0].tolist()
