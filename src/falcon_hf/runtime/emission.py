"""The text of one generation as it grows: how a token is chosen, recorded, streamed, and when the text ends.

Mirrors, token by token, what transformers' ``GenerationMixin._sample`` does between two forwards; nothing here knows
of trees or drafts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

_CACHE_FIELD = (
    "cache" if "cache" in {f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput)} else "past_key_values"
)


class Emission:
    """Emits tokens one by one.

    Attributes:
        ids: ``[1, P + emitted]``, prompt and text so far.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        self.ids = input_ids
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._config = generation_config
        self._streamer = streamer

        def record(wanted: bool | None) -> tuple[Any, ...] | None:
            return () if generation_config.return_dict_in_generate and wanted else None

        self._scores = record(generation_config.output_scores)
        self._logits = record(generation_config.output_logits)
        self._hidden_states = record(generation_config.output_hidden_states)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether a token is just the argmax, with nothing to process or record."""
        recorded = (self._scores, self._logits, self._hidden_states)
        return not self._config.do_sample and len(self._processor) == 0 and all(kept is None for kept in recorded)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token ``[1]`` from the target's logits ``[1, V]``: processed, recorded, then argmax or one draw."""
        # A copy in float32, as plain decoding makes one: processors may write into it.
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._processor(self.ids, logits)
        if self._scores is not None:
            self._scores += (scores,)
        if self._logits is not None:
            self._logits += (logits,)
        if self._config.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    def commit(self, token: torch.Tensor) -> torch.Tensor:
        """Append ``token`` ``[1]``, stream it, and return whether the text ends with it (a scalar bool tensor)."""
        token = token.to(self.ids.device)
        self.ids = torch.cat((self.ids, token[:, None]), dim=-1)
        if self._streamer is not None:
            self._streamer.put(token.cpu())
        return self._criteria(self.ids, self._scores).all()

    def start(self, outputs: Any) -> bool:
        """Emit the first token, from the prefill's outputs; returns whether the text ends with it."""
        ended = self.commit(self.choose(outputs.logits[:, -1]))
        if self._hidden_states is not None:
            self._hidden_states += (outputs.hidden_states,)
        return bool(ended)

    def record_hidden_states(self, outputs: Any, node: int) -> None:
        """Keep a verified node's hidden states, each ``[1, 1, H]``, if the user asked for them."""
        if self._hidden_states is not None:
            self._hidden_states += (tuple(state[:, node : node + 1] for state in outputs.hidden_states),)

    def result(self, cache: Any) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """What ``generate()`` returns."""
        if not self._config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,
            scores=self._scores,
            logits=self._logits,
            hidden_states=self._hidden_states,
            **{_CACHE_FIELD: cache},
        )
