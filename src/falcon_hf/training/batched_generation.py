"""Many texts from one target at high throughput: a batch whose rows are replaced as they finish.

``generate()`` keeps a batch until its longest row has ended; with answers of 20 to 250 tokens half of its rows are
idle by then. Here a row that has ended makes room for the next prompt. All rows share the cache's end, so a row that
joins late is padded on the left, as any batch of prompts is; the texts are those that ``generate()`` gives
(``tests/training/test_batched_generation.py``).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..runtime.target_session import cache_key
from .grouped_attention import grouped_decoding
from .growing_cache import GrowingCache

Choose = Callable[[torch.Tensor], torch.Tensor]
"""``[B, V]`` logits -> ``[B]`` tokens."""

# Rows are replaced when this share of them has ended: replacing copies the cache.
_REPLACED_SHARE = 1 / 8
# Batches of prompts among which neighbours by length are found.
_WINDOW = 4


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row: ``[B, V]`` -> ``[B]``."""
    return logits.argmax(-1)


class Sampler:
    """Sampling with a generator of its own; the user's global random state stays as it is.

    Args:
        temperature: above 0.
        top_p: of the likeliest tokens as few as reach this probability together; 1 keeps all ``top_k``.
        top_k: only the likeliest so many are candidates at all. It bounds the cost: sorting a vocabulary is slow.
        seed: of the generator, on the CPU.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 0.95, top_k: int = 256, seed: int = 0) -> None:
        if temperature <= 0 or not 0 < top_p <= 1 or top_k < 1:
            raise ValueError("Sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 1.")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw one token a row: ``[B, V]`` -> ``[B]``."""
        scaled = logits.float() / self.temperature
        values, tokens = scaled.topk(min(self.top_k, scaled.shape[-1]), dim=-1)
        law = (values - scaled.logsumexp(-1, keepdim=True)).exp()
        law = law.masked_fill(law.cumsum(-1) - law >= self.top_p, 0.0)  # the first is always kept
        drawn = torch.multinomial(law.cpu(), num_samples=1, generator=self._generator)
        return tokens.gather(1, drawn.to(tokens.device)).squeeze(1)


@dataclass(frozen=True)
class Text:
    """A finished text.

    Attributes:
        number: of its prompt, from 0.
        tokens: the new token ids.
        features: ``[P + S, W]`` hidden states of the prompt's and the new tokens, those of the asked layers side by
            side, on the CPU; zeros for the last token, which no forward has seen. None if no layers were asked for.
    """

    number: int
    tokens: list[int]
    features: torch.Tensor | None = None


@dataclass
class _Row:
    number: int
    prompt: int  # tokens
    room: int  # tokens it may still get
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


def generate_texts(
    target: PreTrainedModel,
    prompts: Iterable[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    end_ids: Iterable[int],
    choose: Choose = greedy,
    feature_layers: list[int] | None = None,
) -> Iterator[Text]:
    """Continue every prompt until an end token or ``max_new_tokens``; texts come as they finish, not in order.

    Args:
        target: a decoder-only model of any family that Falcon verifies trees on.
        prompts: token ids, at least one each; read a few batches ahead.
        batch_size: rows decoded together.
        max_new_tokens: of each text.
        end_ids: tokens that end a text; it keeps them.
        choose: the next tokens from the logits.
        feature_layers: numbers of hidden states (0 the embeddings, L the last of L layers, behind the final norm) to
            return with each text: a training set's features at no cost but memory.

    Yields:
        The texts.

    Raises:
        ValueError: if a number is below 1, or a prompt is empty.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError("batch_size and max_new_tokens must be at least 1.")
    batch = _Batch(target, max_new_tokens, frozenset(end_ids), choose, feature_layers)
    group = max(1, int(batch_size * _REPLACED_SHARE))
    waiting = _of_like_length(prompts, group, _WINDOW * batch_size)
    exhausted = False
    while True:
        free = batch_size - batch.active
        if batch.active == 0 or free >= batch_size * _REPLACED_SHARE:
            most = free - free % group  # whole groups, so that few prompts are padded much
            joining = [] if exhausted else list(itertools.islice(waiting, most))
            exhausted = exhausted or len(joining) < most
            if joining or batch.active == 0 or batch.ended >= len(batch.rows) * _REPLACED_SHARE:
                yield from batch.replace(joining)
            if not batch.rows:
                return
        if batch.active:
            batch.step()


def _of_like_length(prompts: Iterable[list[int]], group: int, window: int) -> Iterator[tuple[int, list[int]]]:
    """Numbered prompts in an order of its own: groups of neighbours by length within a window, the groups shuffled.

    Prompts that join together are padded to the longest of them. In order of length the last dialogues, which trainers
    hold out, would be the longest.
    """
    numbered, order = enumerate(prompts), random.Random(0)
    while near := list(itertools.islice(numbered, window)):
        near.sort(key=lambda prompt: len(prompt[1]))
        groups = [near[first : first + group] for first in range(0, len(near), group)]
        order.shuffle(groups)
        yield from itertools.chain.from_iterable(groups)


class _Batch:
    """The rows that are being decoded, their cache and masks."""

    def __init__(
        self,
        target: PreTrainedModel,
        max_new_tokens: int,
        end_ids: frozenset[int],
        choose: Choose,
        feature_layers: list[int] | None = None,
    ) -> None:
        self.target, self.max_new_tokens, self.end_ids, self.choose = target, max_new_tokens, end_ids, choose
        self.feature_layers = feature_layers
        self._features: list[torch.Tensor] = []  # side by side [B, L, W], on the CPU: those of the cache's slots
        self.rows: list[_Row] = []
        self._cache_key = cache_key(target)
        self._cache: Any = None
        self._valid = torch.zeros(0, 0, dtype=torch.long)  # [B, L], 1 where a slot holds a token
        self._next = torch.zeros(0, dtype=torch.long)  # [B], chosen and not yet in the cache

    @property
    def active(self) -> int:
        """Rows that have not ended."""
        return len(self.rows) - self.ended

    @property
    def ended(self) -> int:
        """Rows that have ended and still take part."""
        return sum(row.ended for row in self.rows)

    @torch.inference_mode()
    def step(self) -> None:
        """One token for each row; those of ended rows are dropped. One device sync."""
        device = self.target.device
        self._valid = torch.cat((self._valid, self._valid.new_ones(len(self.rows), 1)), dim=1)
        logits, features = self._forward(self._next[:, None].to(device), self._valid, self._cache)
        self._features.extend(features)
        self._take(logits)

    @torch.inference_mode()
    def replace(self, joining: list[tuple[int, list[int]]]) -> list[Text]:
        """Let the rows that have ended go and others, (number, prompt), join; returns the texts of the former."""
        held = [torch.cat(self._features, dim=1)] if self._features else []
        texts = [
            Text(row.number, row.tokens, self._features_of(index, held[0]) if held else None)
            for index, row in enumerate(self.rows)
            if row.ended
        ]
        kept = torch.tensor([index for index, row in enumerate(self.rows) if not row.ended], dtype=torch.long)
        self.rows = [row for row in self.rows if not row.ended]
        valid, following = self._valid[kept], self._next[kept]
        first = int(valid.sum(0).nonzero()[0]) if len(kept) else self._valid.shape[1]
        valid, held = valid[:, first:], [features[kept, first:] for features in held]
        if not joining:
            if len(kept):
                self._cache.replace_rows(kept.to(self.target.device), first, None)
            self._valid, self._next, self._features = valid, following, held
            return texts
        new_valid, cache, logits, new_held = self._prefill([prompt for _, prompt in joining])
        slots = max(valid.shape[1], new_valid.shape[1])
        if len(kept):
            self._cache.replace_rows(kept.to(self.target.device), first, cache)
            self._features = [
                torch.cat((_padded(old, slots), _padded(new, slots))) for old, new in zip(held, new_held, strict=True)
            ]
        else:
            self._cache, self._features = cache, new_held
        self._valid = torch.cat((_padded(valid, slots), _padded(new_valid, slots)))
        staying, self.rows = self.rows, [_Row(number, len(prompt), self.max_new_tokens) for number, prompt in joining]
        self._take(logits)
        self.rows, self._next = staying + self.rows, torch.cat((following, self._next))
        return texts

    def _features_of(self, index: int, features: torch.Tensor) -> torch.Tensor:
        """``[P + S, W]`` of a row that has ended, from ``[B, L, W]`` of all."""
        row = self.rows[index]
        seen = row.prompt + len(row.tokens) - 1
        own = features[index, self._valid[index].bool()][:seen]
        return torch.cat((own, own.new_zeros(1, own.shape[1])))

    def _prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, GrowingCache, torch.Tensor, list[torch.Tensor]]:
        """Validity ``[n, longest]`` of the left-padded prompts, their cache, the logits ``[n, V]``, the features."""
        if not all(prompts):
            raise ValueError("A prompt without tokens cannot be continued.")
        longest = max(map(len, prompts))
        valid = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        cache = GrowingCache()
        logits, features = self._forward(ids.to(self.target.device), valid, cache)
        return valid, cache, logits, features

    def _forward(
        self, ids: torch.Tensor, valid: torch.Tensor, cache: GrowingCache
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits ``[B, V]`` at the end of ``ids`` ``[B, S]``, the last tokens of ``valid`` ``[B, L]``; features."""
        valid = valid.to(ids.device)
        positions = (valid.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with grouped_decoding(self.target):
            outputs = self.target(
                input_ids=ids,
                attention_mask=valid,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                output_hidden_states=self.feature_layers is not None,
                **{self._cache_key: cache},
            )
        features = []
        if self.feature_layers is not None:
            features = [torch.cat([outputs.hidden_states[layer] for layer in self.feature_layers], dim=-1).cpu()]
        return outputs.logits[:, -1], features

    def _take(self, logits: torch.Tensor) -> None:
        """Choose every row's next token from ``[B, V]`` logits."""
        self._next = self.choose(logits).cpu()
        for row, token in zip(self.rows, self._next.tolist(), strict=True):
            if row.ended:
                continue
            row.tokens.append(token)
            row.room -= 1
            row.ended = token in self.end_ids or row.room == 0


def _padded(slots_of_rows: torch.Tensor, slots: int) -> torch.Tensor:
    """``[B, L, ...]`` -> ``[B, slots, ...]``, zeros in front."""
    missing = slots - slots_of_rows.shape[1]
    shape = (slots_of_rows.shape[0], missing, *slots_of_rows.shape[2:])
    return torch.cat((slots_of_rows.new_zeros(shape), slots_of_rows), dim=1)
