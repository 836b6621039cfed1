"""How often the token that followed the longest earlier match of a text's end is the next one, by the match's length.

Counted along the target's greedy answers, as ``rank_measurement.py`` counts the drafter's ranks: what ``lookup`` would
have proposed at each position, and whether the target wrote that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.suffix_lookup import SuffixLookup
from .errors import TuningError
from .monotone import isotonic
from .rank_measurement import GreedyText

# A length's chance is drawn to the default one by so many samples' weight.
_PRIOR_WEIGHT = 20.0


@dataclass(frozen=True)
class LookupCounts:
    """Proposals by length of match, the default lookup's lengths: ``[i]`` is of ``min_match + i`` tokens.

    Attributes:
        trials: positions with such a match.
        hits: those whose next token was the one proposed.
    """

    trials: tuple[int, ...]
    hits: tuple[int, ...]

    def config_entry(self) -> dict[str, Any]:
        """A drafter config's ``lookup`` with these chances, which grow with the length of the match."""
        default = SuffixLookup().acceptance
        weights = [count + _PRIOR_WEIGHT for count in self.trials]
        drawn = [
            (hits + _PRIOR_WEIGHT * prior) / weight
            for hits, prior, weight in zip(self.hits, default, weights, strict=True)
        ]
        return {"acceptance": [round(chance, 4) for chance in isotonic(drawn, weights)]}

    @classmethod
    def from_json(cls, value: Any) -> LookupCounts:
        """From a calibration file.

        Raises:
            TuningError: if it is something else.
        """
        try:
            found = cls(tuple(map(int, value["trials"])), tuple(map(int, value["hits"])))
        except (KeyError, TypeError, ValueError) as error:
            raise TuningError(f"The calibration's look-up counts are damaged: {error}.") from error
        fits = len(found.trials) == len(found.hits) == len(SuffixLookup().acceptance)
        if not fits or not all(0 <= hits <= trials for hits, trials in zip(found.hits, found.trials, strict=True)):
            raise TuningError("The calibration's look-up counts are damaged: hits are some of the trials.")
        return found


def count_lookups(texts: Sequence[GreedyText]) -> LookupCounts:
    """Look up each answer's text at each of its positions."""
    lookup = SuffixLookup(length=1)
    lengths = len(lookup.acceptance)
    trials, hits = [0] * lengths, [0] * lengths
    for text in texts:
        found = []
        for root in range(text.prompt_length, text.ids.shape[1] - 1):
            match, place = lookup.longest_match(text.ids[:, : root + 1])
            right = text.ids.gather(1, place + 1) == text.ids[:, root + 1, None]
            found.append(torch.cat((match, right.long()), dim=1))
        for match, right in torch.cat(found).tolist() if found else []:  # one transfer a text
            if match >= lookup.min_match:
                index = min(match - lookup.min_match, lengths - 1)
                trials[index] += 1
                hits[index] += right
    return LookupCounts(tuple(trials), tuple(hits))
