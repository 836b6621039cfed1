"""What the user can solve, told in one line."""

from __future__ import annotations


class DistillationError(ValueError):
    """Prompts or a dataset that cannot be used; the message says what to do."""


class TrainingError(ValueError):
    """Data, a cache or an option that cannot be trained with; the message names the remedy."""
