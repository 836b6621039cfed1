"""A result's JSON file: written whole after each question, so that a killed run goes on where it was.

``{"format": 2, "complete", "date", "finished", "sessions", "settings", "failed", "summary", "runs"}``. ``settings`` is
everything that must be equal for a run to go on (see ``provenance.py``); ``runs`` has one entry per question, turn,
seed, repeat and method; ``failed`` says why a method of ``settings`` has none. Format 1, which had one turn and no
batches, can be read, not gone on with.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..whole_files import write_whole
from .errors import BenchError
from .summary import summarise

FORMAT = 2
_READABLE = (1, 2)
_RUN_FIELDS = {
    "question_id",
    "category",
    "seed",
    "repeat",
    "method",
    "seconds",
    "new_tokens",
    "identical",
    "statistics",
}
_FIELDS = {"format", "complete", "date", "finished", "settings", "summary", "runs"}


class ResultFile:
    """The result of one run, in memory and on disk.

    Attributes:
        content: what the file holds.
    """

    def __init__(self, path: Path, settings: dict[str, Any], session: dict[str, Any]) -> None:
        """Start a result, or go on with the one at ``path`` if its settings are the same.

        Raises:
            BenchError: if ``path`` holds something else, or a result of other settings (the message names the first).
        """
        self.path = path
        # As it will be read back: tuples become lists, and so on.
        settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "complete": False,
            "date": _now(),
            "finished": None,
            "sessions": [],
            "settings": settings,
            "failed": {},
            "summary": {},
            "runs": [],
        }
        if path.exists():
            self.content = read_result(path)
            difference = first_setting_that_differs(self.content["settings"], settings)
            if difference:
                raise BenchError(
                    f"{path} holds a run with other settings ({difference}); choose another --output, or delete it."
                )
        if not self.content["complete"]:
            self.content["sessions"].append(session)

    @property
    def done(self) -> set[tuple[int | str, int, int]]:
        """(question_id, seed, repeat) of the finished questions."""
        return {(entry["question_id"], entry["seed"], entry["repeat"]) for entry in self.content["runs"]}

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Keep one question's entries, one a method, and write the file."""
        self.content["runs"].extend(entries)
        self.write()

    def finish(self) -> None:
        """Mark the result complete and write the file."""
        self.content["complete"] = True
        self.content["finished"] = _now()
        self.write()

    def write(self) -> None:
        """Write the file in one step: a reader, or the next run after a kill, sees the old or the new one, whole.

        Raises:
            BenchError: if the folder cannot be written to.
        """
        self.content["summary"] = summarise(self.content["runs"], list(self.content["settings"]["methods"]))
        text = json.dumps(self.content, indent=1, allow_nan=False)
        try:
            write_whole(self.path, text + "\n")
        except OSError as error:
            raise BenchError(f"The result file {self.path} cannot be written: {error.strerror}.") from error


def read_result(path: Path | str) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        BenchError: if it cannot be read or is not a result of this format.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"The result file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BenchError(
            f"{path} is not a result of falcon-hf bench, or is damaged: it is not JSON. "
            "Choose another file, or delete it."
        ) from error
    if not isinstance(content, dict) or not content.keys() >= _FIELDS:
        raise BenchError(f"{path} is not a result of falcon-hf bench.")
    if content["format"] not in _READABLE:
        raise BenchError(f"{path} has result format {content['format']!r}; this version reads {FORMAT}: run it again.")
    for number, entry in enumerate(content["runs"] if isinstance(content["runs"], list) else [None]):
        if not isinstance(entry, dict) or not entry.keys() >= _RUN_FIELDS:
            raise BenchError(f"{path} is damaged: entry {number} of its runs is not one. Delete it and run again.")
    return content


def first_setting_that_differs(old: Any, new: Any, name: str = "") -> str | None:
    """``"options.max_new_tokens: 64 there, 128 here"`` for the first difference of two settings; None if equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            difference = first_setting_that_differs(old.get(key), new.get(key), inner)
            if difference:
                return difference
        return None
    return None if old == new else f"{name}: {_short(old)} there, {_short(new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
