"""The same prompt answered with and without the drafter: figures side by side, and the verdict on the two texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape

from ..metrics import difference_gap, first_difference
from ..runtime.statistics import GenerationStatistics
from .answer import Answer

# Rounding units, see ``metrics.difference_gap``: beyond these a difference is not a tie.
_TIE_UNITS = 8.0


@dataclass
class AnswerPair:
    """One prompt's two answers.

    Attributes:
        prompt: what was asked.
        plain: the target's answer alone.
        falcon: its answer with the drafter.
        difference: where the texts part (token, counted from 1), with what, and how near a tie that was; None if they
            are identical. See [`compare`].
    """

    prompt: str
    plain: Answer
    falcon: Answer
    difference: dict[str, Any] | None

    @property
    def speedup(self) -> float:
        """Tokens per second over plain's."""
        return self.falcon.tokens_per_second / self.plain.tokens_per_second

    @property
    def statistics(self) -> GenerationStatistics:
        """What Falcon did."""
        assert self.falcon.statistics is not None  # it answered with a drafter
        return self.falcon.statistics

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        figures = {
            name: {
                "text": result.text,
                "new_tokens": len(result.ids),
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
            }
            for name, result in (("plain", self.plain), ("falcon", self.falcon))
        }
        figures["falcon"]["statistics"] = self.statistics.as_dict()
        verdict = {"identical": self.difference is None, "first_difference": self.difference}
        return {"prompt": self.prompt, **figures, "speedup": self.speedup, **verdict}

    def sentence(self, half_precision: bool) -> str:
        """The verdict in words, with rich's markup: only half precision explains a tie by rounding."""
        if self.difference is None:
            return f"[green]The two texts are identical[/], all {len(self.falcon.ids)} tokens."
        difference = self.difference
        parted = (
            f"The texts part at token {difference['token']}: {difference['plain']!r} without the drafter, "
            f"{difference['falcon']!r} with it."
        )
        if not half_precision or difference.get("rounding_units", _TIE_UNITS + 1) > _TIE_UNITS:
            return f"[red]{escape(parted)}[/] That is no rounding tie: please report it."
        return (
            f"[yellow]{escape(parted)}[/] A tie: the two logits are {abs(difference['logit_gap']):.2g} apart, "
            "which is within the rounding of half precision."
        )


def compare(
    plain: Answer, falcon: Answer, target: Any, tokenizer: Any, inputs: dict[str, torch.Tensor]
) -> dict[str, Any] | None:
    """Where two answers part, None if nowhere: ``token``, ``plain`` and ``falcon`` (its spelling in each).

    With a token on both sides, also ``logit_gap`` and ``rounding_units`` (see ``metrics.difference_gap``).

    Args:
        plain: the target's answer alone.
        falcon: its answer with the drafter.
        target: computes the gap, by one forward.
        tokenizer: the target's.
        inputs: the prompt's ``input_ids`` ``[1, S]``.
    """
    place = first_difference(plain.ids, falcon.ids)
    if place is None:
        return None
    one, other = ((*ids, None)[place] for ids in (plain.ids, falcon.ids))  # None: that text is over
    difference: dict[str, Any] = {"token": place + 1}
    difference |= {"plain": _spelled(tokenizer, one), "falcon": _spelled(tokenizer, other)}
    if one is not None and other is not None:
        before = torch.cat((inputs["input_ids"], torch.tensor([plain.ids[:place]], dtype=torch.long)), dim=1)
        gap = difference_gap(target, before, one, other, place)
        difference |= {"logit_gap": gap.gap, "rounding_units": gap.units}
    return difference


def _spelled(tokenizer: Any, token: int | None) -> str:
    return "the end" if token is None else tokenizer.decode([token])
