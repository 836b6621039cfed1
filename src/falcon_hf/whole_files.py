"""Files written in one step: a reader, or the next run after a kill or on a full disk, sees the old one or the new."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_ABANDONED_SECONDS = 3600.0
_SUFFIX = ".falcon-hf-part"  # editors keep files of the same beginning


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A file to write to, of a name of its own, that is renamed to ``path`` at the end; the folder is made if need be.

    Raises:
        OSError: if that cannot be done; after any error what was there is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*{_SUFFIX}"):  # by a process that was killed, or by one that is at it
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)  # mkstemp's own is private
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_whole(path: Path | str, text: str) -> None:
    """Write UTF-8 ``text`` to a file; as [`whole_file`]."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
