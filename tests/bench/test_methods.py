"""Methods: found by file, built from their label, counted alike; drafters that cannot be read say why."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from falcon_hf import FalconDrafterConfig, TreeShape, compiled
from falcon_hf.bench import methods
from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.memory import reset_peak
from falcon_hf.bench.methods import METHODS, MethodContext, build_method, parse_methods, plain_native
from falcon_hf.bench.methods.base import until_end
from falcon_hf.bench.methods.compiling import CompileError
from falcon_hf.bench.methods.falcon import FIELDS
from falcon_hf.runtime import few_rows, native_product_graphs

from ..runtime.test_native_products import SERVED

OPTIONS = {"do_sample": False, "max_new_tokens": 20}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def drafter_copy(drafter_path: Path, tmp_path: Path) -> Path:
    """A drafter's folder to break."""
    return Path(shutil.copytree(drafter_path, tmp_path / "copy"))


def test_every_file_of_the_folder_is_a_method() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__", "base", "compiling"}
    assert files == set(METHODS)
    assert files >= {"plain", "falcon", "prompt_lookup"}


def test_labels_are_parsed() -> None:
    specs = parse_methods(" plain, falcon:drafter=some/repo:tree=a.json,falcon, k1=falcon:verifier=follow")
    (json,) = parse_methods('falcon:lookup={"length": 8, "matches": [2, 3]}:auto_off=true')
    assert json.settings == {"lookup": '{"length": 8, "matches": [2, 3]}', "auto_off": "true"}
    assert [spec.label for spec in specs] == ["plain", "falcon:drafter=some/repo:tree=a.json", "falcon", "k1"]
    assert specs[1].settings == {"drafter": "some/repo", "tree": "a.json"}
    assert (specs[3].method.name, specs[3].settings) == ("falcon", {"verifier": "follow"})


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (r"falcon:drafter=C:\runs\k1", {"drafter": r"C:\runs\k1"}),
        (r"k1=falcon:drafter=C:\runs\k=1:auto_off=true", {"drafter": r"C:\runs\k=1", "auto_off": "true"}),
        (r"falcon:tree=D:/a.json:drafter=C:/b", {"tree": "D:/a.json", "drafter": "C:/b"}),
    ],
)
def test_a_value_may_have_a_drives_colon(spec: str, settings: dict[str, str]) -> None:
    (parsed,) = parse_methods(spec)
    assert parsed.settings == settings


@pytest.mark.parametrize(
    ("specs", "fault"),
    [
        ("", "at least one method"),
        (
            "plain,eagle",
            "Unknown method 'eagle'; known: assistant, falcon, falcon_compiled, plain, plain_compiled, plain_native, "
            "plain_native_compiled, prompt_lookup",
        ),
        ("plain,plain", "plain is given twice"),
        ("plain:tokens=3", "plain has no setting 'tokens=3'; it has: none"),
        ("falcon:tree", "falcon has no setting 'tree'; it has: drafter=..., tree=..., lookup=..., verifier="),
        ("falcon:block_size=3", "no setting 'block_size=3'"),
        ("falcon:logit_scale=0.5", "no setting 'logit_scale=0.5'; it has: drafter=.*auto_off=..."),
        ("falcon:target_fingerprint=null", "no setting 'target_fingerprint=null'"),
        ("a=falcon,a=prompt_lookup", "a is given twice"),
        ("a|b=falcon", "A label is letters"),
        ("plain=falcon", "the label of the baseline"),
        ("fast=plain", "the label of the baseline"),
    ],
)
def test_bad_labels(specs: str, fault: str) -> None:
    with pytest.raises(BenchError, match=fault):
        parse_methods(specs)


def test_plain_is_one_token_a_forward(chat_target: Any, ids: torch.Tensor) -> None:
    result = build_method("plain", MethodContext(chat_target)).generate(ids, OPTIONS)
    expected = chat_target.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    assert result.tokens == expected[0, 12:].tolist()
    (counts,) = result.statistics
    assert counts == {
        "rounds": 19,
        "row_rounds": 19,
        "accepted": 0,
        "new_tokens": 20,
        "tau": 0.0,
        "tau_with_bonus": 1.0,
        "alpha": 0.0,
    }


def test_falcon_reports_the_loops_own_statistics(chat_target: Any, drafter_path: Path, ids: torch.Tensor) -> None:
    # Every token is a child of the root, so each round accepts one draft, but the last has room for none.
    context = MethodContext(chat_target, str(drafter_path), tree=[[rank] for rank in range(256)])
    method: Any = build_method("falcon", context)
    result = method.generate(ids, OPTIONS)
    assert result.tokens == build_method("plain", context).generate(ids, OPTIONS).tokens
    (counts,) = result.statistics
    assert counts == method.drafter.last_generation.as_dict()
    assert result.accepted == [[1] * 9 + [0]]
    assert (counts["rounds"], counts["accepted"], counts["drafted"]) == (10, 9, 9 * 256)
    assert counts["verify_seconds"] > 0


def test_prompt_lookup_accepts_on_repetitive_text(tiny_target: Callable[..., Any]) -> None:
    target = tiny_target(initializer_range=0.02)  # small weights run into a cycle
    start = torch.tensor([[5, 9]])
    cycle = target.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=150)
    result = build_method("prompt_lookup:tokens=4", MethodContext(target)).generate(cycle, OPTIONS)
    assert result.tokens == build_method("plain", MethodContext(target)).generate(cycle, OPTIONS).tokens
    (counts,) = result.statistics
    assert counts["accepted"] > counts["rounds"]
    assert counts["accepted"] + counts["rounds"] == counts["new_tokens"] == 20
    assert counts["tau"] <= 4  # drafts a round
    assert counts["tau_with_bonus"] == pytest.approx(counts["tau"] + 1)


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_prompt_lookup_tokens(chat_target: Any, value: str) -> None:
    with pytest.raises(BenchError, match="whole number of at least 1"):
        build_method(f"prompt_lookup:tokens={value}", MethodContext(chat_target))


def test_the_target_is_left_as_it_was(chat_target: Any, drafter_path: Path, ids: torch.Tensor) -> None:
    method = build_method("falcon", MethodContext(chat_target, str(drafter_path)))
    method.generate(ids, OPTIONS)
    with pytest.raises(ValueError, match="num_beams"):
        method.generate(ids, {**OPTIONS, "num_beams": 2})
    assert not chat_target._forward_pre_hooks


def test_falcon_provenance(chat_target: Any, drafter_path: Path) -> None:
    weights = hashlib.sha256((drafter_path / "model.safetensors").read_bytes()).hexdigest()
    found = build_method("falcon", MethodContext(chat_target, str(drafter_path))).provenance()
    assert found["weights_sha256"] == weights
    assert (found["block_size"], found["fusion"]) == (2, "lstm")
    assert (found["tree"], found["tree_nodes"], found["tree_depth"]) == ([[0], [1], [0, 0]], 3, 2)


def test_tree_override(chat_target: Any, drafter_path: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text("[[0], [0, 0], [0, 0, 0], [1]]", encoding="utf-8")
    context = MethodContext(chat_target, str(drafter_path), tree=[[0]])
    assert build_method("falcon", context).provenance()["tree"] == [[0]]
    method: Any = build_method(f"falcon:tree={tree}", context)
    assert method.provenance()["tree"] == [[0], [1], [0, 0], [0, 0, 0]]
    method.generate(ids, {**OPTIONS, "max_new_tokens": 6})
    # Five tokens are left behind the prefill's: the first round's tree is whole.
    assert method.drafter.last_generation.drafted >= 4


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("not json", "Expecting value"),
        ("[]", "at least one path"),
        ("[[0, 0]]", r"not its parent \[0\]"),
        ("[[-1]]", "ranks from 0 on"),
        ("3", "neither a list of paths"),
    ],
)
def test_bad_tree_file(chat_target: Any, drafter_path: Path, tmp_path: Path, text: str, fault: str) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(text, encoding="utf-8")
    with pytest.raises(BenchError, match=fault) as caught:
        build_method(f"falcon:tree={tree}", MethodContext(chat_target, str(drafter_path)))
    assert str(caught.value).startswith(f"The tree file {tree} cannot be used: ")


def refused(target: Any, drafter: Path | str | None) -> str:
    with pytest.raises(BenchError) as caught:
        build_method("falcon", MethodContext(target, None if drafter is None else str(drafter)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_drafter(chat_target: Any) -> None:
    assert "pass --drafter" in refused(chat_target, None)
    assert "not a folder here, nor a Hub repo's name" in refused(chat_target, "./absent")


def test_drafter_without_config(chat_target: Any, tmp_path: Path) -> None:
    assert "has no config.json" in refused(chat_target, tmp_path)


def test_drafter_without_weights(chat_target: Any, drafter_copy: Path) -> None:
    (drafter_copy / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(chat_target, drafter_copy)


def test_drafter_with_corrupt_weights(chat_target: Any, drafter_copy: Path) -> None:
    weights = drafter_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused(chat_target, drafter_copy)


def test_drafter_with_missing_tensors(chat_target: Any, drafter_copy: Path) -> None:
    weights = drafter_copy / "model.safetensors"
    tensors = load_file(weights)
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "incomplete: layers.0.mlp.up_proj.weight (1 in all)" in refused(chat_target, drafter_copy)


def test_another_kind_of_model(chat_target: Any, tmp_path: Path) -> None:
    chat_target.save_pretrained(tmp_path)
    assert "not a Falcon drafter: its model_type is 'llama'" in refused(chat_target, tmp_path)


@pytest.mark.parametrize(("field", "value"), [("block_size", 0), ("block_size", "2"), ("no_such_field", 1)])
def test_drafter_with_an_impossible_config(chat_target: Any, drafter_copy: Path, field: str, value: Any) -> None:
    path = drafter_copy / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, field: value}), encoding="utf-8")
    message = refused(chat_target, drafter_copy)
    assert "cannot be loaded" in message


def test_named_trees(chat_target: Any, drafter_path: Path) -> None:
    context = MethodContext(chat_target, str(drafter_path), tree=[[0]])
    chained = build_method("falcon:tree=chain3", context).provenance()
    assert chained["tree"] == [[0], [0, 0], [0, 0, 0]]
    paper = build_method("falcon:tree=paper", context).provenance()
    assert paper["tree"] == [list(path) for path in TreeShape.paper(2).paths]
    with pytest.raises(BenchError, match="tree file chain0 cannot be used"):
        build_method("falcon:tree=chain0", context)


def test_dynamic_trees(chat_target: Any, drafter_path: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    context = MethodContext(chat_target, str(drafter_path))
    method: Any = build_method("falcon:tree=dynamic5", context)
    found = method.provenance()
    assert (found["tree"]["kind"], found["tree_nodes"], found["tree_depth"]) == ("dynamic", 5, 4)
    json.dumps(found)
    assert method.generate(ids, OPTIONS).tokens == build_method("plain", context).generate(ids, OPTIONS).tokens
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"tree": {"kind": "dynamic", "nodes": 7, "passes": 1}}), encoding="utf-8")
    assert build_method(f"falcon:tree={path}", context).provenance()["tree_depth"] == 2
    path.write_text('{"kind": "dynamic", "passes": 1}', encoding="utf-8")
    with pytest.raises(BenchError, match="has kind 'dynamic' and nodes"):
        build_method(f"falcon:tree={path}", context)


def test_trees_that_differ_in_anything_have_another_hash(chat_target: Any, drafter_path: Path, tmp_path: Path) -> None:
    """So that a run does not go on with a drafter that was tuned meanwhile."""
    tree: dict[str, Any] = {"kind": "dynamic", "nodes": 5}
    points = {"log_probability": [-1.0, 0.0], "acceptance": [[[0.1, 0.9]] * 2]}
    hashes = []
    for change in (
        {},
        {"continued": 4},
        {"calibration": points},
        {"calibration": points | {"acceptance": [[[0.2, 0.9]] * 2]}},
    ):
        path = tmp_path / "tree.json"
        path.write_text(json.dumps(tree | change), encoding="utf-8")
        context = MethodContext(chat_target, str(drafter_path))
        hashes += [build_method(f"falcon:tree={path}", context).provenance()["config_sha256"] for _ in range(2)]
    assert hashes[::2] == hashes[1::2]
    assert len(set(hashes)) == 4


def test_a_graph_has_room_for_one_rows_tree(chat_target: Any, drafter_path: Path, tmp_path: Path) -> None:
    """The last batch of a run may have one row, whose tree may be larger than a whole batch's."""
    path = tmp_path / "tree.json"
    path.write_text('{"kind": "dynamic", "nodes": 5, "batch_nodes": [[2, 1]]}', encoding="utf-8")
    method: Any = build_method(f"falcon:tree={path}", MethodContext(chat_target, str(drafter_path), batch_size=4))
    assert (method.provenance()["tree_nodes"], method.room) == (1, 6)


def test_the_verifier_rejection_draws_otherwise(chat_target: Any, drafter_path: Path) -> None:
    context = MethodContext(chat_target, str(drafter_path))
    assert not build_method("falcon:verifier=rejection", context).draws_as_plain
    assert build_method("falcon", context).draws_as_plain


def test_fields_of_the_drafters_config(chat_target: Any, drafter_path: Path) -> None:
    context = MethodContext(chat_target, str(drafter_path))
    method: Any = build_method("falcon:auto_off=true:verifier=rejection", context)
    assert method.drafter.config.auto_off is True
    assert method.provenance()["config"] == {"auto_off": True, "lookup": None, "verifier": "rejection"}
    looked: Any = build_method("falcon:tree=dynamic6:lookup={}", context)
    assert looked.drafter.config.lookup == {}
    own = {"auto_off": False, "lookup": None, "verifier": "follow"}  # an edit of its config.json is another run
    assert build_method("falcon", context).provenance()["config"] == own
    with pytest.raises(BenchError, match="verifier must be one of"):
        build_method("falcon:verifier=hope", context)
    with pytest.raises(BenchError, match="auto_off"):
        build_method("falcon:auto_off=much", context)
    assert set(FIELDS) <= set(FalconDrafterConfig.__annotations__)
    for name in set(FalconDrafterConfig.__annotations__) - set(FIELDS) - {"tree"}:
        with pytest.raises(BenchError, match=f"no setting '{name}=1'"):
            build_method(f"falcon:{name}=1", context)


def test_a_static_tree_drafts_without_the_drafters_own_look_up(chat_target: Any, drafter_copy: Path) -> None:
    config = json.loads((drafter_copy / "config.json").read_text())
    config |= {"tree": {"kind": "dynamic", "nodes": 5}, "lookup": {}}
    (drafter_copy / "config.json").write_text(json.dumps(config))
    context = MethodContext(chat_target, str(drafter_copy))
    for spec, lookup in (
        ("falcon", {}), ("falcon:tree=dynamic3", {}), ("falcon:lookup=null", None), ("falcon:tree=chain2", None),
    ):  # fmt: skip
        method = build_method(spec, context)
        assert method.provenance()["config"]["lookup"] == lookup
        assert len(method.generate(prompts(12)[0], OPTIONS).tokens) == 20
    with pytest.raises(BenchError, match="lookup needs a dynamic tree"):
        build_method("falcon:tree=chain2:lookup={}", context)


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 256, (1, length), generator=generator) for length in lengths]


@pytest.mark.parametrize("spec", ["plain", "falcon"])
def test_a_batchs_rows_are_those_of_single_calls(
    tiny_target: Callable[..., Any], tiny_drafter: Callable[..., Any], tmp_path: Path, spec: str
) -> None:
    target = tiny_target(vocab_size=256, eos_token_id=list(range(200, 256)))  # rows end at different times
    tiny_drafter(target, tree=[[rank] for rank in range(256)]).save_pretrained(tmp_path)
    method = build_method(spec, MethodContext(target, str(tmp_path)))
    together = method.generate(prompts(9, 3, 12, 5), OPTIONS)
    alone = [method.generate(prompt, OPTIONS) for prompt in prompts(9, 3, 12, 5)]
    assert together.rows == [result.tokens for result in alone]
    assert len({len(row) for row in together.rows}) > 1
    for one, single in zip(together.statistics, alone, strict=True):
        for count in ("row_rounds", "accepted", "new_tokens", "tau", "tau_with_bonus", "alpha"):
            assert one[count] == pytest.approx(single.statistics[0][count])
    whole = sum(one["rounds"] for one in together.statistics)
    assert whole == pytest.approx(max(single.statistics[0]["rounds"] for single in alone))
    if spec == "falcon":
        assert together.accepted == [single.accepted[0] for single in alone]  # type: ignore[index]


@pytest.mark.parametrize(
    ("tokens", "ends", "row"),
    [([5, 9, 2, 0, 0], {2}, [5, 9, 2]), ([5, 9, 2, 2], {2}, [5, 9, 2]), ([5, 9, 4], {2}, [5, 9, 4]),
     ([5, 0, 9, 0, 0], set(), [5, 0, 9])],
)  # fmt: skip
def test_until_end(tokens: list[int], ends: set[int], row: list[int]) -> None:
    assert until_end(tokens, ends, 0) == row


def test_peak_memory_is_of_the_call(chat_target: Any) -> None:
    if not reset_peak(torch.device("cpu")):
        assert build_method("plain", MethodContext(chat_target)).generate(prompts(4)[0], OPTIONS).peak_bytes is None
        return

    class Wasteful(METHODS["plain"]):  # type: ignore[misc]
        def arguments(self) -> dict[str, Any]:
            torch.ones(40 << 20, dtype=torch.float32).sum()  # 160 MiB, gone before the call
            return {"prefix_allowed_tokens_fn": self.waste} if self.label == "during" else {}

        def waste(self, row: int, ids: torch.Tensor) -> list[int]:
            torch.ones(40 << 20, dtype=torch.float32).sum()
            return list(range(256))

    before, during = (
        Wasteful(label, MethodContext(chat_target), {}).generate(prompts(4)[0], {**OPTIONS, "max_new_tokens": 2})
        for label in ("before", "during")
    )
    assert during.peak_bytes - before.peak_bytes > 100 << 20


@pytest.fixture
def assistant_folder(tiny_target: Callable[..., Any], tmp_path: Path) -> Path:
    """The target itself is the best assistant."""
    tiny_target(vocab_size=256).save_pretrained(tmp_path / "assistant")
    return tmp_path / "assistant"


def test_assistant(chat_target: Any, assistant_folder: Path, ids: torch.Tensor) -> None:
    context = MethodContext(chat_target)
    method = build_method(f"sps=assistant:model={assistant_folder}:tokens=4", context)
    result = method.generate(ids, OPTIONS)
    assert result.tokens == build_method("plain", context).generate(ids, OPTIONS).tokens
    (counts,) = result.statistics
    assert (counts["rounds"], counts["accepted"]) == (4, 16)  # five tokens a round, the prefill's among them
    found = method.provenance()
    assert (found["tokens"], found["schedule"], found["parameters"]) == (4, "constant", chat_target.num_parameters())
    usual = build_method(f"assistant:model={assistant_folder}", context).provenance()
    assert usual["tokens"] > 0
    assert usual["schedule"]
    assert usual["confidence_threshold"] is not None


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("assistant", "needs a smaller model"),
        ("assistant:model=./absent", "cannot be loaded"),
        ("assistant:model={}:tokens=0", "whole number of at least 1"),
    ],
)
def test_assistant_refuses(chat_target: Any, assistant_folder: Path, spec: str, fault: str) -> None:
    with pytest.raises(BenchError, match=fault):
        build_method(spec.format(assistant_folder), MethodContext(chat_target))


def test_assistant_of_another_vocabulary(tiny_target: Callable[..., Any], assistant_folder: Path) -> None:
    with pytest.raises(BenchError, match="has 256 tokens and the target 24"):
        build_method(f"assistant:model={assistant_folder}", MethodContext(tiny_target()))


def test_plain_native_is_plain_by_other_products(chat_target: Any, ids: torch.Tensor, monkeypatch: Any) -> None:
    calls: list[int] = []

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[0])
        return (x.double() @ weight.double().t()).to(x.dtype)

    monkeypatch.setattr(few_rows, "serves_weight", lambda weight: False)  # as without a compiler here
    monkeypatch.setattr(few_rows, "takes_natively", lambda x, weight: True)
    monkeypatch.setattr(few_rows, "native_product", product)
    monkeypatch.setattr(plain_native, "has_native_products", lambda: True)
    native, plain = (build_method(name, MethodContext(chat_target)) for name in ("plain_native", "plain"))
    wanted = plain.generate(ids, OPTIONS)
    assert calls == []
    assert native.generate(ids, OPTIONS).tokens == wanted.tokens
    assert 1 in calls
    monkeypatch.setattr(plain_native, "has_native_products", lambda: False)
    with pytest.raises(BenchError, match=r"no kernel for torch.float32 .* it needs a CPU"):
        build_method("plain_native", MethodContext(chat_target))


@pytest.mark.parametrize("name", ["plain_compiled", "falcon_compiled"])
def test_compiled_methods_refuse_an_unknown_mode(chat_target: Any, drafter_path: Path, name: str) -> None:
    with pytest.raises(BenchError, match="mode must be one of default, "):
        build_method(f"{name}:mode=fast", MethodContext(chat_target, str(drafter_path)))


def test_falcon_compiled_is_falcon_with_the_keywords_of_compiled(chat_target: Any, drafter_path: Path) -> None:
    method = build_method("falcon_compiled:tree=chain2", MethodContext(chat_target, str(drafter_path)))
    assert method.room == 3
    method.prepare(40)
    arguments = method.arguments()
    assert arguments.pop("assistant_model").config.tree == [[0], [0, 0]]
    assert arguments == compiled(40, mode="default")
    assert (method.provenance()["method"], method.provenance()["mode"]) == ("falcon_compiled", "default")


def test_plain_compiled_says_when_nothing_was_compiled(chat_target: Any, ids: torch.Tensor) -> None:
    target = copy.deepcopy(chat_target)
    target.generation_config.disable_compile = True
    with pytest.raises(CompileError, match="does not compile this target"):
        build_method("plain_compiled", MethodContext(target)).generate(ids, OPTIONS)


def test_what_another_method_had_compiled_does_not_pass_for_its_own(chat_target: Any, ids: torch.Tensor) -> None:
    target, made = copy.deepcopy(chat_target), []

    def compile_nothing(_: Any) -> Any:
        if not hasattr(target, "_compiled_call"):
            made.append(target.__call__)
            target._compiled_call = made[-1]
        return target._compiled_call

    target.get_compiled_call = compile_nothing
    first, second = (build_method(name, MethodContext(target)) for name in ("plain_compiled", "more=plain_compiled"))
    for _ in range(2):
        first.generate(ids, OPTIONS)
    assert len(made) == 1
    target.generation_config.disable_compile = True
    with pytest.raises(CompileError, match="does not compile this target"):
        second.generate(ids, OPTIONS)


@pytest.mark.slow
@pytest.mark.skipif(not SERVED, reason="the kernel needs Linux, AVX2 and a C++ compiler")
def test_plain_native_compiled_is_plain_compiled_with_our_products(chat_target: Any, monkeypatch: Any) -> None:
    target, calls = copy.deepcopy(chat_target), []
    own = native_product_graphs.native_products

    def noting(x: torch.Tensor, weights: Any) -> list[torch.Tensor]:
        calls.append(x.shape[0])
        return own(x, weights)

    monkeypatch.setattr(native_product_graphs, "native_products", noting)
    ours, torchs = (build_method(name, MethodContext(target)) for name in ("plain_native_compiled", "plain_compiled"))
    plain = build_method("plain", MethodContext(chat_target))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for method in (ours, torchs):
        method.prepare(60)
    for prompt in prompts(12, 5):  # in turn: each has a graph, which the other leaves alone
        for method, multiplied in ((torchs, False), (ours, True)):
            before = len(calls)
            assert method.generate(prompt, OPTIONS).tokens == plain.generate(prompt, OPTIONS).tokens
            assert (len(calls) > before) is multiplied
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_compiled", "falcon_compiled"])
def test_compiled_methods_write_plains_text_with_one_graph(chat_target: Any, drafter_path: Path, name: str) -> None:
    target = copy.deepcopy(chat_target)
    method = build_method(name, MethodContext(target, str(drafter_path)))
    method.prepare(60 + method.room)
    plain = build_method("plain", MethodContext(chat_target))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompt in prompts(12, 5, 30):
        assert method.generate(prompt, OPTIONS).tokens == plain.generate(prompt, OPTIONS).tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (method.generate(prompts(12)[0], OPTIONS).statistics[0]["rounds"] == 19) == (name == "plain_compiled")
