"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from falcon_hf.whole_files import write_whole


def test_a_new_file_and_its_folder(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b.json", "é\n")
    assert (tmp_path / "a" / "b.json").read_text(encoding="utf-8") == "é\n"
    assert (tmp_path / "a" / "b.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("broken", ["write_text", "replace"], ids=["while writing", "when it is put in place"])
def test_on_a_full_disk_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    write_whole(tmp_path / "a", "old")

    def full(*given: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, broken, full)
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    ours = ".falcon-hf-part"
    for name, age in (
        (f".a.killed{ours}", 4000),
        (f".a.at-work{ours}", 10),
        (f".b.killed{ours}", 4000),
        (".a.swp", 4000),
    ):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_whole(tmp_path / "a", "new")
    left = [f".a.at-work{ours}", ".a.swp", f".b.killed{ours}", "a"]  # an editor's file is none of ours
    assert sorted(path.name for path in tmp_path.iterdir()) == left
