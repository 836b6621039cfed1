"""transformers' prompt lookup: drafts are copied from the text so far, where its last tokens occurred before."""

from __future__ import annotations

from typing import Any

from ..errors import BenchError
from .base import Method, MethodContext

_DEFAULT_TOKENS = 10


class PromptLookup(Method):
    """``generate(prompt_lookup_num_tokens=...)``. Sampled texts follow the same law as plain's, not the same draws."""

    name = "prompt_lookup"
    settings = {"tokens": f"drafts a round, {_DEFAULT_TOKENS} by default"}
    prefill_drafts = True
    draws_as_plain = False

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        super().__init__(label, context, settings)
        value = settings.get("tokens", str(_DEFAULT_TOKENS))
        if not value.isdecimal() or int(value) < 1:
            raise BenchError(f"{label}: tokens must be a whole number of at least 1, got {value!r}.")
        self.tokens = int(value)

    def arguments(self) -> dict[str, Any]:
        """The number of drafts."""
        return {"prompt_lookup_num_tokens": self.tokens}

    def provenance(self) -> dict[str, Any]:
        """The number of drafts."""
        return {**super().provenance(), "tokens": self.tokens}


METHOD = PromptLookup
