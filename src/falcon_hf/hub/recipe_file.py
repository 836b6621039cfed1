"""``recipe.json`` in a drafter's folder, read, and checked: each entry that a card shows is of the kind it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import HubError

RECIPE = "recipe.json"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_texts(value: Any) -> bool:
    return _is_list(value, _is_text)


def _is_paragraph(value: Any) -> bool:
    return _is_text(value) or _is_texts(value)


# Words for a kind of value, and what is one.
_Kind = tuple[str, Callable[[Any], bool]]
_OBJECT: _Kind = ("a JSON object", _is_object)
_VALUES: _Kind = (
    "a JSON object of texts and numbers",
    lambda value: _is_object(value) and all(_is_text(each) or _is_number(each) for each in value.values()),
)
_OBJECTS: _Kind = ("a list of JSON objects", lambda value: _is_list(value, _is_object))
_TEXTS: _Kind = ("a list of texts", _is_texts)
_PARAGRAPHS: _Kind = ("a list of texts, or of lists of lines", lambda value: _is_list(value, _is_paragraph))
# What is not known may be null.
_TEXT: _Kind = ("a text", lambda value: value is None or _is_text(value))
_NUMBER: _Kind = ("a number", lambda value: value is None or _is_number(value))
_PARAGRAPH: _Kind = ("a text, or a list of texts", lambda value: value is None or _is_paragraph(value))
_MACHINE: _Kind = ("a JSON object, or a text", lambda value: _is_object(value) or _is_text(value))

_ENTRIES: dict[str, _Kind] = {
    "made_with": _VALUES,
    "target": _OBJECT,
    "target.dtype": _TEXT,
    "data": _OBJECT,
    "data.dialogues": _NUMBER,
    "data.learned_tokens": _NUMBER,
    "data.held_out_dialogues": _NUMBER,
    "data.sha256": _TEXT,
    "arguments": _OBJECT,
    "run": _OBJECT,
    "run.steps": _NUMBER,
    "run.positions_seen": _NUMBER,
    "run.seconds": _NUMBER,
    "curve": _OBJECTS,
    "machine": _MACHINE,
    "machine.cpu": _TEXT,
    "machine.cpu_capability": _TEXT,
    "machine.device": _TEXT,
    "card": _OBJECT,
    "card.license": _PARAGRAPH,
    "card.language": _PARAGRAPH,
    "card.datasets": _PARAGRAPH,
    "card.training": _PARAGRAPHS,
    "card.limits": _PARAGRAPHS,
    "card.impact": _PARAGRAPH,
    "card.results": _TEXTS,
}
"""Kinds by name, an object's before its entries'."""


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe in a drafter's folder; empty if there is none.

    Raises:
        HubError: if it is no JSON object, or an entry that the card shows is of another kind.
    """
    path = folder / RECIPE
    if not path.is_file():
        return {}
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{path} is not JSON: {error}.") from error
    if not isinstance(recipe, dict):
        raise HubError(f"{path} is not a recipe: it must be a JSON object.")
    for name, (kind, fits) in _ENTRIES.items():
        outer, _, inner = name.rpartition(".")
        holder = recipe.get(outer, {}) if outer else recipe
        if _is_object(holder) and inner in holder and not fits(holder[inner]):
            raise HubError(f"{path}: its entry {name!r} must be {kind}, got {holder[inner]!r:.60}.")
    return recipe
