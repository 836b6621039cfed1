"""``falcon-hf generate`` as a user types it, on a tiny chat model on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from typer.testing import Result

from falcon_hf import FalconDrafter
from falcon_hf.cli.answer import answer, encode
from falcon_hf.cli.generate import _read_prompt, _sampling
from falcon_hf.cli.loading import find_repo, load_drafter, load_target

from ..bench.tiny import VOCABULARY, byte_tokenizer
from .conftest import Run, assert_refused

PROMPT = "Why is the sky blue?"
Generate = Callable[..., Result]


@pytest.fixture
def generate(repos: Path, run: Run) -> Generate:
    """``generate(..., target="target", drafter="drafter")``: the command on the tiny pair, 24 tokens of float32."""

    def start(*arguments: Any, target: Any = "target", drafter: Any = "drafter", stdin: str = "") -> Result:
        source = () if drafter is None else ("--drafter", repos / drafter)
        fixed = ("--target", repos / target, *source, "--max-new-tokens", 24, "--dtype", "float32")
        return run("generate", *fixed, *arguments, stdin=stdin)

    return start


def as_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_text_goes_to_stdout_and_statistics_to_stderr(generate: Generate) -> None:
    result = generate(PROMPT)
    assert result.exit_code == 0
    text = as_json(generate(PROMPT, "--json"))["text"]
    assert result.stdout == text + "\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith("24 tokens in ")
    assert "tau" in line
    assert "alpha" in line


def test_quiet_leaves_the_statistics_out(generate: Generate) -> None:
    loud, silent = generate(PROMPT), generate(PROMPT, "--quiet")
    assert loud.stderr
    assert silent.stderr == ""
    assert silent.stdout == loud.stdout


def test_greedy_by_default_with_and_without_the_drafter(generate: Generate) -> None:
    # The target's own generation config samples at temperature 5: it must not decide.
    falcon, plain = as_json(generate(PROMPT, "--json")), as_json(generate(PROMPT, "--json", "--plain", drafter=None))
    assert falcon["text"] == plain["text"] == as_json(generate(PROMPT, "--json"))["text"]
    assert plain["statistics"] is None
    assert plain["drafter"] is None


def test_json_is_one_object_with_text_counts_and_statistics(generate: Generate, repos: Path) -> None:
    result = generate(PROMPT, "--json", "--seed", 3)
    found = as_json(result)
    assert result.stderr == ""
    assert found["new_tokens"] == 24
    assert found["prompt_tokens"] == len(f"<user>{PROMPT}\n<assistant>")  # a token a byte
    assert (found["target"], found["drafter"]) == (str(repos / "target"), str(repos / "drafter"))
    assert (found["dtype"], found["device"], found["seed"]) == ("float32", "cpu", 3)
    statistics = found["statistics"]
    assert statistics["new_tokens"] == 24
    assert statistics["accepted"] + statistics["rounds"] == 23  # the prefill gave the first
    assert statistics["tau"] == statistics["accepted"] / statistics["rounds"]


@pytest.mark.parametrize(
    "sampling",
    [
        ("--temperature", 0.9, "--top-p", 0.95),
        ("--top-k", 8),
        ("--min-p", 0.02, "--temperature", 1.5),
        ("--temperature", 0.9, "--repetition-penalty", 1.2),
    ],
)
def test_sampled_text_is_plain_text_seed_for_seed(generate: Generate, sampling: tuple[Any, ...]) -> None:
    arguments = (PROMPT, "--json", *sampling, "--seed")
    texts = {seed: as_json(generate(*arguments, seed))["text"] for seed in (1, 2)}
    assert texts == {seed: as_json(generate(*arguments, seed, "--plain"))["text"] for seed in (1, 2)}
    assert texts[1] != texts[2]


def test_sampling_options_decide(generate: Generate) -> None:
    greedy = as_json(generate(PROMPT, "--json"))["text"]
    assert as_json(generate(PROMPT, "--json", "--top-k", 1, "--seed", 1))["text"] == greedy
    assert as_json(generate(PROMPT, "--json", "--temperature", 0))["text"] == greedy
    # Without --top-k all tokens can be drawn, not the 40 of the target's config: at this temperature nearly evenly.
    drawn = as_json(generate(PROMPT, "--json", "--temperature", 500, "--seed", 1, "--max-new-tokens", 200))["text"]
    assert len(set(byte_tokenizer()(drawn).input_ids)) > 60
    penalised = as_json(generate(PROMPT, "--json", "--repetition-penalty", 3))["text"]
    assert penalised != greedy


@pytest.mark.parametrize(
    "own", [{"min_p": 0.9}, {"top_h": 0.1}, {"typical_p": 0.1}, {"epsilon_cutoff": 0.5}, {"eta_cutoff": 0.5}]
)
def test_limits_of_the_targets_own_do_not_decide(
    generate: Generate, repos: Path, tmp_path: Path, own: dict[str, float]
) -> None:
    shutil.copytree(repos / "target", tmp_path / "limited")
    GenerationConfig(do_sample=True, **own).save_pretrained(tmp_path / "limited")
    for sampling in ((), ("--temperature", 5, "--seed", 1)):
        limited, free = (
            as_json(generate(PROMPT, "--json", *sampling, target=target)) for target in (tmp_path / "limited", "target")
        )
        assert limited["text"] == free["text"]


@pytest.mark.parametrize("options", [(None, {}), (0, {}), (0.7, {}), (None, {"top_k": 8}), (2, {"min_p": 0.1})])
def test_transformers_takes_all_sampling_options(options: Any) -> None:
    temperature, limits = options
    GenerationConfig(**_sampling(temperature, **limits)).validate(strict=True)  # its warnings are errors then


def test_prompt_from_argument_file_and_standard_input(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    wanted = generate(PROMPT).stdout
    assert generate("--file", tmp_path / "prompt.txt").stdout == wanted
    assert generate("-", stdin=PROMPT).stdout == wanted
    assert generate(stdin=PROMPT).stdout == wanted
    assert generate("Another prompt.").stdout != wanted


def test_chat_template_and_system_message(generate: Generate) -> None:
    def tokens(*arguments: Any, **options: Any) -> int:
        return as_json(generate(PROMPT, "--json", *arguments, **options))["prompt_tokens"]

    assert tokens() == len(f"<user>{PROMPT}\n<assistant>")
    assert tokens("--system", "Be brief.") == len(f"<system>Be brief.\n<user>{PROMPT}\n<assistant>")
    assert tokens("--no-chat-template") == len(PROMPT)
    assert tokens(target="bare-target") == len(PROMPT)
    assert_refused(generate(PROMPT, "--system", "Be brief.", target="bare-target"), "--system", "template")
    assert_refused(generate(PROMPT, "--system", "Be brief.", "--no-chat-template"), "--system", "template")


def test_a_chat_template_that_refuses_is_one_line(generate: Generate, repos: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('System role not supported.') }}")
    shutil.copytree(repos / "target", tmp_path / "refusing")
    tokenizer.save_pretrained(tmp_path / "refusing")
    refusing = tmp_path / "refusing"
    assert_refused(generate(PROMPT, target=refusing), "System role not supported", "--no-chat-template")
    assert generate(PROMPT, "--no-chat-template", target=refusing).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((" \n",), ("The prompt is empty.",)),
        ((PROMPT, "--file", "prompt.txt"), ("--file", "not both")),
        (("--file", "absent.txt"), ("absent.txt", "No such file")),
        (("--file", "binary.txt"), ("binary.txt", "utf-8")),
        ((PROMPT, "--dtype", "int8"), ("--dtype", "float32, bfloat16, float16", "int8")),
        ((PROMPT, "--device", "toaster"), ("--device", "toaster")),
        ((PROMPT, "--temperature", 0, "--top-p", 0.9), ("--temperature 0", "--top-p")),
        ((PROMPT, "--repetition-penalty", -1), ("penalty", "-1")),
    ],
)
def test_bad_arguments_are_one_line(
    generate: Generate, arguments: tuple[Any, ...], words: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary.txt").write_bytes(b"\xff\xfe\xfd")
    assert_refused(generate(*arguments), *words)


@pytest.mark.parametrize(
    "option", [("--top-p", 1.5), ("--top-k", 0), ("--min-p", -1), ("--max-new-tokens", 0), ("--temperature", "warm")]
)
def test_values_out_of_range_are_usage_errors(generate: Generate, option: tuple[Any, ...]) -> None:
    result = generate(PROMPT, *option)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"Error: Invalid value for '{option[0]}'")


def test_no_prompt_at_a_terminal_does_not_wait(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # CliRunner brings a standard input of its own, so the reader is asked directly.
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(typer.Exit) as error:
        _read_prompt(None, None)
    assert error.value.exit_code == 2
    assert "--file" in capsys.readouterr().err


def test_neither_drafter_nor_plain_is_refused(generate: Generate) -> None:
    assert_refused(generate(PROMPT, drafter=None), "--drafter", "--plain")


@pytest.mark.usefixtures("no_hub")
def test_missing_repos_are_one_line(generate: Generate) -> None:
    assert_refused(generate(PROMPT, target="nothing-here"), "no target", "nothing-here")
    assert_refused(generate(PROMPT, drafter="nothing-here"), "no drafter", "nothing-here")


@pytest.mark.usefixtures("no_hub")
def test_a_repo_the_hub_does_not_give_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {"org/cached": str(tmp_path / "snapshot" / "config.json")}
    monkeypatch.setattr("falcon_hf.cli.loading.try_to_load_from_cache", lambda name, _: cached.get(name))
    assert find_repo("org/cached") == str(tmp_path / "snapshot")
    assert find_repo("org/absent") is None


@pytest.mark.usefixtures("no_hub")
def test_a_target_from_the_cache_keeps_its_name(repos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafters, cards and results name it: no path of this machine's."""
    cached = str(repos / "target" / "config.json")
    monkeypatch.setattr("falcon_hf.cli.loading.try_to_load_from_cache", lambda name, _: cached)
    assert load_target("org/cached")[0].config._name_or_path == "org/cached"
    assert load_target(str(repos / "target"))[0].config._name_or_path == str(repos / "target")


def test_a_folder_without_a_model_is_one_line(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(generate(PROMPT, target=tmp_path / "empty"), "Cannot load the target", "empty")
    assert_refused(generate(PROMPT, drafter=tmp_path / "empty"), "not a Falcon drafter", "no config.json", "empty")


def test_a_model_that_is_no_drafter_is_refused(generate: Generate) -> None:
    assert_refused(generate(PROMPT, drafter="target"), "not a Falcon drafter", "'llama'")


@pytest.mark.parametrize(
    ("shape", "words"),
    [({"vocab_size": VOCABULARY + 8}, ("vocabulary", "264")), ({"hidden_size": 32}, ("width 32", "64"))],
)
def test_another_targets_drafter_is_refused_before_any_token(
    generate: Generate, tmp_path: Path, tiny_target: Any, tiny_drafter: Any, shape: Any, words: tuple[str, ...]
) -> None:
    tiny_drafter(tiny_target(**{"vocab_size": VOCABULARY, **shape})).save_pretrained(tmp_path / "drafter")
    assert_refused(generate(PROMPT, drafter=tmp_path / "drafter"), *words)


@pytest.mark.filterwarnings("always::falcon_hf.TargetMismatchWarning")
def test_a_drafter_with_another_fingerprint_is_a_warning(
    generate: Generate, tmp_path: Path, tiny_target: Any, tiny_drafter: Any
) -> None:
    tiny_drafter(tiny_target(vocab_size=VOCABULARY, seed=7)).save_pretrained(tmp_path / "drafter")
    result = generate(PROMPT, "--quiet", drafter=tmp_path / "drafter")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: The drafter was trained for another target")
    assert result.stdout == generate(PROMPT).stdout


@pytest.mark.parametrize("damage", ["absent", "corrupt", "incomplete"])
def test_a_broken_weight_file_is_one_line(generate: Generate, repos: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "drafter"
    shutil.copytree(repos / "drafter", folder)
    weights = folder / "model.safetensors"
    if damage == "absent":
        weights.unlink()
    elif damage == "corrupt":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        tensors = load_file(weights)
        del tensors["layers.0.mlp.down_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    assert_refused(
        generate(PROMPT, drafter=folder), "drafter", "incomplete" if damage == "incomplete" else "cannot be loaded"
    )


def test_remote_code_runs_only_when_trusted(repos: Path) -> None:
    target, _ = load_target(str(repos / "target"))
    assert type(load_drafter(str(repos / "drafter"), target)) is FalconDrafter
    trusted = load_drafter(str(repos / "drafter"), target, trust_remote_code=True)
    assert type(trusted).__module__.startswith("transformers_modules.")


def test_showing_text_is_left_out_of_the_times(repos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that only showing text moves: whatever else generate() does takes no time.
    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("falcon_hf.cli.answer.time", clock)
    monkeypatch.setattr("falcon_hf.runtime.statistics.time", clock)
    shown = []

    def write(text: str) -> None:
        nonlocal now
        now += 10.0
        shown.append(text)

    target, tokenizer = load_target(str(repos / "target"))
    inputs = encode(tokenizer, PROMPT)
    for drafter in (None, load_drafter(str(repos / "drafter"), target)):
        shown.clear()
        result = answer(target, tokenizer, inputs, drafter, write, max_new_tokens=12, do_sample=False)
        assert "".join(shown) == result.text
        assert len(shown) > 1
        assert result.seconds == 0.0
    assert result.statistics is not None
    assert result.statistics.total_seconds == 0.0


def test_generate_trace(run: Run, repos: Path) -> None:
    given = ("generate", "--target", repos / "target", "--drafter", repos / "drafter", "--max-new-tokens", 8, "Hello")
    result = run(*given, "--trace")
    assert result.exit_code == 0, result.output
    assert "accepted draft, rejected draft, the target's own token" in result.stdout
    assert_refused(run(*given, "--trace", "--json"), "--trace")
