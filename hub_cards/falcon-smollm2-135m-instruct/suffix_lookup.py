"""A second source of candidates: what followed the longest earlier occurrence of the text's own end.

No training, and no index to keep: each round compares the last M tokens with every place of the text, by tensor
operations of fixed shape without a device sync. That is M comparisons a token of text, against the thousands that
the target's attention makes for it; an index on the host would need every round's tokens there, at a sync.

The chain found is joined into a dynamic tree by [`Growth.join`], where it has to beat the drafter's own nodes by its
chance of acceptance, which grows with the length of the match. ``tests/runtime/test_suffix_lookup.py`` holds the search
against brute force.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
        for name in entry:
            if name not in known:
                raise ValueError(f"lookup has no field {name!r}; it has {', '.join(known)}.")
        for name in ("length", "min_match"):
            value = entry.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        fields = dict(entry)
        if "acceptance" in fields:
            fields["acceptance"] = tuple(fields["acceptance"])
            if not fields["acceptance"] or not all(0 < chance <= 1 for chance in fields["acceptance"]):
                raise ValueError(f"acceptance must be one or more chances above 0, got {entry['acceptance']}.")
        return cls(**fields)

    def propose(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What may follow each row's text.

        Args:
            text: ``[B, T]`` tokens; shorter rows stand at the right end, with -1 before them.

        Returns:
            Tokens ``[B, length]`` of a chain behind the text, and the log chances ``[B, length]`` that the text goes on
            along it that far; -inf where there is no match, or no more text behind it.
        """
        size, longest = text.shape[1], self.min_match + len(self.acceptance) - 1
        windows = F.pad(text, (longest - 1, 0), value=-1).unfold(1, longest, 1)  # [B, T, M], each place's last M tokens
        same = (windows == windows[:, -1:]) & (windows >= 0)
        matches = same.flip(-1).int().cumprod(-1).sum(-1)  # [B, T], how many tokens before each place match the end
        places = torch.arange(size, device=text.device)
        # The longest, of those the latest; the end itself does not count.
        rank = torch.where(places < size - 1, matches * size + places, -1)
        best = rank.argmax(-1, keepdim=True)
        ahead = best + 1 + torch.arange(self.length, device=text.device)
        tokens = text.gather(1, ahead.clamp_max(size - 1))
        # Each accepted token makes the match one longer.
        match = matches.gather(1, best) + torch.arange(self.length, device=text.device)
        table = torch.tensor(self.acceptance, device=text.device).log()
        chances = table[(match - self.min_match).clamp(0, len(self.acceptance) - 1)].cumsum(1)
        found = (match[:, :1] >= self.min_match) & (ahead < size)
        return tokens, torch.where(found, chances, -torch.inf)
