"""What the user can solve, told in one line."""


class DistillationError(ValueError):
    """Prompts or a dataset that cannot be used; the message says what to do."""
