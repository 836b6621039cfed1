"""Routing: installed once, only for Falcon drafters, undone cleanly, and all of it from the drafter's folder alone."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import falcon_hf
from falcon_hf import FalconDrafter, FalconGenerationMixin

from .helpers import assert_same_text, bushy_tree, prompt_ids, run

VOCAB = 24
TREE = bushy_tree(VOCAB, 3, 12)
METHODS = ("_assisted_decoding", "_validate_generation_mode")


@pytest.fixture
def target(tiny_target):
    return tiny_target(VOCAB)


@pytest.fixture
def drafter(target, tiny_drafter):
    return tiny_drafter(target, 2, tree=TREE)


@pytest.fixture(autouse=True)
def _restored():
    """Whatever a test does to ``GenerationMixin``, the next one finds it routed once."""
    before = methods()
    yield
    for name, method in zip(METHODS, before, strict=True):
        setattr(GenerationMixin, name, method)


def methods():
    return tuple(getattr(GenerationMixin, name) for name in METHODS)


def whose(method):
    """The module whose code a method is; ``functools.wraps`` makes ``__module__`` lie."""
    return method.__globals__["__name__"]


def is_routed(target, drafter):
    """Whether ``generate()`` reaches Falcon; plain transformers cannot use a drafter and says so."""
    drafter.last_generation = None
    try:
        target.generate(prompt_ids(VOCAB, 4), max_new_tokens=4, do_sample=False, assistant_model=drafter)
    except AttributeError:
        return False
    return drafter.last_generation is not None


def test_import_has_installed_it(target, drafter):
    assert {whose(method) for method in methods()} == {"falcon_hf.runtime.routing"}
    assert is_routed(target, drafter)


def test_install_is_idempotent():
    before = methods()
    falcon_hf.install()
    falcon_hf.install()
    assert methods() == before


def test_uninstall_gives_back_transformers_own_methods(target, drafter):
    routed = methods()
    falcon_hf.uninstall()
    assert methods() == tuple(method.__wrapped__ for method in routed)
    assert {whose(method) for method in methods()} == {"transformers.generation.utils"}
    assert not is_routed(target, drafter)
    falcon_hf.uninstall()
    assert methods() == tuple(method.__wrapped__ for method in routed), "the second time nothing happens"
    falcon_hf.install()
    assert is_routed(target, drafter)


@pytest.mark.parametrize("how", ["assistant model", "prompt lookup", "none"])
def test_everything_else_is_left_alone(tiny_target, target, how):
    """The same output with and without the routing, and never a call of ours."""
    options = {
        "assistant model": {"assistant_model": tiny_target(VOCAB, seed=1)},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "none": {},
    }[how]
    options |= {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    with_routing, state = run(target, 0, prompt_ids(VOCAB, 9), **options)
    falcon_hf.uninstall()
    without, other_state = run(target, 0, prompt_ids(VOCAB, 9), **options)
    assert with_routing.sequences.tolist() == without.sequences.tolist()
    assert all(torch.equal(a, b) for a, b in zip(with_routing.scores, without.scores, strict=True))
    assert torch.equal(state, other_state)


def test_two_copies_of_the_code_in_one_process(target, drafter, tmp_path):
    """A Hub repo's copy beside the package: another class, one routing, both work, in either order of undoing."""
    folder = tmp_path / "a_drafter"
    drafter.save_pretrained(folder)
    before = methods()
    copied_class = get_class_from_dynamic_module("modeling_falcon_drafter.FalconDrafter", str(folder))
    assert copied_class is not FalconDrafter
    assert methods() == before
    copy = copied_class.from_pretrained(folder)
    for each in (copy, drafter):
        assert_same_text(target, each, prompt_ids(VOCAB, 6), max_new_tokens=16, do_sample=False)
    assert copy.last_generation.accepted == drafter.last_generation.accepted > 0
    assert type(copy.last_generation) is not type(drafter.last_generation)
    # The copy may undo what the package did, and the other way round.
    routing = sys.modules[copied_class.__module__.rsplit(".", 1)[0] + ".routing"]
    routing.uninstall()
    assert not is_routed(target, drafter)
    routing.install()
    assert all(whose(method).startswith("transformers_modules.") for method in methods())
    falcon_hf.install()
    assert is_routed(target, drafter)
    assert is_routed(target, copy)
    falcon_hf.uninstall()
    assert not is_routed(target, copy)


def wrap_as_a_stranger(name):
    """What another library may do: wrap the method we have wrapped."""
    ours = getattr(GenerationMixin, name)

    @functools.wraps(ours)
    def stranger(*args, **kwargs):
        return ours(*args, **kwargs)

    setattr(GenerationMixin, name, stranger)
    return ours


@pytest.mark.parametrize("name", METHODS)
def test_wrapped_by_a_stranger(target, drafter, name):
    ours = wrap_as_a_stranger(name)
    before = methods()
    assert is_routed(target, drafter)
    falcon_hf.install()
    assert methods() == before, "not wrapped a second time"
    with pytest.raises(RuntimeError, match=rf"wrapped GenerationMixin\.{name} after falcon_hf; undo that first"):
        falcon_hf.uninstall()
    assert methods() == before, "all or nothing"
    assert is_routed(target, drafter)
    setattr(GenerationMixin, name, ours)
    falcon_hf.uninstall()
    assert not is_routed(target, drafter)


def test_threads_install_once():
    falcon_hf.uninstall()
    originals = methods()
    barrier = threading.Barrier(8)

    def race():
        barrier.wait()
        for _ in range(50):
            falcon_hf.install()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tuple(method.__wrapped__ for method in methods()) == originals


def test_threads_generate_side_by_side(target, tiny_drafter):
    """Two drafters on one target at once: nothing of a call is kept in the target or shared."""
    prompts = [prompt_ids(VOCAB, 4 + index, index) for index in range(4)]
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = [target.generate(prompt, **options).tolist() for prompt in prompts]
    drafters = [tiny_drafter(target, 1 + index % 3, tree=TREE) for index in range(4)]
    found: dict[int, list] = {}

    def work(index):
        found[index] = target.generate(prompts[index], assistant_model=drafters[index], **options).tolist()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == expected
    assert all(drafter.last_generation.new_tokens == 24 for drafter in drafters)


class BuiltIn(FalconGenerationMixin, LlamaForCausalLM):
    """A target with Falcon built in."""


def test_mixin_needs_no_routing(tiny_target, target, drafter):
    built_in = BuiltIn(target.config).eval()
    built_in.load_state_dict(target.state_dict())
    falcon_hf.uninstall()
    assert_same_text(built_in, drafter, prompt_ids(VOCAB, 6), max_new_tokens=16, do_sample=False)
    options = {"max_new_tokens": 16, "do_sample": False}
    stock = built_in.generate(prompt_ids(VOCAB, 6), assistant_model=tiny_target(VOCAB, seed=1), **options)
    assert stock.tolist() == target.generate(prompt_ids(VOCAB, 6), **options).tolist()
    with pytest.raises(ValueError, match="num_beams"):
        built_in.generate(prompt_ids(VOCAB, 6), assistant_model=drafter, num_beams=2, max_new_tokens=4)


def test_mixin_names_what_the_stock_method_takes():
    """``generate()`` passes, of some arguments, only those that the method's signature names."""
    own = inspect.signature(FalconGenerationMixin._assisted_decoding).parameters
    assert list(own) == list(inspect.signature(GenerationMixin._assisted_decoding).parameters)


def test_mixin_with_routing_runs_falcon_once(target, drafter):
    built_in = BuiltIn(target.config).eval()
    built_in.load_state_dict(target.state_dict())
    assert_same_text(built_in, drafter, prompt_ids(VOCAB, 6), max_new_tokens=16, do_sample=False)


SCRIPT = """
    import sys

    sys.modules["falcon_hf"] = None  # importing it is an ImportError from here on

    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    target_folder, drafter_folder = sys.argv[1:]
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    drafter = AutoModel.from_pretrained(drafter_folder, trust_remote_code=True)
    assert type(drafter).__module__.startswith("transformers_modules."), type(drafter).__module__
    ids = torch.tensor([[3, 9, 4, 1, 7]])
    plain = target.generate(ids, max_new_tokens=16, do_sample=False)
    falcon = target.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=drafter)
    assert falcon.tolist() == plain.tolist()
    assert drafter.last_generation.accepted > 0
    assert not [name for name, module in sys.modules.items() if name.startswith("falcon_hf") and module is not None]
    print("done", drafter.last_generation.accepted)
"""


def test_the_drafters_folder_is_enough(target, drafter, tmp_path):
    """A fresh process in which ``falcon_hf`` cannot be imported: loading the drafter brings all there is."""
    target.save_pretrained(tmp_path / "target")
    drafter.save_pretrained(tmp_path / "drafter")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), tmp_path / "target", tmp_path / "drafter"],
        capture_output=True, text=True, env=environment, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done")
