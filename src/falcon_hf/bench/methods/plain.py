"""Plain ``generate()``: the baseline that every other method is compared with."""

from __future__ import annotations

from typing import Any

from .base import Method


class Plain(Method):
    """One token a forward."""

    name = "plain"

    def arguments(self) -> dict[str, Any]:
        """Nothing."""
        return {}


METHOD = Plain
