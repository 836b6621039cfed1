"""``falcon-hf convert`` and ``falcon-hf publish``: from a stranger's checkpoint to a repo on the Hub."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
from typer.testing import CliRunner

from falcon_hf import FalconDrafter
from falcon_hf.cli import app
from falcon_hf.hub.cards import MARK

from .hub_server import HubServer
from .isolated import run_isolated
from .upstream import settings, weights, write

VOCAB = 24


def command(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def one_line(result, words):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert result.stdout == ""


@pytest.fixture
def drafter(tiny_target, tiny_drafter, tmp_path):
    """A saved drafter."""
    drafter = tiny_drafter(tiny_target(VOCAB), 2, fusion_layers=1)
    drafter.config.target_name_or_path = "some-org/some-target"
    drafter.save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


class TestConvert:
    def test_a_folder(self, tmp_path):
        theirs = write(tmp_path / "theirs", settings(3), weights("lstm", trained=False))
        result = command("convert", theirs, tmp_path / "ours", "--target", "Some-Org/Some-7B", "--dtype", "bfloat16")
        assert result.exit_code == 0, result.output
        assert "Fusion: lstm_stateless, because the recurrent matrices are as torch draws them" in result.stderr
        assert "k = 3, lstm_stateless fusion" in result.stderr
        drafter = FalconDrafter.from_pretrained(tmp_path / "ours")
        assert drafter.config.target_name_or_path == "Some-Org/Some-7B"
        assert "base_model: Some-Org/Some-7B" in (tmp_path / "ours" / "README.md").read_text()
        one_line(command("convert", theirs, tmp_path / "ours", "--target", "a/b"), "is not an empty folder")
        forgotten = command("publish", tmp_path / "ours", "--create-pr", "--message", "x")
        one_line(forgotten, "--create-pr, --message: needs a REPO to upload to")

    def test_problems_are_one_line(self, tmp_path):
        theirs = write(tmp_path / "theirs", settings(2), weights("lstm"))
        out = tmp_path / "ours"
        one_line(command("convert", tmp_path / "theirs", out, "--target", "a/b", "--dtype", "int8"), "--dtype must be")
        result = command("convert", theirs, "/proc/drafter", "--target", "a/b")  # where nobody can write
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("error: Cannot write the drafter to /proc/drafter: ")
        (theirs / "pytorch_model.bin").write_bytes(pickle.dumps(sys.exit))
        one_line(command("convert", theirs, out, "--target", "a/b"), "Nothing of it was run")
        one_line(command("convert", tmp_path / "absent.", out, "--target", "a/b"), "neither a folder nor a Hub repo")
        assert not out.exists()


def without_code_classes(folder):
    settings = json.loads((folder / "config.json").read_text())
    del settings["auto_map"]
    (folder / "config.json").write_text(json.dumps(settings))


class TestPublish:
    def test_the_card(self, drafter):
        assert command("publish", drafter, "--check").exit_code == 1
        result = command("publish", drafter)
        assert (result.exit_code, result.stdout) == (0, "")
        assert MARK in (drafter / "README.md").read_text()
        assert command("publish", drafter, "--check").exit_code == 0
        (drafter / "recipe.json").write_text(json.dumps({"card": {"license": "mit"}}))
        assert command("publish", drafter, "--check").exit_code == 1
        assert "license: mit" not in (drafter / "README.md").read_text()
        assert command("publish", drafter).exit_code == 0
        assert "license: mit" in (drafter / "README.md").read_text()

    def test_a_card_written_by_hand_is_kept(self, drafter):
        (drafter / "README.md").write_text("# Mine\n")
        one_line(command("publish", drafter), "was written by hand")
        assert (drafter / "README.md").read_text() == "# Mine\n"
        assert command("publish", drafter, "--overwrite-card").exit_code == 0
        assert MARK in (drafter / "README.md").read_text()

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda folder: (folder / "tree.py").write_text("x = 1\n"), "not the code its weights were saved with"),
            (lambda folder: (folder / "custom_generate" / "generate.py").unlink(), "is no whole Hub repo"),
            (
                lambda folder: (folder / "custom_generate" / "generate.py").write_text("x = 1\n"),
                "generate.py is not the remote_generate.py that was saved with it",
            ),
            (lambda folder: (folder / "custom_generate" / "requirements.txt").unlink(), "lacks custom_generate/requi"),
            (lambda folder: (folder / "modeling_falcon_drafter.py").unlink(), "lacks modeling_falcon_drafter.py"),
            (without_code_classes, "auto_map in config.json names none"),
            (lambda folder: (folder / "README.md").write_bytes(b"\xff\xfe"), "README.md cannot be updated: not text"),
            (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
            (lambda folder: (folder / "recipe.json").write_text("{"), "recipe.json is not JSON"),
        ],
    )
    def test_what_is_not_ready_is_refused(self, drafter, damage, words):
        damage(drafter)
        one_line(command("publish", drafter), words)

    def test_other_problems(self, drafter, tmp_path):
        one_line(command("publish", tmp_path / "absent"), "There is no folder")
        one_line(command("publish", drafter, "a/b", "--check"), "leave the repo out")
        one_line(command("publish", drafter, "a/b/c"), "no name of a Hub repo")

    def test_upload(self, drafter, tmp_path):
        with HubServer() as hub:
            online = hub.environment | {"HF_HUB_OFFLINE": "0"}
            script = """
                import sys
                from typer.testing import CliRunner
                from falcon_hf.cli import app
                for arguments in (["--private"], ["--revision", "next"], ["--create-pr", "--message", "words"]):
                    result = CliRunner().invoke(app, ["publish", sys.argv[1], "some-org/a-drafter", *arguments])
                    assert result.exit_code == 0, result.output
                    print(result.stdout.strip())
                arguments = ["publish", sys.argv[1], "some-org/a-drafter"]
                result = CliRunner().invoke(app, arguments, env={"HF_TOKEN": "hf_bad"})
                print(result.exit_code, result.stderr.strip().splitlines()[-1])
                with open(f"{sys.argv[1]}/recipe.json", "w") as file:
                    file.write('{"card": {"license": "refused"}}')
                result = CliRunner().invoke(app, arguments)
                print(result.exit_code, result.stderr.strip().splitlines()[-1])
            """
            lines = run_isolated(script, tmp_path, drafter, block=False, **online).splitlines()
            repo = hub.repos["some-org/a-drafter"]
            assert set(repo.branches) == {"main", "next", "refs/pr/1"}
            assert lines[0].startswith(f"{hub.endpoint}/some-org/a-drafter/commit/")
            assert lines[2] == f"{hub.endpoint}/some-org/a-drafter/discussions/1"
            assert lines[3].startswith("2 error: The Hub refused the upload to 'some-org/a-drafter' (401): log in")
            assert lines[4].startswith("2 error: The Hub refused the card:")
            assert "license refused is unknown" in lines[4]
            assert lines[4].endswith("Correct recipe.json's entry 'card'.")
            files = repo.commits[repo.branches["main"]]
            for path in drafter.rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts and path.name not in ("README.md", "recipe.json"):
                    assert files[str(path.relative_to(drafter))] == path.read_bytes()
