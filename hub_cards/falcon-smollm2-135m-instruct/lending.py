"""Attributes that other objects get for a while, and lose again whatever interrupts the setting or the taking back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def lend(name: str, loans: Sequence[tuple[Any, Any]]) -> None:
    """Set the attribute ``name`` of each owner, given with its value; of all of them, or of none if interrupted."""
    try:
        for owner, value in loans:
            vars(owner)[name] = value  # not by setattr, with which a module looks for parameters first
    except BaseException:  # nobody calls an __exit__ then
        take_back(name, loans)
        raise


def take_back(name: str, loans: Sequence[tuple[Any, Any]]) -> None:
    """Remove what [`lend`] set; another thread's call may have done so before."""
    try:
        _remove(name, loans)
    except BaseException:  # an interrupt
        _remove(name, loans)
        raise


def _remove(name: str, loans: Sequence[tuple[Any, Any]]) -> None:
    for owner, _ in loans:
        vars(owner).pop(name, None)
