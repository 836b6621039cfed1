"""Measures that tuning and bench share: spread of ratios, agreement of texts, and the gap at a first difference.

In bfloat16 or float16 two correct ways to run the same model may emit different texts, because kernels round
differently for different shapes and a near tie flips. [`difference_gap`] tells such a tie from an error: it compares
the two tokens' scores with the rounding unit at their magnitude.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

# Options that decide when a text ends or how it is drawn, not how one next token is scored; and the one that leaves the
# last token no choice, so that any other is an error.
_LENGTH_AND_SAMPLING = frozenset(
    {"max_new_tokens", "max_length", "max_time", "stop_strings", "forced_eos_token_id"}
    | {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)


@dataclass(frozen=True)
class Spread:
    """Median and spread of a sample; quartiles are interpolated (the "inclusive" method)."""

    count: int
    median: float
    lower_quartile: float
    upper_quartile: float
    min: float
    max: float


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and range of ``values``.

    Raises:
        ValueError: if there is no value, or one is not finite.
    """
    if not values:
        raise ValueError("The spread of no values is undefined.")
    if not all(math.isfinite(value) for value in values):
        raise ValueError("The spread needs finite values.")
    # One value has no quartiles of its own: it is all of them.
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(len(values), statistics.median(values), quartiles[0], quartiles[2], min(values), max(values))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, None if they are identical.

    Where one text is the beginning of the other, it is the shorter one's length.
    """
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


@dataclass(frozen=True)
class DifferenceGap:
    """How far apart the target sees two tokens.

    Attributes:
        gap: score[a] - score[b]; infinite if a processor forbids one of them.
        unit: rounding unit at the scores' magnitude, eps(dtype) * |score|.
    """

    gap: float
    unit: float

    @property
    def units(self) -> float:
        """|gap| in rounding units: a few are a near tie, many are an error."""
        return abs(self.gap) / self.unit if self.unit else math.inf if self.gap else 0.0


@torch.no_grad()
def difference_gap(
    target: PreTrainedModel, ids_before: torch.Tensor, token_a: int, token_b: int, new_before: int = 0, **options: Any
) -> DifferenceGap:
    """The target's scores of two tokens after the same text: one forward, without a cache from before.

    It goes through ``generate()``, one token, so that the scores are those a greedy choice was made from: with the
    processors of the target's own generation config and of ``options``.

    Args:
        target: the target.
        ids_before: ``[1, P]``, prompt and text up to the first difference.
        token_a: what one text goes on with.
        token_b: what the other goes on with.
        new_before: how many of ``ids_before`` were generated, for options that count from the prompt's end.
        **options: options of ``generate()`` that the texts were made with; those that end a text and those of sampling
            are left out.

    Raises:
        ValueError: if ``ids_before`` is not one non-empty row.
    """
    if ids_before.ndim != 2 or ids_before.shape[0] != 1 or ids_before.shape[1] == 0:
        raise ValueError(f"ids_before must be one non-empty row [1, P], got {list(ids_before.shape)}.")
    kept = {name: value for name, value in options.items() if name not in _LENGTH_AND_SAMPLING}
    kept = _from_here(kept, ids_before.shape[1], new_before)
    fixed = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    out = target.generate(ids_before, attention_mask=torch.ones_like(ids_before), **{**kept, **fixed})
    a, b = (float(out.scores[0][0, token]) for token in (token_a, token_b))
    magnitude = max((abs(score) for score in (a, b) if math.isfinite(score)), default=0.0)
    return DifferenceGap(a - b if a != b else 0.0, torch.finfo(target.dtype).eps * magnitude)


def _from_here(options: dict[str, Any], length: int, new_before: int) -> dict[str, Any]:
    """Options for a text of ``length`` tokens as prompt, of which the last ``new_before`` had been generated."""
    least_new, least = options.pop("min_new_tokens", None), options.pop("min_length", None)
    if least_new is not None or least is not None:
        short = new_before < least_new if least_new is not None else length < least
        options["min_new_tokens"] = int(short)  # the end is forbidden, or not
    if new_before:
        options.pop("begin_suppress_tokens", None)
    if options.get("exponential_decay_length_penalty") is not None:
        start, factor = options["exponential_decay_length_penalty"]
        options["exponential_decay_length_penalty"] = (start - new_before, factor)
    return options
