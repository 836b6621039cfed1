"""What ``generate()`` gives back and streams, put together from the rows of a batch.

Rows end at different times. Behind a row's end ``sequences`` has the padding token, as plain decoding leaves it, and
what is recorded of it has zeros: plain decoding records there what the target says of padding.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .emission import Emission

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

_FIELDS = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
_CACHE_FIELD = "cache" if "cache" in _FIELDS else "past_key_values"


def gather_output(
    rows: list[Emission], generation_config: GenerationConfig, prompt_states: Any, prompt_attentions: Any, cache: Any
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """The return value of ``generate()``.

    Args:
        rows: the finished rows.
        generation_config: says what to return.
        prompt_states: the prefill's hidden states, one ``[B, P, H]`` a layer, the first entry of ``hidden_states``.
        prompt_attentions: the prefill's attentions, the first entry of ``attentions``.
        cache: the target's cache.

    Returns:
        ``[B, P + longest text]`` ids, or the output object if ``return_dict_in_generate``.
    """
    longest = max(row.ids.shape[1] for row in rows)
    sequences = torch.cat([_padded(row.ids, longest, generation_config) for row in rows])
    if not generation_config.return_dict_in_generate:
        return sequences
    states, attentions = _by_step(rows, "hidden_states"), _by_step(rows, "attentions")
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_by_step(rows, "scores"),
        logits=_by_step(rows, "logits"),
        hidden_states=None if states is None else (prompt_states, *states),
        attentions=None if attentions is None else (prompt_attentions, *attentions),
        **{_CACHE_FIELD: cache},
    )


def _padded(ids: torch.Tensor, length: int, generation_config: GenerationConfig) -> torch.Tensor:
    """``[1, L]`` ids filled up to ``length`` with the padding token."""
    missing = length - ids.shape[1]
    if missing == 0:
        return ids
    pad = generation_config._pad_token_tensor.to(ids.device).reshape(1, 1)
    return torch.cat((ids, pad.expand(1, missing)), dim=1)


def _by_step(rows: list[Emission], name: str) -> tuple[Any, ...] | None:
    """The rows' records ``name``, one batch entry a step; None if they were not asked for."""
    records = [getattr(row, name) for row in rows]
    if records[0] is None:
        return None
    steps = range(max(map(len, records)))
    return tuple(_stack([_at(records, row, step) for row in range(len(records))]) for step in steps)


def _at(records: list[list[Any]], row: int, step: int) -> Any:
    """A row's record at a step; behind its end zeros of the shape that the other rows' records have there."""
    if step < len(records[row]):
        return records[row][step]
    other = next(record[step] for record in records if step < len(record))
    return tuple(map(torch.zeros_like, other)) if isinstance(other, tuple) else torch.zeros_like(other)


def _stack(entries: list[Any]) -> Any:
    """One batch tensor from the rows' ``[1, ...]``, or a tuple of them, one a layer."""
    if isinstance(entries[0], tuple):
        return tuple(_stack(list(layer)) for layer in zip(*entries, strict=True))
    return entries[0] if len(entries) == 1 else torch.cat(entries)


class StreamedRows:
    """Feeds a streamer as plain decoding does: per step one token a row, padding for rows that have ended."""

    def __init__(
        self, streamer: BaseStreamer | None, rows: list[Emission], generation_config: GenerationConfig
    ) -> None:
        self._streamer = streamer
        self._rows = rows
        self._config = generation_config
        self._put = 0

    def flush(self) -> None:
        """Put every step that all unfinished rows have reached."""
        if self._streamer is None:
            return
        open_rows = [row for row in self._rows if not row.ended]
        reached = min(row.new_tokens for row in open_rows) if open_rows else max(row.new_tokens for row in self._rows)
        for step in range(self._put, reached):
            tokens = [self._token(row, step) for row in self._rows]
            self._streamer.put(torch.cat(tokens).cpu())
        self._put = reached

    def _token(self, row: Emission, step: int) -> torch.Tensor:
        """``[1]``, the token of a row at a step, or padding."""
        if step < row.new_tokens:
            return row.ids[0, row.ids.shape[1] - row.new_tokens + step].reshape(1)
        return self._config._pad_token_tensor.to(row.ids.device).reshape(1)

    def end(self) -> None:
        """Tell the streamer that the text is complete."""
        if self._streamer is not None:
            self._streamer.end()
