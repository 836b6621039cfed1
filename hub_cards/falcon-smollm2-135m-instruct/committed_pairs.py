"""Hands what was committed to the drafter, at once or, while nothing is drafted, when it is needed."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .candidate_generator import FalconCandidateGenerator
from .emission import Emission
from .host_values import on_device


class CommittedPairs:
    """The target's features and the tokens one ahead, of all rows, on their way to the drafter.

    Args:
        generator: the drafter's side.
        rows: the texts.
    """

    def __init__(self, generator: FalconCandidateGenerator, rows: list[Emission]) -> None:
        self._generator = generator
        self._rows = rows
        self._held: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in rows]

    def add_prompt(self, features: list[torch.Tensor]) -> None:
        """Hand over the prompts: one ``[1, F, W]`` features a row."""
        for row, states, held in zip(self._rows, features, self._held, strict=True):
            known = min(states.shape[1], row.ids.shape[1])
            held.append((states[0, -known:], row.ids[0, -known:]))
        self._hand_over()

    def add_round(self, features: torch.Tensor, paths: list[list[int]], hold: bool = False) -> None:
        """Hand over a round, or hold it until one that is not to be held.

        Args:
            features: ``[B, N, W]`` of the verified nodes.
            paths: each row's visited nodes.
            hold: whether the next round does not draft.
        """
        if all(row.ended for row in self._rows):
            return
        lengths = [0 if row.ended else len(path) for path, row in zip(paths, self._rows, strict=True)]
        tokens = [row.ids[:, row.ids.shape[1] - length :] for row, length in zip(self._rows, lengths, strict=True)]
        if hold or any(self._held):
            for row, length in enumerate(lengths):
                if length:
                    nodes = on_device(paths[row][:length], features.device)
                    self._held[row].append((features[row, nodes], tokens[row][0]))
            if not hold:
                self._hand_over()
        elif len(self._rows) == 1:
            self._generator.append(features[:, on_device(paths[0], features.device)], tokens[0])
        else:
            longest = max(lengths)
            visited = [path[:length] + [0] * (longest - length) for path, length in zip(paths, lengths, strict=True)]
            index = on_device(visited, features.device)[:, :, None].expand(-1, -1, features.shape[-1])
            padded = [F.pad(each, (0, longest - length)) for each, length in zip(tokens, lengths, strict=True)]
            self._generator.append(features.gather(1, index), torch.cat(padded), lengths)

    def _hand_over(self) -> None:
        some = next(held[0] for held in self._held if held)
        none = some[0][:0], some[1][:0]
        rows = [tuple(map(torch.cat, zip(*(held or [none]), strict=True))) for held in self._held]
        features, tokens = (pad_sequence([row[part] for row in rows], batch_first=True) for part in (0, 1))
        self._generator.append(features, tokens, [row[1].shape[0] for row in rows])
        self._held = [[] for _ in self._rows]
