"""Tells whether an upstream checkpoint's LSTM recurs over the sequence, from its weights.

The published program makes the LSTM with torch's default layout ``[time, batch, width]`` and feeds it ``[batch, time,
2H]``, so it recurs over the batch; with one sequence, each position starts from the zero state (``lstm_stateless``).
Training leaves a trace of that: from the zero state, neither the recurrent matrices nor the forget gate (whose state
is zero) ever get a gradient, so they stay as torch drew them, uniform in (-a, a), a = H^(-1/2), perhaps shrunk by
weight decay. A checkpoint whose recurrent matrices have kept that law was trained without state.
"""

from __future__ import annotations

import torch

_KURTOSIS = 1.8  # of the uniform law, E x^4 / (E x^2)^2; a trained matrix is more peaked
_TOLERANCE = 0.03


def judge_recurrence(weights: dict[str, torch.Tensor]) -> tuple[str, str]:
    """The fusion to take, ``"lstm_stateless"``, and how sure that is, as a clause that follows "because".

    Args:
        weights: the checkpoint; ``lstm.weight_hh_l*`` ``[4H, H]`` are looked at.
    """
    matrices = [weight for name, weight in weights.items() if name.startswith("lstm.weight_hh_l")]
    if matrices and all(is_as_drawn(weight) for weight in matrices):
        return (
            "lstm_stateless",
            "the recurrent matrices are as torch draws them: training never reached them, so no state ever ran along "
            "the sequence",
        )
    return (
        "lstm_stateless",
        "the published program's layout, [batch, time] into an LSTM that expects [time, batch], starts every position "
        "of a single sequence from the zero state; yet the recurrent matrices are trained, so it may have been made "
        "with another program or with larger batches: try --fusion lstm too, and keep what drafts better",
    )


def is_as_drawn(weight: torch.Tensor) -> bool:
    """Whether ``[4H, H]`` still has the uniform law, up to a common factor of at most 1, that torch drew it from."""
    values = weight.double()
    second = values.square().mean()
    bound = values.shape[1] ** -0.5
    kurtosis = float(values.pow(4).mean() / second.square().clamp_min(1e-30))
    largest = float(values.abs().max())
    # A uniform law's largest value is sqrt(3) of its root mean square.
    shape = abs(kurtosis - _KURTOSIS) < _TOLERANCE + 4 / values.numel() ** 0.5
    edge = largest <= bound * 1.01 and largest <= float((3 * second).sqrt()) * 1.05
    return shape and edge
