"""The text of one row as it grows: how a token is chosen, recorded, and when the text ends.

Mirrors, token by token, what transformers' ``GenerationMixin._sample`` does between two forwards; nothing here knows
of trees or drafts. A batch is a list of rows, because rows advance by different numbers of tokens a round.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .draws import Draws

# They count their calls as steps of the whole batch.
_STEPWISE = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def check_processors(rows: int, processors: LogitsProcessorList) -> None:
    """Refuse processors that keep a state from call to call for a batch, whose rows are processed one by one.

    Raises:
        ValueError: with the remedy.
    """
    for processor in processors:
        if rows > 1 and isinstance(processor, _STEPWISE):
            option = "guidance_scale" if isinstance(processor, _STEPWISE[1]) else "watermarking_config"
            raise ValueError(
                f"{option} counts the steps of a whole batch, and with a drafter the rows of a batch take theirs one "
                "by one: generate the rows one by one, or drop assistant_model."
            )


class Emission:
    """Emits one row's tokens, one by one.

    Attributes:
        ids: ``[1, P + emitted]``, prompt and text so far.
        ended: whether the text has ended.
        scores, logits: one ``[1, V]`` an emitted token, or None where not asked for.
        hidden_states: one tuple of ``[1, 1, H]`` (one a layer) an emitted token but the first, or None.
        attentions: one tuple of ``[1, heads, 1, width]`` (one a layer) an emitted token but the first, or None.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        row: int,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        draws: Draws,
    ) -> None:
        """``input_ids`` ``[B, P]``, of which this is row ``row``; ``draws`` is the batch's; the rest as prepared."""
        self.ids = input_ids[row : row + 1]
        self.ended = False
        self._row, self._rows = row, input_ids.shape[0]
        self._prompt_length = input_ids.shape[1]
        self._processor = logits_processor
        if self._rows > 1:
            self._processor = LogitsProcessorList([_asking_own_row(each, row) for each in logits_processor])
        self._criteria = stopping_criteria
        # transformers' own criteria judge each row by itself; others may go by its place in the batch. All are asked
        # once a row and token, where plain decoding asks once a step.
        self._needs_place = self._rows > 1 and any(
            not type(criterion).__module__.startswith("transformers.") for criterion in stopping_criteria
        )
        self._config = generation_config
        self._draws = draws

        def record(wanted: bool | None) -> list[Any] | None:
            return [] if generation_config.return_dict_in_generate and wanted else None

        self.scores = record(generation_config.output_scores)
        self.logits = record(generation_config.output_logits)
        self.hidden_states = record(generation_config.output_hidden_states)
        self.attentions = record(generation_config.output_attentions)

    @property
    def new_tokens(self) -> int:
        """How many tokens have been emitted."""
        return self.ids.shape[1] - self._prompt_length

    @property
    def budget(self) -> int:
        """How many more tokens may be emitted."""
        return self._config.max_length - self.ids.shape[1]

    @property
    def is_plain_greedy(self) -> bool:
        """Whether a token is just the argmax, with nothing to process or record."""
        recorded = (self.scores, self.logits, self.hidden_states, self.attentions)
        return not self._config.do_sample and len(self._processor) == 0 and all(kept is None for kept in recorded)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token ``[1]`` from the target's logits ``[1, V]``: processed, recorded, then argmax or one draw."""
        scores = self._score(logits)
        if self._config.do_sample:
            return self._draws.draw(scores.softmax(dim=-1), self._row, self.new_tokens)
        return scores.argmax(dim=-1)

    def law(self, logits: torch.Tensor) -> torch.Tensor:
        """The law ``[1, V]`` that the next token is to have, from the target's logits: processed and recorded."""
        return self._score(logits).softmax(dim=-1)

    def _score(self, logits: torch.Tensor) -> torch.Tensor:
        """Processed scores ``[1, V]`` in float32; recorded as the user asked."""
        # A copy in float32, as plain decoding makes one: processors may write into it.
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._process(logits)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        return scores

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Run the processors on this row. Some look at the batch index, so the row stands at its own place."""
        if self._rows == 1 or len(self._processor) == 0:
            return self._processor(self.ids, logits)
        scores = self._processor(self.ids.repeat(self._rows, 1), logits.repeat(self._rows, 1))
        return scores[self._row : self._row + 1]

    def commit(self, token: torch.Tensor) -> torch.Tensor:
        """Append ``token`` ``[1]`` and return whether the text ends with it (a scalar bool tensor, no sync)."""
        self.ids = torch.cat((self.ids, token.to(self.ids.device)[:, None]), dim=-1)
        if not self._needs_place:
            return self._criteria(self.ids, None if self.scores is None else tuple(self.scores)).all()
        scores = None if self.scores is None else tuple(step.repeat(self._rows, 1) for step in self.scores)
        return self._criteria(self.ids.repeat(self._rows, 1), scores)[self._row]

    def record_hidden_states(self, states: tuple[torch.Tensor, ...], node: int) -> None:
        """Keep a verified node's hidden states, from ``[B, N, H]`` a layer, if the user asked for them."""
        if self.hidden_states is not None:
            # Copies: a view would keep the states of the whole tree.
            self.hidden_states.append(tuple(s[self._row : self._row + 1, node : node + 1].clone() for s in states))


def _asking_own_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A ``prefix_allowed_tokens_fn`` is not asked about other rows with this row's text, which they never have."""
    if not isinstance(processor, PrefixConstrainedLogitsProcessor):
        return processor
    allowed, rows_a_prompt = processor._prefix_allowed_tokens_fn, processor._num_beams
    own = row // rows_a_prompt

    def ask(prompt: int, ids: torch.Tensor) -> list[int]:
        return allowed(prompt, ids) if prompt == own else [0]

    return PrefixConstrainedLogitsProcessor(ask, rows_a_prompt)
