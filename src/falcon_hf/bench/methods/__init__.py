"""The methods bench knows. To add one, add a file with a [`Method`] named ``METHOD`` to this folder."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass

from ..errors import BenchError
from .base import Method, MethodContext, MethodResult

_FOUND: list[type[Method]] = [
    importlib.import_module(f"{__name__}.{module.name}").METHOD
    for module in pkgutil.iter_modules(__path__)
    if module.name not in ("base", "compiling")  # what methods share
]
METHODS: dict[str, type[Method]] = {method.name: method for method in _FOUND}
"""Methods by name."""

BASELINE = "plain"
"""What speed ratios and agreement refer to."""

_LABEL = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class MethodSpec:
    """A method as asked for, checked.

    Attributes:
        label: its name in results: the one given, else the whole of what was typed.
        method: its class.
        settings: as typed.
    """

    label: str
    method: type[Method]
    settings: dict[str, str]


def parse_method(spec: str) -> MethodSpec:
    """``name:setting=value:...``, or ``label=name:...`` to give it a name of its own in results.

    A value may have colons, as a path on Windows has: only where ``name=`` follows does the next setting begin.

    Raises:
        BenchError: on an unknown name or setting, or a label that a table could not show.
    """
    head, *parts = _split(spec, ":")
    given, equals, name = head.rpartition("=")
    if equals and not _LABEL.fullmatch(given):
        raise BenchError(f"A label is letters, digits, '-', '_' and '.', got {given!r}.")
    if name not in METHODS:
        raise BenchError(f"Unknown method {name!r}; known: {', '.join(sorted(METHODS))}.")
    method = METHODS[name]
    settings: dict[str, str] = {}
    if equals and (name == BASELINE) != (given == BASELINE):
        raise BenchError(f"{BASELINE!r} is the label of the baseline, and of nothing else: {spec!r}.")
    last = ""
    for part in parts:
        setting, equals_sign, value = part.partition("=")
        if last and not (equals_sign and setting.isidentifier()):
            settings[last] += f":{part}"
            continue
        if not method.takes(setting) or not equals_sign:
            known = ", ".join(f"{key}=..." for key in method.settings) or "none"
            raise BenchError(f"The method {name} has no setting {part!r}; it has: {known}.")
        settings[setting] = value
        last = setting
    return MethodSpec(given if equals else spec, method, settings)


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators, but for those inside the brackets of a JSON value."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_methods(specs: str) -> list[MethodSpec]:
    """A comma-separated list of methods, checked: known ones, no label twice.

    Raises:
        BenchError: on an empty list, an unknown name or setting, or a label given twice.
    """
    parsed = [parse_method(spec.strip()) for spec in _split(specs, ",") if spec.strip()]
    if not parsed:
        raise BenchError(f"Name at least one method: {', '.join(sorted(METHODS))}.")
    labels = [spec.label for spec in parsed]
    for label in labels:
        if labels.count(label) > 1:
            raise BenchError(f"The method {label} is given twice; tell them apart with LABEL=METHOD.")
    return parsed


def build_method(spec: str | MethodSpec, context: MethodContext) -> Method:
    """The method ready to generate.

    Raises:
        BenchError: on an unknown name or setting, an impossible value, or a drafter that cannot be read.
    """
    parsed = parse_method(spec) if isinstance(spec, str) else spec
    return parsed.method(parsed.label, context, parsed.settings)


__all__ = [
    "BASELINE",
    "METHODS",
    "Method",
    "MethodContext",
    "MethodResult",
    "MethodSpec",
    "build_method",
    "parse_method",
    "parse_methods",
]
