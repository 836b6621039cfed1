"""Which slots of a target's cache hold text, and where in the text each stands. Nothing here touches the cache.

A *slot* is a column of the cache, the same in all rows. Its *position* is what the rotary embedding sees. Its *place*
is its slot in plain decoding, from the row's first token on, and is what windows and chunks go by: the position, but
where the user masks tokens within a prompt or numbers the positions himself. Slots differ from places inside a tree,
whose siblings share a place, and between the rows of a batch: rows accept different numbers of drafts, all advance by
the longest, and the others are left with invalid slots, *holes*.
"""

from __future__ import annotations

import torch

from .host_values import on_device


class CachedSlots:
    """The slots of a batch.

    Attributes:
        valid: ``[B, L]`` bool, which of the L slots in use hold a token.
        place: ``[B, L]``.
        next_position: ``[B, 1]``, the position of each row's next token.
        prompt: how many slots the prompt has.
        filled: valid slots of each row.
    """

    def __init__(self, valid: torch.Tensor, next_position: torch.Tensor) -> None:
        """The slots of a prompt: ``valid`` ``[B, L]``, ``next_position`` ``[B, 1]``. One device sync."""
        self.valid, self.next_position = valid, next_position
        self.prompt = valid.shape[1]
        self.place = torch.arange(self.prompt, device=valid.device) - valid.long().argmax(-1, keepdim=True)
        self._ahead = self.place[:, -1:] + 1 - next_position
        self.filled: list[int] = valid.sum(-1).tolist()
        self._prompt_filled = list(self.filled)

    @classmethod
    def of_prompt(
        cls,
        rows: int,
        length: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        device: torch.device,
    ) -> CachedSlots:
        """From the ``[B or 1, L]`` attention mask and the position ids that the user gave, if any.

        Of the positions the last counts: behind a cache they may be the new tokens' alone.
        """
        valid = torch.ones(1, length, dtype=torch.bool, device=device) if mask is None else mask.to(device).bool()
        if positions is None:
            positions = (valid.long().cumsum(-1) - 1).clamp_min(0)
        return cls(valid[:, -length:].expand(rows, -1), positions[:, -1:].to(device).expand(rows, -1) + 1)

    @property
    def length(self) -> int:
        """L, the slots in use."""
        return self.valid.shape[1]

    @property
    def wasted(self) -> int:
        """Slots behind the prompt that not even the longest row uses."""
        return self.length - self.prompt - self._longest

    @property
    def _longest(self) -> int:
        """Generated tokens of the longest row."""
        return max(now - then for now, then in zip(self.filled, self._prompt_filled, strict=True))

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Places of tokens to come, from their positions, ``[B, N]``."""
        return positions + self._ahead

    def add(self, lengths: list[int]) -> None:
        """So many tokens more a row; the shorter rows get holes behind theirs."""
        steps = torch.arange(max(lengths), device=self.valid.device)
        added = on_device(lengths, self.valid.device)[:, None]
        self.filled = [filled + length for filled, length in zip(self.filled, lengths, strict=True)]
        self.valid = torch.cat((self.valid, steps < added), dim=1)
        self.place = torch.cat((self.place, self.places(self.next_position + steps)), dim=1)
        self.next_position = self.next_position + added

    def without_holes(self) -> torch.Tensor | None:
        """The generated slots that stay when holes are closed, ``[B, n]`` from the prompt's end on; None if all do."""
        generated = self.valid[:, self.prompt :]
        order = torch.argsort(~generated, dim=1, stable=True)  # the valid ones first, in their order
        if self.wasted == 0 and bool((order == torch.arange(order.shape[1], device=order.device)).all()):
            return None
        return order[:, : self._longest]

    def close_holes(self, order: torch.Tensor) -> None:
        """What [`without_holes`] says was done."""
        head = torch.arange(self.prompt, device=order.device).expand(len(order), -1)
        kept = torch.cat((head, self.prompt + order), dim=1)
        self.valid, self.place = self.valid.gather(1, kept), self.place.gather(1, kept)
