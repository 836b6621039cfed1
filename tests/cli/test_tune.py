"""``falcon-hf tune`` as a user types it, on a tiny chat model on disk."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_hf import FalconDrafter
from falcon_hf.bench.question_sets import find_questions
from falcon_hf.cli.prompts import read_prompts
from falcon_hf.tuning.calibration import Calibration
from falcon_hf.tuning.choice import choose
from falcon_hf.tuning.drafter_tree import drafter_config, write_drafter_tree
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.roofline import SHAPES, TargetShape, gpu_named

from ..bench.tiny import byte_tokenizer
from .conftest import Run, assert_refused

LINES = [
    {"question_id": index, "category": task, "turns": [f"Question {index}?"]}
    for index, task in enumerate(("sums", "tales", "sums"))
]


@pytest.fixture(scope="session")
def home(repos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts in three forms, a copy of the drafter, and a calibration."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "prompts.jsonl").write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    (folder / "prompts.txt").write_text("One?\n\nTwo?\nThree?\n")
    shutil.copytree(repos / "drafter", folder / "drafter")
    return folder


def options(repos: Path, home: Path, **changed: Any) -> list[str]:
    given: dict[str, Any] = {
        "prompts": home / "questions.jsonl", "output": home / "tune.json", "target": repos / "target",
        "drafter": home / "drafter", "dtype": "float32", "max_new_tokens": 8, "max_passes": 2, "max_nodes": 8,
        "contexts": "16,40", "repeats": 1, "threads": torch.get_num_threads(),
    }  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in (given | changed).items()]
    return ["tune", *(part for pair in pairs for part in pair)]


def test_tune_check_and_apply(run: Run, repos: Path, home: Path) -> None:
    result = run(*options(repos, home, settings=3, check=home / "check.json", apply=home / "drafter", pictures=home))
    assert result.exit_code == 0, result.output
    for word in ("Predicted, prefill left out", "| tuned |", "| plain |", "Fastest on sums", "median"):
        assert word in result.stdout
    calibration = Calibration.read(home / "tune.json")
    assert calibration.provenance["target"]["dtype"] == "float32"
    assert calibration.provenance["prompts"]["count"] == 3
    assert calibration.drafters[0].provenance["block_size"] == 2
    check = json.loads((home / "check.json").read_text())
    assert len(check["settings"]) == 3
    assert {"sums", "tales"} == set(check["settings"][0]["by_task"])
    reported = run("report", home / "check.json")
    assert reported.exit_code == 0, reported.output
    assert reported.stdout.startswith("Predicted against measured")
    assert result.stdout.endswith(reported.stdout)
    assert json.loads(run("report", home / "check.json", "--json").stdout)["check"]["settings"] == check["settings"]
    assert_refused(run("report", home / "check.json", home / "check.json"), "alone")
    assert_refused(run("report", home / "check.json", "--brief"), "--brief", "tune --check")
    config = FalconDrafter.from_pretrained(home / "drafter").config
    assert config.tree["nodes"] <= 7, "--max-nodes, though the paper's whole tree is shown as a rival"
    assert config.lookup == calibration.lookup.config_entry()
    assert sum(calibration.lookup.trials) > 0
    assert (home / "tree.svg").is_file()

    again = run(*options(repos, home, check=home / "sweep.json", pictures=home / "p"), "--sweep", "--json")
    assert again.exit_code == 0, again.output
    assert "Using the calibration" in again.stderr
    shown = json.loads(again.stdout)
    automatic, *cells = shown["check"]["settings"]
    assert automatic["kind"] == "chosen"
    assert automatic["nodes"] == config.tree["nodes"] + 1, "what was applied"
    assert [entry["passes"] for entry in cells] == [1, 2]
    assert (home / "p" / "sweep-tuned.png").is_file()

    before = (home / "tune.json").read_bytes()
    for changed, difference in (
        ({"dtype": "bfloat16"}, "target."),
        ({"num_prompts": 2}, "prompts.count: 3 there, 2 here"),
        ({"prompts": home / "prompts.jsonl"}, "prompts.sha256"),
        ({"max_new_tokens": 9}, "plan.max_new_tokens: 8 there, 9 here"),
        ({"max_nodes": 7}, "plan.nodes: 8 there, 7 here"),
        ({"contexts": "16"}, "plan.contexts"),
    ):
        assert_refused(run(*options(repos, home, **changed)), "tune.json is of other settings", difference, "--output")
    assert (home / "tune.json").read_bytes() == before
    shutil.copy(home / "questions.jsonl", home / "renamed.jsonl")
    assert run(*options(repos, home, prompts=home / "renamed.jsonl"), "--json").exit_code == 0


@pytest.mark.parametrize("measured", [False, True])
def test_apply_beside_the_tree_of_other_machines(
    run: Run, repos: Path, home: Path, tmp_path: Path, measured: bool
) -> None:
    """A CPU in float32 has dear rows: what the drafter had stays for cheap ones, and is refused where there is none."""
    folder = tmp_path / "drafter"
    shutil.copytree(home / "drafter", folder)
    static = [[0], [1]]
    write_drafter_tree(folder, static)
    given = options(repos, home, apply=folder, drafter=folder, output=tmp_path / "tune.json")
    assert_refused(run(*given, "--beside"), "--beside keeps a dynamic tree", "has none")
    assert drafter_config(folder)["tree"] == static
    write_drafter_tree(folder, {"kind": "dynamic", "nodes": 3, "width": 2})
    assert_refused(run(*given, "--beside", "--static"), "--static")
    assert_refused(run(*options(repos, home), "--beside"), "--beside", "only with --apply")
    measuring = ("--dynamic", "--check", str(tmp_path / "check.json"), "--settings", "6") if measured else ()
    result = run(*given, "--beside", *measuring)
    assert result.exit_code == 0, result.output
    assert "on machines of this kind" in " ".join(result.stderr.split())
    tree = FalconDrafter.from_pretrained(folder).config.tree
    assert tree["cheap_rows"] == {"nodes": 3, "width": 2}
    assert {"nodes", "passes", "width", "candidates"} <= set(tree["dear_rows"])
    assert "acceptance" in tree["calibration"]


def test_a_check_that_was_stopped_goes_on(
    run: Run, repos: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(repos, home, output=tmp_path / "tune.json", check=tmp_path / "check.json", settings=2)
    reported = []

    def stopped(text: str) -> None:
        reported.append(text)
        if text.startswith("Prompt 3"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("falcon_hf.cli.tune._progress", lambda shown: stopped)
        result = run(*given)
    assert result.exit_code == 130, result.output
    assert "goes on" in result.stderr
    begun = json.loads((tmp_path / "check.json").read_text())
    assert (begun["complete"], len(begun["turns"])) == (False, 2)
    assert_refused(run("report", tmp_path / "check.json"), "cut off")
    result = run(*given, "--json")
    assert result.exit_code == 0, result.output
    check = json.loads((tmp_path / "check.json").read_text())
    assert check["turns"][:2] == begun["turns"]
    assert (check["complete"], len(check["turns"]), check["summary"]["calls"]) == (True, 3, 3)


@pytest.mark.parametrize(("name", "count"), [("prompts.jsonl", 2), ("prompts.txt", 3)])
def test_other_prompt_files(run: Run, repos: Path, home: Path, tmp_path: Path, name: str, count: int) -> None:
    result = run(*options(repos, home, prompts=home / name, output=tmp_path / "tune.json"), "--json")
    assert result.exit_code == 0, result.output
    assert Calibration.read(tmp_path / "tune.json").provenance["prompts"]["count"] == count
    assert json.loads(result.stdout)["predictions"][0]["tokens_per_second"] > 0


def test_named_question_sets(run: Run, repos: Path, home: Path, tmp_path: Path) -> None:
    given = options(repos, home, prompts="out-of-domain/law", output=tmp_path / "t.json", num_prompts=2)
    check = ("--check", tmp_path / "c.json", "--check-prompts", "out-of-domain", "--settings", 2)
    result = run(*given, *check, "--json")
    assert result.exit_code == 0, result.output
    known = find_questions("out-of-domain/law")
    found = Calibration.read(tmp_path / "t.json").provenance["prompts"]
    assert found == {"file": "out-of-domain/law", "sha256": known.sha256, "count": 2}
    assert json.loads((tmp_path / "c.json").read_text())["summary"]["calls"] == 2
    refused = run(*options(repos, home, prompts="no-such-set", output=tmp_path / "u.json"))
    assert_refused(refused, "no-such-set", "mt-bench", "out-of-domain")


def test_mt_bench_as_the_hub_has_it(tmp_path: Path) -> None:
    """Its ``prompt`` is a list of turns; the first is asked."""
    line = {"prompt_id": 81, "prompt": ["Write a post.", "Rewrite it."], "category": "writing", "reference": []}
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(line | {"question_id": 81}) + "\n")
    tokenizer = byte_tokenizer()
    (prompt,) = read_prompts(str(path), tokenizer).prompts
    assert prompt.task == "writing"
    assert "Write a post." in tokenizer.decode(prompt.ids[0])
    assert "Rewrite" not in tokenizer.decode(prompt.ids[0])
    path.write_text('{"other": "a \\"prompt\\"", "prompt": "One?"}\n')
    (plain,) = read_prompts(str(path), tokenizer).prompts
    assert "One?" in tokenizer.decode(plain.ids[0])
    path.write_text('{"prompt": "One?"}\n{"prompt": ["Two?"]}\n')
    with pytest.raises(TuningError, match='non-empty "prompt"'):
        read_prompts(str(path), tokenizer)


def test_prompts_with_a_mark_at_the_start_and_lines_of_unicode(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "One\u2028two?"}\n{"prompt": "Three?"}\n', encoding="utf-8")
    first, _ = read_prompts(str(path), tokenizer).prompts
    assert "One\u2028two?" in tokenizer.decode(first.ids[0])
    (tmp_path / "prompts.txt").write_text("One\u2028two?\nThree?\n", encoding="utf-8")
    assert len(read_prompts(str(tmp_path / "prompts.txt"), tokenizer).prompts) == 2


def test_two_drafters_are_compared(run: Run, repos: Path, home: Path, tmp_path: Path, tiny_drafter: Any) -> None:
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(repos / "target", dtype="auto")
    tiny_drafter(target, 3).save_pretrained(tmp_path / "three")
    given = options(repos, home, output=tmp_path / "tune.json")
    result = run(*given, "--drafter", tmp_path / "three", "--json")
    assert result.exit_code == 0, result.output
    calibration = Calibration.read(tmp_path / "tune.json")
    assert len(calibration.drafters) == 2
    assert {one.block_size for one in choose(calibration.options(), 2, 8) if one.shape} == {2, 3}


def test_a_drafter_gets_its_own_best_tree(run: Run, repos: Path, home: Path, tmp_path: Path, tiny_drafter: Any) -> None:
    """Of two drafters each gets the best of its own, whichever is the faster; a third one gets nothing."""
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(repos / "target", dtype="auto")
    shutil.copytree(repos / "drafter", tmp_path / "two")
    tiny_drafter(target, 3).save_pretrained(tmp_path / "three")
    given = [*options(repos, home, drafter=tmp_path / "two", output=tmp_path / "t.json"), "--drafter"]
    given += [str(tmp_path / "three"), "--json"]
    for name in ("two", "three"):
        result = run(*given, "--apply", f"{tmp_path}/./{name}")
        assert result.exit_code == 0, result.output
        (own,) = [one for one in Calibration.read(tmp_path / "t.json").options() if one.name == str(tmp_path / name)]
        best = next(one for one in choose([own], 2, 8) if one.shape is not None and one.nodes <= 8)
        found = FalconDrafter.from_pretrained(tmp_path / name).config
        assert found.tree == Calibration.read(tmp_path / "t.json").dynamic(best).tree
        assert found.lookup is not None
        result = run(*given, "--apply", tmp_path / name, "--static")
        assert result.exit_code == 0, result.output
        found = FalconDrafter.from_pretrained(tmp_path / name).config
        assert (found.tree, found.lookup) == (best.tree, None)
    assert_refused(run(*given, "--static"), "--static", "only with --apply")
    assert_refused(run(*given, "--apply", tmp_path / "two", "--static", "--check", tmp_path / "c.json", "--dynamic"),
                   "--static and --dynamic")  # fmt: skip
    shutil.copytree(tmp_path / "two", tmp_path / "other")
    before = (tmp_path / "other" / "config.json").read_bytes()
    assert_refused(run(*given, "--apply", tmp_path / "other"), "none of the drafters measured", "--drafter")
    assert (tmp_path / "other" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompts": "none.jsonl"}, ("none.jsonl", "cannot be read")),
        ({"num_prompts": 9}, ("3 questions", "1 to 3")),
        ({"contexts": "64,x"}, ("--contexts", "64,x")),
        ({"apply": "nowhere"}, ("nowhere", "no drafter's folder")),
        ({"contexts": "4000", "output": "new.json"}, ("512 positions",)),
    ],
)
def test_bad_input_is_refused(run: Run, repos: Path, home: Path, changed: dict[str, Any], words: Any) -> None:
    result = run(*options(repos, home, **changed), "--json")
    assert_refused(result, *words)


def test_dynamic_trees_are_measured_and_applied(run: Run, repos: Path, home: Path, tmp_path: Path) -> None:
    shutil.copytree(repos / "drafter", tmp_path / "drafter")
    given = options(repos, home, drafter=tmp_path / "drafter", output=tmp_path / "t.json", num_prompts=1)
    given += ["--check", tmp_path / "check.json", "--apply", tmp_path / "drafter", "--dynamic", "--sweep"]
    result = run(*given)
    assert result.exit_code == 0, result.output
    entries = json.loads((tmp_path / "check.json").read_text())["settings"]
    assert "dynamic" in [entry["kind"] for entry in entries]
    assert all((entry["error"] is None) == (entry["kind"] == "dynamic") for entry in entries)
    assert all((entry["lookup"] is None) == (entry["kind"] != "dynamic") for entry in entries)
    fastest = max(entries, key=lambda entry: entry["measured"]["tokens_per_second"])
    config = FalconDrafter.from_pretrained(tmp_path / "drafter").config
    assert (config.tree, config.lookup) == (fastest["tree"], fastest["lookup"])
    words = "dynamic with look-up" if fastest["kind"] == "dynamic" else "static"
    assert f"The best tree, {words}, is now the tree of {tmp_path / 'drafter'}" in " ".join(result.stderr.split())


def test_what_cannot_be_applied_or_drawn_is_said_first(
    run: Run, repos: Path, home: Path, tmp_path: Path, tiny_drafter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def refused(given: list[Any], *words: str) -> None:
        result = run(*given)
        assert result.exit_code == 2, result.output
        assert all(word in result.stderr.splitlines()[-1] for word in words), result.stderr
        assert not (tmp_path / "check.json").exists(), "nothing was measured"

    target = AutoModelForCausalLM.from_pretrained(repos / "target", dtype="auto")
    shutil.copytree(repos / "drafter", tmp_path / "two")
    tiny_drafter(target, 3).save_pretrained(tmp_path / "three")
    given = options(repos, home, drafter=tmp_path / "two", output=tmp_path / "t.json", check=tmp_path / "check.json")
    given += ["--drafter", str(tmp_path / "three"), "--dynamic", "--settings", "1"]
    assert run(*options(repos, home, drafter=tmp_path / "two", output=tmp_path / "t.json"), "--drafter",
               tmp_path / "three").exit_code == 0  # fmt: skip
    best = choose(Calibration.read(tmp_path / "t.json").options(), 2, 8)
    fastest = next(one.drafter for one in best if one.shape is not None and one.nodes <= 8)
    other = next(name for name in ("two", "three") if str(tmp_path / name) != fastest)
    refused([*given, "--apply", tmp_path / other], "None of the", "--settings")
    refused([*given, "--check-prompts", tmp_path / "none.jsonl"], "none.jsonl", "cannot be read")
    file = tmp_path / "two" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"verifier": "rejection"}))
    refused([*given, "--apply", tmp_path / "two"], "'rejection'", "leave out --dynamic")
    alone = [*options(repos, home, drafter=tmp_path / "two", output=tmp_path / "t.json"), "--drafter"]
    applied = run(*alone, tmp_path / "three", "--apply", tmp_path / "two")
    assert applied.exit_code == 0, applied.output
    assert isinstance(json.loads(file.read_text())["tree"], list), "what it can sample with"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused([*given, "--pictures", tmp_path / "p"], "pip install 'falcon_hf[tune]'")


def test_prompts_and_output_are_needed(run: Run) -> None:
    assert_refused(run("tune"), "--prompts FILE --output FILE")


def test_simulate(run: Run, tmp_path: Path) -> None:
    given = ("--simulate", "--shape", "7B", "--gpu", "h100-sxm", "--max-passes", 2, "--max-nodes", 12)
    result = run("tune", *given, "--output", tmp_path / "plan.json", "--pictures", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Best speedup as acceptance falls" in result.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    (own,) = plan["plans"]
    assert [one["block_size"] for one in own["by_block_size"]] == [1, 2, 3, 4]
    assert own["limit"][-1]["speedup"] > own["limit"][0]["speedup"]
    assert {"limit.svg", "block_size.png", "scaling.svg"} <= {path.name for path in tmp_path.iterdir()}


def test_simulate_with_a_calibration(run: Run, repos: Path, home: Path, tmp_path: Path) -> None:
    assert run(*options(repos, home, output=tmp_path / "tune.json"), "--json").exit_code == 0
    result = run("tune", "--simulate", "--shape", "1B", "--acceptance", tmp_path / "tune.json", "--max-nodes", 8,
                 "--max-passes", 2, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    (own,) = json.loads(result.stdout)["plans"]
    assert [one["block_size"] for one in own["by_block_size"]] == [2]


def test_cost_curves(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "TINY", TargetShape("TINY", 2, 64, 4, 2, 96, 128))
    given = ("tune", "--cost-curves", "--shape", "tiny", "--contexts", "8", "--max-passes", 2, "--repeats", 1)
    result = run(*given, "--dtype", "float32", "--output", tmp_path / "curves.json")
    assert result.exit_code == 0, result.output
    assert "Verification, tiny" in result.stdout
    found = json.loads((tmp_path / "curves.json").read_text())
    assert set(found["drafts_by_block_size"]) == {"1", "2", "3", "4"}
    assert found["machine"]["device"] == "cpu"
    assert_refused(run(*given), "--output FILE")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--gpu", "tpu"), ("no one GPU 'tpu'",)),
        (("--shape", "3B"), ("no target shape",)),
        (("--acceptance", "great"), ("--acceptance", "great")),
        (("--shape", "70B"), ("does not fit", "give 2")),
        (("--mode", "fast"), ("graph or eager",)),
    ],
)
def test_impossible_plans_are_refused(run: Run, given: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(run("tune", "--simulate", *given), *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--sweep",), ("--sweep: needs --check FILE",)),
        (("--check-prompts", "a.jsonl", "--settings", 3), ("--check-prompts, --settings: needs --check",)),
        (("--check-repeats", 1), ("--check-repeats: needs --check",)),
        (("--dynamic",), ("--dynamic: needs --check FILE",)),
        (("--check", "c.json", "--sweep", "--settings", 12), ("--settings: --sweep",)),
        (("--gpu", "h200"), ("--gpu: only with --simulate",)),
        (("--simulate", "--prompts", "p.txt", "--device", "cpu"), ("--prompts, --device: not with --simulate",)),
        (("--simulate", "--apply", "x"), ("--apply: not with --simulate",)),
        (("--simulate", "--cost-curves"), ("--cost-curves: not with --simulate",)),
        (("--cost-curves", "--shape", "1B", "--max-nodes", 64), ("--max-nodes: not with --cost-curves",)),
        (("--cost-curves", "--json"), ("--json: not with --cost-curves",)),
    ],
)
def test_options_that_would_be_ignored_are_refused(run: Run, given: tuple[Any, ...], words: tuple[str, ...]) -> None:
    """Also where the value given is the default."""
    assert_refused(run("tune", *given), *words)


def test_the_help_names_gpus_that_there_are(run: Run) -> None:
    text = " ".join(run("tune", "--help").stdout.split())
    (named,) = re.findall(r"--gpu \S+ --simulate: ([^;]*), \.\.\.; see docs/tuning.md", text)
    assert [gpu_named(name).name for name in named.split(", ")] == ["a100-80gb", "h100-sxm"]
