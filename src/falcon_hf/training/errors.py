"""The one error of training that a user can solve."""

from __future__ import annotations


class TrainingError(ValueError):
    """Data, a cache or an option that cannot be trained with; the message names the remedy."""
