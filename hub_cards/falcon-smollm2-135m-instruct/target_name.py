"""What a drafter's config calls its target."""

from __future__ import annotations

from pathlib import Path


def target_name(given: str | None) -> str | None:
    """The name that a target was loaded by, as a drafter notes it; None for none.

    A folder that was given relative to the current one is noted as ``./models/llama``: without the dot it would pass
    for a Hub repo, and the drafter's card would say that this is the base model.
    """
    if not given:
        return None
    path = Path(given)
    if given.startswith(".") or path.is_absolute() or not path.is_dir():
        return given
    return f"./{path.as_posix()}"
