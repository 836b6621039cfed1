"""The one error of tuning that is the user's to mend."""

from __future__ import annotations


class TuningError(ValueError):
    """Bad input to tuning; the message is one line and names the remedy."""
