"""Files written in one step: a reader, or the next run after a kill or on a full disk, sees the old one or the new."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path | str, text: str) -> None:
    """Write UTF-8 ``text`` to a file, whose folder is made if need be.

    Raises:
        OSError: if it cannot be written; what was there is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(scratch, 0o644)  # mkstemp's own is private
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
