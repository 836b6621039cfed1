"""The methods bench knows. To add one, add a file with a [`Method`] named ``METHOD`` to this folder."""

from __future__ import annotations

import importlib
import pkgutil

from ..errors import BenchError
from .base import Method, MethodContext, MethodResult

_FOUND: list[type[Method]] = [
    importlib.import_module(f"{__name__}.{module.name}").METHOD
    for module in pkgutil.iter_modules(__path__)
    if module.name != "base"
]
METHODS: dict[str, type[Method]] = {method.name: method for method in _FOUND}
"""Methods by name."""

BASELINE = "plain"
"""What speed ratios and agreement refer to."""


def parse_method(spec: str) -> tuple[type[Method], dict[str, str]]:
    """``name:setting=value:...`` to the method's class and its settings.

    Raises:
        BenchError: on an unknown name or setting.
    """
    name, *parts = spec.split(":")
    if name not in METHODS:
        raise BenchError(f"Unknown method {name!r}; known: {', '.join(sorted(METHODS))}.")
    method, settings = METHODS[name], {}
    for part in parts:
        setting, equals, value = part.partition("=")
        if setting not in method.settings or not equals:
            known = ", ".join(f"{key}=..." for key in method.settings) or "none"
            raise BenchError(f"The method {name} has no setting {part!r}; it has: {known}.")
        settings[setting] = value
    return method, settings


def parse_methods(specs: str) -> list[str]:
    """A comma-separated list of methods, checked: known ones, none twice.

    Raises:
        BenchError: on an empty list, an unknown name or setting, or a method given twice.
    """
    labels = [spec.strip() for spec in specs.split(",") if spec.strip()]
    if not labels:
        raise BenchError(f"Name at least one method: {', '.join(sorted(METHODS))}.")
    for label in labels:
        parse_method(label)
        if labels.count(label) > 1:
            raise BenchError(f"The method {label} is given twice.")
    return labels


def build_method(label: str, context: MethodContext) -> Method:
    """The method of that label, ready to generate.

    Raises:
        BenchError: on an unknown name or setting, an impossible value, or a drafter that cannot be read.
    """
    method, settings = parse_method(label)
    return method(label, context, settings)


__all__ = [
    "BASELINE",
    "METHODS",
    "Method",
    "MethodContext",
    "MethodResult",
    "build_method",
    "parse_method",
    "parse_methods",
]
