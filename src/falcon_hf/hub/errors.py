"""The one kind of error that this room raises for what a user can solve."""


class HubError(ValueError):
    """A drafter that cannot be converted, described, published or found; the message names the remedy."""
