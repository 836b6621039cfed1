"""Runs: what the result holds, fairness of order and seeds, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.methods import Method, MethodContext, MethodResult, build_method
from falcon_hf.bench.questions import QuestionSet, prompt_ids, read_question_file, read_questions
from falcon_hf.bench.report import render
from falcon_hf.bench.result_file import read_result
from falcon_hf.bench.runs import RunPlan, run
from falcon_hf.bench.summary import FORBIDDEN_GAP

GREEDY = {"max_new_tokens": 12}
SAMPLED = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_p": 0.9}

Runner = Callable[..., dict[str, Any]]


class Recorder(Method):
    """Wraps a method; ``calls`` is shared. Raises what ``fault`` returns before a call, if anything."""

    def __init__(self, inner: Method, calls: list[str], fault: Callable[[int], BaseException | None]) -> None:
        self.inner, self.label, self.target, self.calls, self.fault = inner, inner.label, inner.target, calls, fault
        self.may_fail = inner.may_fail  # type: ignore[misc]
        self.provenance = inner.provenance  # type: ignore[method-assign]

    def arguments(self) -> dict[str, Any]:
        return self.inner.arguments()

    def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
        error = self.fault(len(self.calls))
        if error is not None:
            raise error
        self.calls.append(self.label)
        return self.inner.generate(ids, options)


class WrongAtFive(Method):
    """A decoder with an error: plain, but its sixth token is the next id."""

    name = "wrong"

    def arguments(self) -> dict[str, Any]:
        return {}

    def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
        result = super().generate(ids, options)
        result.tokens[5] = (result.tokens[5] + 1) % 256
        return result


@pytest.fixture
def runner(chat_target: Any, chat_tokenizer: Any, drafter_path: Path, question_file: Path, tmp_path: Path) -> Runner:
    """``runner(options, labels=..., extra=..., wrap=..., **plan)``: one run into ``result.json``."""

    def start(
        options: dict[str, Any],
        labels: tuple[str, ...] = ("plain", "falcon"),
        extra: tuple[Method, ...] = (),
        wrap: Callable[[Method], Method] = lambda method: method,
        **plan: Any,
    ) -> dict[str, Any]:
        context = MethodContext(chat_target, str(drafter_path))
        built = [wrap(build_method(label, context)) for label in labels]
        whole = RunPlan(read_question_file(question_file), options, **{"turns": 1, **plan})
        return run(chat_target, chat_tokenizer, [*built, *extra], whole, tmp_path / "result.json", show_progress=False)

    return start


def recording(calls: list[str], fault: Callable[[int], BaseException | None] = lambda _: None) -> Any:
    return lambda method: Recorder(method, calls, fault)


def test_one_run(runner: Runner, tmp_path: Path, question_file: Path) -> None:
    result = runner(GREEDY)
    assert result == read_result(tmp_path / "result.json")
    assert result["complete"]
    assert result["date"] <= result["finished"]
    settings = result["settings"]
    assert settings["options"] == {"do_sample": False, "max_new_tokens": 12}
    assert settings["questions"]["file"] == question_file.name
    assert len(settings["questions"]["sha256"]) == 64
    assert settings["target"]["dtype"] == "float32"
    assert settings["target"]["attention"] == "sdpa"
    assert len(settings["target"]["fingerprint"]) == 32
    assert settings["versions"]["torch"] == torch.__version__
    assert settings["machine"]["threads"] == torch.get_num_threads()
    assert settings["machine"]["cpu"]
    assert settings["methods"]["falcon"]["tree"] == [[0], [1], [0, 0]]
    assert [(entry["question_id"], entry["method"]) for entry in result["runs"]] == [
        (81, "plain"), (81, "falcon"), (82, "falcon"), (82, "plain"), (83, "plain"), (83, "falcon"),
    ]  # fmt: skip
    for entry in result["runs"]:
        assert entry["new_tokens"] == 12
        assert entry["seconds"] > 0
        assert entry["identical"] is (None if entry["method"] == "plain" else True)
        assert entry["first_difference"] is None
        assert "tokens" not in entry
    hashes = {(entry["question_id"], entry["output_sha256"]) for entry in result["runs"]}
    assert len(hashes) == 3  # plain and falcon agree, the questions do not
    falcon = result["summary"]["falcon"]
    assert (falcon["identical"], falcon["compared"], falcon["calls"]) == (3, 3, 3)
    assert falcon["speed_ratio"]["count"] == 3
    assert falcon["rounds"] > 0
    assert falcon["round"]["total_ms"] > 0


def test_same_seed_before_each_method(runner: Runner) -> None:
    result = runner(SAMPLED, seeds=(0, 1, 2), repeats=2)
    assert len(result["runs"]) == 3 * 3 * 2 * 2
    falcon = result["summary"]["falcon"]
    # One text a question and seed; the repeat must give it again.
    assert (falcon["identical"], falcon["compared"]) == (9, 9)
    texts = {(entry["question_id"], entry["seed"]): set() for entry in result["runs"]}
    for entry in result["runs"]:
        texts[entry["question_id"], entry["seed"]].add(entry["output_sha256"])
    assert all(len(own) == 1 for own in texts.values())
    assert len(set.union(*texts.values())) == 9  # and seeds differ, or the above says nothing


def test_another_draw_is_not_identical_and_has_no_gap(runner: Runner, chat_target: Any) -> None:
    class OtherSeed(Method):
        name = "other"

        def arguments(self) -> dict[str, Any]:
            torch.manual_seed(99)
            return {}

    result = runner(SAMPLED, extra=(OtherSeed("other", MethodContext(chat_target), {}),))
    assert result["summary"]["other"]["identical"] == 0
    assert all(entry["gap"] is None for entry in result["runs"])
    assert any(entry["first_difference"] is not None for entry in result["runs"])


def test_an_error_is_seen_where_it_happens_with_a_large_gap(runner: Runner, chat_target: Any) -> None:
    result = runner(GREEDY, extra=(WrongAtFive("wrong", MethodContext(chat_target), {}),))
    wrong = [entry for entry in result["runs"] if entry["method"] == "wrong"]
    assert [entry["first_difference"] for entry in wrong] == [5, 5, 5]
    assert all(entry["identical"] is False and entry["gap"] > 0 for entry in wrong)
    assert all(entry["gap_units"] == pytest.approx(entry["gap"] / entry["gap_unit"]) for entry in wrong)
    assert result["summary"]["wrong"]["largest_gap_units"] > 1000
    assert (result["summary"]["wrong"]["identical"], result["summary"]["falcon"]["identical"]) == (0, 3)


def test_a_forbidden_token_is_valid_json(runner: Runner, chat_target: Any, tmp_path: Path) -> None:
    forbidden = 7

    class Careless(Method):
        name = "careless"

        def arguments(self) -> dict[str, Any]:
            return {"bad_words_ids": None}

        def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
            result = super().generate(ids, options)
            result.tokens[0] = forbidden
            return result

    careless = Careless("careless", MethodContext(chat_target), {})
    result = runner({**GREEDY, "bad_words_ids": [[forbidden]]}, extra=(careless,))
    gaps = [entry["gap"] for entry in result["runs"] if entry["method"] == "careless"]
    assert gaps == [FORBIDDEN_GAP] * 3
    assert "forbidden token" in render([result])
    json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_order_rotates_from_question_to_question_and_repeat_to_repeat(runner: Runner) -> None:
    calls: list[str] = []
    labels = ("plain", "falcon", "prompt_lookup")
    runner(GREEDY, labels=labels, wrap=recording(calls), repeats=2, warmup=0)
    orders = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    a, b, c = (labels[turn:] + labels[:turn] for turn in range(3))
    assert orders == [a, b, c, b, c, a]


def test_warmup_is_short_and_not_in_the_result(runner: Runner) -> None:
    calls: list[str] = []
    result = runner({"max_new_tokens": 12, "min_new_tokens": 12}, wrap=recording(calls), warmup=2)
    assert calls[:4] == ["plain", "plain", "falcon", "falcon"]
    assert len(calls) == 4 + 6
    assert len(result["runs"]) == 6


def interrupted(runner: Runner, tmp_path: Path) -> dict[str, Any]:
    """Run until a Ctrl-C in the third question (calls 0 and 1 warm up); return what is on disk."""
    with pytest.raises(KeyboardInterrupt):
        runner(GREEDY, wrap=recording([], lambda call: KeyboardInterrupt() if call == 7 else None))
    return read_result(tmp_path / "result.json")


def test_goes_on_after_an_interrupt(runner: Runner, tmp_path: Path) -> None:
    part = interrupted(runner, tmp_path)
    assert not part["complete"]
    assert [entry["question_id"] for entry in part["runs"]] == [81, 81, 82, 82]
    assert part["summary"]["falcon"]["calls"] == 2
    calls: list[str] = []
    whole = runner(GREEDY, wrap=recording(calls), warmup=1)
    assert whole["complete"]
    assert whole["runs"][:4] == part["runs"]
    assert [entry["question_id"] for entry in whole["runs"][4:]] == [83, 83]
    assert whole["date"] == part["date"]
    assert calls == ["plain", "falcon"] * 2  # warm-up and the third question
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions.jsonl", "result.json"]


def test_a_complete_result_is_not_run_again(runner: Runner) -> None:
    first = runner(GREEDY)
    calls: list[str] = []
    assert runner(GREEDY, wrap=recording(calls)) == first
    assert calls == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"options": {"max_new_tokens": 13}}, "options.max_new_tokens: 12 there, 13 here"),
        ({"options": {**GREEDY, "repetition_penalty": 1.1}}, "options.repetition_penalty: null there, 1.1 here"),
        ({"labels": ("plain",)}, "methods.falcon: "),
        ({"repeats": 2}, "repeats: 1 there, 2 here"),
        ({"seeds": (4,)}, r"seeds: \[0\] there, \[4\] here"),
    ],
)
def test_other_settings_are_refused(runner: Runner, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    part = interrupted(runner, tmp_path)
    with pytest.raises(BenchError, match=named):
        runner(**{"options": GREEDY, **change})
    assert read_result(tmp_path / "result.json") == part


def test_changed_questions_are_refused(runner: Runner, tmp_path: Path, question_file: Path) -> None:
    interrupted(runner, tmp_path)
    question_file.write_text(question_file.read_text().replace("Count to ten", "Count to nine"))
    with pytest.raises(BenchError, match=r"questions\.sha256: "):
        runner(GREEDY)


def test_a_changed_template_or_end_token_is_refused(
    runner: Runner, tmp_path: Path, chat_target: Any, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(runner, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(chat_tokenizer, "chat_template", chat_tokenizer.chat_template + " ")
        with pytest.raises(BenchError, match=r"tokenizer\.chat_template_sha256: "):
            runner(GREEDY)
    monkeypatch.setattr(chat_target.generation_config, "eos_token_id", 77)
    with pytest.raises(BenchError, match=r"target\.generation_config\.eos_token_id: "):
        runner(GREEDY)


@pytest.mark.parametrize("text", ["not json", "[]", '{"runs": []}'])
def test_a_file_that_is_no_result_is_left_alone(runner: Runner, tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="not a result of falcon-hf bench"):
        runner(GREEDY)
    assert path.read_text() == text


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from falcon_hf import whole_files
from falcon_hf.bench import result_file
from falcon_hf.bench.methods import MethodContext, build_method
from falcon_hf.bench.questions import read_question_file
from falcon_hf.bench.runs import RunPlan, run
from tests.bench.tiny import byte_tokenizer

target_folder, questions, output = map(Path, sys.argv[1:])
replace = os.replace
def killed(source, target):  # the worst moment: the new file is written, but not in its place
    if len(result_file.read_result(output)["runs"]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
target = AutoModelForCausalLM.from_pretrained(target_folder).eval()
plan = RunPlan(read_question_file(questions), {"max_new_tokens": 8}, turns=1)
methods = [build_method(label, MethodContext(target)) for label in ("plain", "prompt_lookup")]
if "kill" in os.environ.get("FALCON_TEST", ""):
    run_write = result_file.ResultFile.add
    def add(self, entries):
        whole_files.os.replace = killed
        run_write(self, entries)
    result_file.ResultFile.add = add
run(target, byte_tokenizer(), methods, plan, output, show_progress=False)
"""


def test_goes_on_after_a_kill(chat_target: Any, question_file: Path, tmp_path: Path) -> None:
    chat_target.save_pretrained(tmp_path / "target")
    output = tmp_path / "result.json"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "target"), str(question_file), str(output)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "FALCON_TEST": "kill", "HF_HUB_OFFLINE": "1"}
    killed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    part = read_result(output)
    assert [entry["question_id"] for entry in part["runs"]] == [81, 81]
    resumed = subprocess.run(command, cwd=root, env={**environment, "FALCON_TEST": ""}, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    whole = read_result(output)
    assert whole["complete"]
    assert whole["runs"][:2] == part["runs"]
    assert [entry["question_id"] for entry in whole["runs"]] == [81, 81, 82, 82, 83, 83]


@pytest.mark.parametrize(
    ("options", "plan", "fault"),
    [
        (GREEDY, {"seeds": (0, 1)}, "Greedy decoding draws nothing"),
        (SAMPLED, {"seeds": (1, 1)}, "different numbers"),
        (GREEDY, {"seeds": ()}, "one or more"),
        (GREEDY, {"repeats": 0}, "repeats must be at least 1"),
        (GREEDY, {"warmup": -1}, "warmup at least 0"),
        (GREEDY, {"batch_size": 0}, "batch size and the number of turns"),
        (GREEDY, {"turns": 0}, "batch size and the number of turns"),
        ({**GREEDY, "stop_strings": ["a"]}, {"batch_size": 2}, "use a batch size of 1"),
        ({"stopping_criteria": object()}, {}, "must be JSON values"),
        ({**GREEDY, "num_return_sequences": 2}, {}, "num_return_sequences changes what generate"),
        ({**GREEDY, "output_scores": True}, {}, "output_scores changes what generate"),
        ({"temperature": float("nan"), "do_sample": True}, {}, "must be JSON values"),
        ({**GREEDY, "num_beams": 2}, {}, "falcon cannot run with these options: num_beams=2"),
        ({**GREEDY, "no_such_option": 2}, {}, "plain cannot run with these options: .*no_such_option"),
        ({**GREEDY, "num_beams": 2}, {"warmup": 0}, "falcon cannot run with these options: num_beams=2"),
    ],
)
def test_refused_before_any_question(
    runner: Runner, tmp_path: Path, options: dict[str, Any], plan: dict[str, Any], fault: str
) -> None:
    with pytest.raises(BenchError, match=fault):
        runner(options, **plan)
    output = tmp_path / "result.json"
    assert not output.exists() or read_result(output)["runs"] == []


def test_no_question() -> None:
    with pytest.raises(BenchError, match="at least one question"):
        RunPlan(QuestionSet.of("none", []))


def test_stop_strings(runner: Runner, chat_target: Any, chat_tokenizer: Any, question_file: Path) -> None:
    ids = prompt_ids(chat_tokenizer, read_questions(question_file)[0])
    out = chat_target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    text = [chat_tokenizer.decode(token) for token in out[0, ids.shape[1] :]]
    stop = next(symbol for symbol in text[3:] if symbol.isascii() and symbol.isprintable() and symbol.strip())
    result = runner({"max_new_tokens": 40, "stop_strings": [stop]}, warmup=0)
    assert result["runs"][0]["new_tokens"] == text.index(stop) + 1
    assert result["summary"]["falcon"]["identical"] == 3


def test_a_later_turn_stands_behind_plains_answer(
    runner: Runner, chat_target: Any, chat_tokenizer: Any, question_file: Path
) -> None:
    """A method whose text is wrong is asked the second question behind plain's answer, as plain is."""
    wrong = WrongAtFive("wrong", MethodContext(chat_target), {})
    result = runner(GREEDY, extra=(wrong,), turns=None)
    assert result["settings"]["questions"]["turns"] == 2
    assert [(entry["turn"], entry["method"]) for entry in result["runs"][:6]] == [
        (0, "plain"), (0, "falcon"), (0, "wrong"), (1, "falcon"), (1, "wrong"), (1, "plain"),
    ]  # fmt: skip
    assert len(result["runs"]) == 3 * 2 * 3
    question = read_questions(question_file)[0]
    plain = build_method("plain", MethodContext(chat_target))
    first = plain.generate(prompt_ids(chat_tokenizer, question), {"do_sample": False, **GREEDY}).tokens
    answer = chat_tokenizer.decode(first, skip_special_tokens=True).strip()
    second = prompt_ids(chat_tokenizer, question, [answer])
    assert {entry["prompt_tokens"] for entry in result["runs"][3:6]} == {second.shape[1]}
    asked = plain.generate(second, {"do_sample": False, **GREEDY}).tokens
    by_method = {entry["method"]: entry for entry in result["runs"][3:6]}
    assert by_method["plain"]["text"] == chat_tokenizer.decode(asked, skip_special_tokens=True)
    assert by_method["falcon"]["identical"]
    assert by_method["wrong"]["first_difference"] == 5  # and not before: its prompt is plain's
    assert result["summary"]["wrong"]["compared"] == 6
    assert result["summary"]["falcon"]["identical"] == 6


def test_texts_are_kept_where_they_differ(runner: Runner, chat_target: Any) -> None:
    result = runner(GREEDY, extra=(WrongAtFive("wrong", MethodContext(chat_target), {}),))
    assert {entry["method"] for entry in result["runs"] if "text" in entry} == {"plain", "wrong"}


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batches(runner: Runner, options: dict[str, Any]) -> None:
    together = runner(options, batch_size=2, turns=None)
    assert [entry["batch"] for entry in together["runs"]] == [[81, 82]] * 8 + [[83]] * 4
    assert together["settings"]["batch_size"] == 2
    falcon = together["summary"]["falcon"]
    assert (falcon["identical"], falcon["compared"]) == (6, 6)
    assert falcon["speed_ratio"]["count"] == 2  # one a batch
    assert falcon["tau_with_bonus"] == pytest.approx(falcon["tau"] + 1)
    assert together["summary"]["plain"]["rounds"] == 11 * 4  # eleven forwards a call behind the prefill, four calls
    assert together["summary"]["plain"]["tau_with_bonus"] == 1.0
    assert falcon["tau_by_row"]["count"] == 6
    assert "tau of a batch's rows" in render([together])
    assert all(entry["peak_bytes"] is None or entry["peak_bytes"] > 0 for entry in together["runs"])


class Uncompilable(Method):
    name = "uncompilable"
    may_fail = True

    def arguments(self) -> dict[str, Any]:
        raise RuntimeError("no compiler\nlong trace")


def test_a_method_that_may_fail_is_kept_as_a_finding(runner: Runner, chat_target: Any) -> None:
    failing = Uncompilable("fast", MethodContext(chat_target), {})
    result = runner(GREEDY, extra=(failing,), warmup=0)
    assert result["failed"] == {"fast": "no compiler"}
    assert list(result["summary"]) == ["plain", "falcon"]
    assert result["complete"]
    assert "fast" in result["settings"]["methods"]


def test_a_run_whose_methods_changed_does_not_go_on(runner: Runner, chat_target: Any) -> None:
    """Or a method that answered half of the questions would be held against plain's time for all."""
    failing = Uncompilable("fast", MethodContext(chat_target), {})
    calls: list[str] = []

    def fault(count: int) -> BaseException | None:
        return KeyboardInterrupt() if count == 6 else None  # in the second question

    with pytest.raises(KeyboardInterrupt):
        runner(GREEDY, extra=(failing,), wrap=recording(calls, fault))

    class Repaired(Uncompilable):
        def arguments(self) -> dict[str, Any]:
            return {}

    with pytest.raises(BenchError, match=r"cannot go on: fast ran in only some of its sessions"):
        runner(GREEDY, extra=(Repaired("fast", MethodContext(chat_target), {}),))
    assert runner(GREEDY, extra=(failing,))["complete"]  # the control


def test_what_makes_graphs_is_warmed_up_for_each_number_of_rows(runner: Runner, chat_target: Any) -> None:
    """Three questions in batches of two: the last has one row, which is another graph."""
    rows: list[int] = []

    class Compiled(Method):
        name = "compiled"
        may_fail = True

        def arguments(self) -> dict[str, Any]:
            return {}

        def generate(self, ids: Any, options: dict[str, Any]) -> MethodResult:
            rows.append(len(ids))
            return super().generate(ids, options)

    runner(GREEDY, extra=(Compiled("compiled", MethodContext(chat_target), {}),), batch_size=2)
    assert rows == [2, 1, 2, 1]


def test_a_method_that_must_not_fail_ends_the_run(runner: Runner, chat_target: Any) -> None:
    class Broken(Uncompilable):
        may_fail = False

    with pytest.raises(RuntimeError, match="no compiler"):
        runner(GREEDY, extra=(Broken("broken", MethodContext(chat_target), {}),))


def test_no_method_runs(runner: Runner, chat_target: Any) -> None:
    with pytest.raises(BenchError, match="No method runs here: no compiler"):
        runner(GREEDY, labels=(), extra=(Uncompilable("fast", MethodContext(chat_target), {}),))


def test_methods_are_told_the_longest_text(runner: Runner, chat_target: Any) -> None:
    class Measured(Method):
        name = "measured"

        def prepare(self, longest: int) -> None:
            self.longest = longest

        def arguments(self) -> dict[str, Any]:
            return {}

    measured = Measured("measured", MethodContext(chat_target), {})
    result = runner(GREEDY, extra=(measured,), turns=None)
    assert measured.longest >= max(entry["prompt_tokens"] + entry["new_tokens"] for entry in result["runs"])


def test_sessions_say_what_was_typed_and_when(runner: Runner, tmp_path: Path) -> None:
    part = interrupted(runner, tmp_path)
    whole = runner(GREEDY)
    assert len(part["sessions"]) == 1
    assert len(whole["sessions"]) == 2
    assert all(one["command"] and one["date"] for one in whole["sessions"])


def test_a_damaged_result_is_named(runner: Runner, tmp_path: Path) -> None:
    interrupted(runner, tmp_path)
    path = tmp_path / "result.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(BenchError, match="or is damaged: it is not JSON"):
        runner(GREEDY)
    content = json.loads(text)
    del content["runs"][2]["seconds"]
    path.write_text(json.dumps(content))
    with pytest.raises(BenchError, match="entry 2 of its runs is not one"):
        runner(GREEDY)


def test_another_law_of_drawing_is_compared_in_greedy_runs_only(runner: Runner) -> None:
    sampled = runner(SAMPLED, labels=("plain", "prompt_lookup", "falcon"))
    assert sampled["summary"]["prompt_lookup"]["compared"] == 0
    assert sampled["summary"]["falcon"]["compared"] == 3


def test_another_law_of_drawing_is_compared_when_greedy(runner: Runner) -> None:
    assert runner(GREEDY, labels=("plain", "prompt_lookup"))["summary"]["prompt_lookup"]["identical"] == 3
