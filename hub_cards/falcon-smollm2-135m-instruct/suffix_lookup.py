"""A second source of candidates: what followed the longest earlier occurrence of the text's own end.

No training, and no index to keep: each round compares the last M tokens with every place of the text, by tensor
operations of fixed shape without a device sync. That is M comparisons a token of text, against the thousands that
the target's attention makes for it; an index on the host would need every round's tokens there, at a sync.

Where the text ends before the chain does, the chain goes on with itself: text of a period p repeats its last p tokens.

The chain found is joined into a dynamic tree by [`Growth.join`], where it has to beat the drafter's own nodes by its
chance of acceptance, which grows with the length of the match. ``tests/runtime/test_suffix_lookup.py`` holds the search
against brute force.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class SuffixLookup:
    """How the text is looked up in itself.

    Attributes:
        length: tokens of the chain at most.
        min_match: shorter matches are none.
        acceptance: ``acceptance[i]``, the chance that the token behind a match of ``min_match + i`` tokens is the
            target's; the last for all longer ones. M is the longest length that it tells apart.
    """

    length: int = 8
    min_match: int = 1
    # Counted over 250 greedy answers of SmolLM2-135M-Instruct to prompts of many kinds (34,000 tokens).
    acceptance: tuple[float, ...] = (0.20, 0.54, 0.63, 0.74, 0.77, 0.80, 0.82, 0.84, 0.87, 0.87, 0.88, 0.96)

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> SuffixLookup:
        """From a config's ``lookup``: any of this class's fields.

        Raises:
            ValueError: on an unknown or impossible field; the message names it.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(entry, Mapping):
            raise ValueError(f"lookup must be None or fields such as {{}} or {{'length': 8}}, got {entry!r}.")
        for name in entry:
            if name not in known:
                raise ValueError(f"lookup has no field {name!r}; it has {', '.join(known)}.")
        for name in ("length", "min_match"):
            value = entry.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        fields = dict(entry)
        if "acceptance" in fields:
            chances = entry["acceptance"]
            if not isinstance(chances, Sequence) or not chances or not all(map(_is_chance, chances)):
                raise ValueError(f"acceptance must be a list of one or more chances above 0, got {chances!r}.")
            fields["acceptance"] = tuple(chances)
        return cls(**fields)

    def propose(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What may follow each row's text.

        Args:
            text: ``[B, T]`` tokens; shorter rows stand at the right end, with -1 before them.

        Returns:
            Tokens ``[B, length]`` of a chain behind the text, and the log chances ``[B, length]`` that the text goes on
            along it that far; -inf where there is no match.
        """
        size = text.shape[1]
        longest, best = self.longest_match(text)
        steps = torch.arange(self.length, device=text.device)
        period = (size - 1 - best).clamp_min(1)
        tokens = text.gather(1, (best + 1 + steps % period).clamp_max(size - 1))
        # Each accepted token makes the match one longer.
        match = longest + steps
        table = _log_table(self.acceptance, text.device)
        chances = table[(match - self.min_match).clamp(0, len(self.acceptance) - 1)].cumsum(1)
        return tokens, torch.where(match[:, :1] >= self.min_match, chances, -torch.inf)

    def longest_match(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The longest earlier match of each row's end, of those the latest.

        Args:
            text: as for [`propose`].

        Returns:
            Its length ``[B, 1]``, M at most, 0 for none; and the place ``[B, 1]`` of its last token.
        """
        size, longest = text.shape[1], self.min_match + len(self.acceptance) - 1
        windows = F.pad(text, (longest - 1, 0), value=-1).unfold(1, longest, 1)  # [B, T, M], each place's last M tokens
        same = (windows == windows[:, -1:]) & (windows >= 0)
        matches = same.flip(-1).int().cumprod(-1).sum(-1)  # [B, T], how many tokens before each place match the end
        places = torch.arange(size, device=text.device)
        rank = torch.where(places < size - 1, matches * size + places, -1)  # the end itself does not count
        best = rank.argmax(-1, keepdim=True)
        return matches.gather(1, best), best


@functools.lru_cache(maxsize=64)
def _log_table(chances: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Made once: copying it to a device would wait for the device in each round."""
    with torch.inference_mode(False):
        return torch.tensor(chances, device=device).log()


def _is_chance(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
