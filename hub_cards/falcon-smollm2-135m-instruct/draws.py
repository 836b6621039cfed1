"""Random draws of a batch in plain decoding's order, though rows reach a step of the text at different times.

Plain decoding makes one draw a step for all rows together, ``torch.multinomial`` over ``[B, V]``. To give every row
the very noise it would have had there, the generator's state before each step is kept, and a row that reaches a step
draws from that state in its own place of the batch. So a seed gives the same text as plain decoding, and leaves the
same state behind. Drafting draws nothing. ``tests/runtime/test_batch.py`` and ``test_fuzz.py`` hold both.
"""

from __future__ import annotations

import torch


class Draws:
    """The user's random state over the steps of one generation.

    Args:
        rows: B.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._states: dict[int, torch.Tensor] = {}  # by step, those that a row may still ask for and the last
        self._last = 0
        self._device = torch.device("cpu")

    def draw(self, probabilities: torch.Tensor, row: int, step: int) -> torch.Tensor:
        """One draw for ``row`` at ``step`` (from 0) of its text: ``[1, V]`` probabilities -> ``[1]`` token."""
        if self._rows == 1:
            return torch.multinomial(probabilities, num_samples=1).squeeze(1)
        self._device = probabilities.device
        if not self._states:
            self._states[0] = _get_state(self._device)
        _set_state(self._device, self._states[step])
        # The other rows' laws do not matter for this row's noise, only their number does.
        tokens = torch.multinomial(probabilities.expand(self._rows, -1), num_samples=1)
        if step == self._last:
            self._last = step + 1
            self._states[self._last] = _get_state(self._device)
        return tokens[row]

    def forget_before(self, step: int) -> None:
        """No row will draw for an earlier step any more; a state takes some kilobytes."""
        for past in [past for past in self._states if past < min(step, self._last)]:
            del self._states[past]

    def __enter__(self) -> Draws:
        """The draws themselves."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the generator, on an error too, as plain decoding would: behind the last step that any row reached."""
        if self._states:
            _set_state(self._device, self._states[self._last])


def _get_state(device: torch.device) -> torch.Tensor:
    """State of the device's global generator."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
