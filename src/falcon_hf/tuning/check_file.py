"""A check's file: written after each prompt, so that a check that was cut off goes on where it was.

``{"format", "complete", "plan", "turns"}``, and once it is complete what [`compare`] says. ``plan`` is all that must be
equal to go on; ``turns`` has one entry a prompt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .calibration import read_json, write_json
from .check import Measurement, Turn
from .errors import TuningError

FORMAT = "falcon-hf-check/2"


class CheckFile:
    """One check, in memory and on disk.

    Attributes:
        turns: what has been measured.
        result: what the complete check says; None before.

    Raises:
        TuningError: if ``path`` holds something else, or a check of another plan.
    """

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        self.path = path
        self.plan = json.loads(json.dumps(plan))  # as it is read back
        self.turns: list[Turn] = []
        self.result: dict[str, Any] | None = None
        if not path.exists():
            return
        value = _read(path)
        if value["plan"] != self.plan:
            raise TuningError(f"{path} is a check of other settings; choose another file, or delete it.")
        self.turns = [_turn(path, entry) for entry in value["turns"]]
        self.result = value if value["complete"] else None

    def add(self, turn: Turn) -> None:
        """Keep a turn, and write the file.

        Raises:
            TuningError: if it cannot be written.
        """
        self.turns.append(turn)
        self._write(False, {})

    def finish(self, comparison: dict[str, Any]) -> dict[str, Any]:
        """Complete the check with what [`compare`] says, write the file and return its content.

        Raises:
            TuningError: if it cannot be written.
        """
        self.result = self._write(True, comparison)
        return self.result

    def _write(self, complete: bool, comparison: dict[str, Any]) -> dict[str, Any]:
        turns = [dataclasses.asdict(turn) for turn in self.turns]
        value = {"format": FORMAT, "complete": complete, "plan": self.plan, **comparison, "turns": turns}
        write_json(self.path, value)
        return value


def is_check(path: Path) -> bool:
    """Whether a file is a check's, complete or not; no other file is an error."""
    try:
        return bool(read_json(path).get("format") == FORMAT)
    except TuningError:
        return False


def read_check(path: Path) -> dict[str, Any]:
    """The content of a complete check's file.

    Raises:
        TuningError: if it is none.
    """
    value = _read(path)
    if not value["complete"]:
        raise TuningError(f"{path} is a check that was cut off: the same command goes on with it.")
    return value


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path)
    held = value.get("format") == FORMAT and value.keys() >= {"complete", "plan", "turns"}
    if not held or (value["complete"] and not isinstance(value.get("settings"), list)):
        raise TuningError(f"{path} is not a result of falcon-hf tune --check, or of an older one: choose another file.")
    return value


def _turn(path: Path, entry: Any) -> Turn:
    try:
        return Turn(entry["task"], tuple(Measurement(**call) for call in entry["calls"]))
    except (TypeError, KeyError) as error:
        raise TuningError(f"{path} is damaged: {entry!r} is no prompt's measurement.") from error
