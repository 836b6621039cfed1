"""Text that arrives piece by piece, broken into lines at spaces, as a terminal would not."""

from __future__ import annotations

import re
from typing import IO

from rich.cells import cell_len

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


class WordWrapper:
    """Writes words as soon as they are whole, a new line where the next would not fit.

    Args:
        file: where to.
        width: cells of a line.
    """

    def __init__(self, file: IO[str], width: int) -> None:
        self._file = file
        self._width = width
        self._column = 0
        self._space = ""  # before the next word
        self._held = ""  # the last word, which may go on

    def write(self, text: str) -> None:
        """Take the next piece of text."""
        *parts, last = _PARTS.findall(self._held + text) or [""]
        whole = not last or last.isspace()
        self._held = "" if whole else last
        for part in [*parts, last] if whole else parts:
            self._put(part)
        self._file.flush()

    def end(self) -> None:
        """Write what is held, and end the line."""
        self._put(self._held)
        self._file.write("\n")
        self._file.flush()
        self._column, self._space, self._held = 0, "", ""

    def _put(self, part: str) -> None:
        if part == "\n":
            self._file.write("\n")
            self._column, self._space = 0, ""
        elif part.isspace():
            self._space += part
        elif part:
            if self._column and self._column + cell_len(self._space + part) > self._width:
                self._file.write("\n")
                self._column, self._space = 0, ""
            self._file.write(self._space + part)
            self._column += cell_len(self._space + part)
            self._space = ""
