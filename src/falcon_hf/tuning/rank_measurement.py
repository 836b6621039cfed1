"""Rank records: the drafter drafts along the target's own greedy text, at every position.

For a root at token n of the text, pass by pass along the true continuation (teacher forcing): the rank of token n + d
in the law of depth d. The first pass reads what the target would have given by then; each further pass reads the
drafter's own features and the true tokens, which is what it reads in a tree whose boundary node carries those tokens.
So a record says exactly which nodes of any tree would have been accepted there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..measured_calls import padding_token
from ..runtime.candidate_generator import FalconCandidateGenerator
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.tree_shape import chain
from .acceptance import MISS, RankRecord
from .confidence import ConfidenceCounts, ConfidenceTables
from .errors import TuningError


@dataclass(frozen=True)
class GreedyText:
    """A prompt and the target's greedy answer.

    Attributes:
        ids: ``[1, L]``, both.
        prompt_length: P.
        states: hidden states by number (-1 the last), ``[1, L, H]`` each: those that were asked for.
    """

    ids: torch.Tensor
    prompt_length: int
    states: Mapping[int, torch.Tensor]

    @property
    def answer_length(self) -> int:
        """Tokens of the answer."""
        return self.ids.shape[1] - self.prompt_length

    def features(self, drafter: FalconDrafter) -> torch.Tensor:
        """``[1, L, W]``, what this drafter reads of the target."""
        return torch.cat([self.states[layer] for layer in feature_layers(drafter)], dim=-1)


def feature_layers(drafter: FalconDrafter) -> list[int]:
    """Numbers of the hidden states that make a drafter's features."""
    return drafter.config.feature_layers or [-1]


@torch.no_grad()
def greedy_text(
    target: PreTrainedModel, prompt: torch.Tensor, max_new_tokens: int, layers: Iterable[int] = (-1,)
) -> GreedyText:
    """Answer ``prompt`` ``[1, P]`` greedily, without a drafter, and keep the hidden states of ``layers``.

    Penalties and other processors of the target's own generation config apply, as they do in ``generate()``.
    """
    prompt = prompt.to(target.device)
    ids = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding_token(target),
    )
    outputs = target(ids, use_cache=False, output_hidden_states=True)
    return GreedyText(ids, prompt.shape[1], {layer: outputs.hidden_states[layer] for layer in layers})


class PathDrafter(FalconCandidateGenerator):
    """Drafts along a given text instead of its own likeliest tokens."""

    def laws(self, path: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits ``[k, draft vocabulary]`` of each pass along ``path`` ``[1, D + 1]``: the root and D tokens.

        The context is left as it was.
        """
        plan = self._plan(chain(path.shape[1] - 1), path.shape[1] - 1)
        path = path.to(self.context.device)
        features, states = self.context.first_pass()
        for index, draft_pass in enumerate(plan.passes):
            if index > 0:
                features, states = self._next_pass(draft_pass, path, features, states)
            estimates = features[0]
            products = self._laws.products(estimates)
            if self.drafter.correction is not None:
                behind = path[0, index * self.block_size :][1 : self.block_size]  # tokens before positions 2 to k
                products = torch.cat((products[:1], self._laws.corrected(products[1:], estimates[1:], behind)))
            yield self._laws.logits(products).float()
        self.context.forget_tree()


@dataclass(frozen=True)
class RankMeasurement:
    """A record, and how the chance of acceptance follows from the drafter's probability (see ``confidence.py``)."""

    record: RankRecord
    confidence: ConfidenceTables


@torch.no_grad()
def measure_ranks(
    target: PreTrainedModel, drafter: FalconDrafter, texts: Sequence[GreedyText], passes: int, width: int
) -> RankMeasurement:
    """Record the ranks of the true tokens.

    Args:
        target: gives embeddings and head.
        drafter: on the target's device, in its dtype.
        texts: at least one with two answer tokens.
        passes: m; the record has depth m * k.
        width: W, ranks to tell apart; cut to the draft vocabulary.

    Raises:
        TuningError: if no text has an answer to record.
    """
    k = drafter.config.block_size
    depth = passes * k
    width = min(width, drafter.config.draft_vocab_size or drafter.config.vocab_size)
    records = []
    counts = ConfidenceCounts(depth)
    for text in texts:
        length = text.ids.shape[1]
        if length - text.prompt_length < 2:
            continue
        generator = PathDrafter(drafter, target, chain(depth))
        root = text.prompt_length  # the first answer token is the prefill's; it is the first round's root
        features = text.features(drafter)
        generator.append(features[:, :root], text.ids[:, 1 : root + 1])
        # Behind the end anything will do: those ranks are overwritten below.
        padded = torch.cat((text.ids, text.ids[:, -1:].expand(1, depth)), dim=1)
        ranks, chances = [], []
        while root < length - 1:
            rank, chance = _rank(generator, drafter, padded[:, root : root + depth + 1], width)
            ranks.append(rank)
            chances.append(chance)
            generator.append(features[:, root : root + 1], text.ids[:, root + 1 : root + 2])
            root += 1
        # One transfer a text. A token behind the end cannot be accepted.
        array = torch.stack(ranks).cpu().numpy().copy()
        known = (length - 1) - (text.prompt_length + np.arange(len(array)))  # tokens left behind each root
        array[np.arange(depth)[None] >= known[:, None]] = MISS
        records.append(array)
        counts.add(array, torch.stack(chances).cpu().numpy(), known)
    if not records:
        raise TuningError("No prompt got an answer of two tokens or more: give other prompts, or more new tokens.")
    return RankMeasurement(RankRecord(k, width, tuple(records)), counts.tables(k))


def _rank(
    generator: PathDrafter, drafter: FalconDrafter, path: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[D]`` ranks of the path's tokens, MISS from ``width`` on, and ``[D, width]`` log probabilities of all ranks."""
    logits = torch.cat(list(generator.laws(path)))  # [D, draft vocabulary]
    chances, top = logits.log_softmax(-1).topk(width, dim=-1)
    tokens = top if drafter.draft_vocab_ids is None else drafter.draft_vocab_ids[top]
    hit = tokens == path[0, 1:, None].to(tokens.device)
    return torch.where(hit.any(-1), hit.int().argmax(-1), MISS), chances
