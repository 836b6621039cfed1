"""The one error of a benchmark that is the user's to mend."""

from __future__ import annotations


class BenchError(ValueError):
    """Bad input to a benchmark or report; the message is one line and names the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
