"""What a drafter is worth on held-out text: losses, top-n accuracy a block position and pass, and acceptance length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..runtime.tree_shape import TreeShape
from .acceptance import MISSED, TreeTable, block_ranks, walk
from .batches import PairBatch
from .losses import CHUNK, DraftHead, feature_loss, vocabulary_loss

TOPS = (1, 3, 10)


@dataclass(frozen=True)
class EvaluationPlan:
    """What the passes of an evaluation are measured with.

    Attributes:
        shape: the tree whose acceptance is simulated.
        block_size: k.
        passes: how many passes to run; the tree's depth needs ceil(depth / k).
        head: the target's head over the draft vocabulary.
        draft_places: ``[V]``, each token's place in the draft vocabulary, -1 outside.
        correct: the drafter's ``correct``, if it corrects laws for the token before; the first pass's accuracy without
            it is measured too.
    """

    shape: TreeShape
    block_size: int
    passes: int
    head: DraftHead
    draft_places: torch.Tensor
    correct: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


class Tally:
    """Sums of an evaluation; ``values`` is one flat float64 tensor, so that processes can add theirs up.

    Args:
        plan: the plan.
        device: of the sums.
    """

    def __init__(self, plan: EvaluationPlan, device: torch.device) -> None:
        self._plan = plan
        # One group of counts a pass, and one for the corrected first pass.
        self._counts = (plan.passes + 1) * plan.block_size * (1 + len(TOPS))
        # losses: smooth-L1, KL, CE, positions; then tokens and rounds; then the counts
        self.values = torch.zeros(6 + self._counts, dtype=torch.float64, device=device)

    def counts(self) -> torch.Tensor:
        """``[passes + 1, k, 1 + len(TOPS)]``, a view: positions, and those with the answer among the top n."""
        return self.values[6:].view(self._plan.passes + 1, self._plan.block_size, 1 + len(TOPS))

    def add(self, group: int, ranks: torch.Tensor, places: torch.Tensor) -> None:
        """Count ranks ``[n]`` by their place ``[n]`` in the block."""
        for place in range(self._plan.block_size):
            mine = ranks[places == place]
            hits = [mine.new_tensor(len(mine)), *((mine < top).sum() for top in TOPS)]
            self.counts()[group, place] += torch.stack(hits).double()

    def metrics(self, prefix: str, weights: tuple[float, float, float]) -> dict[str, float]:
        """The report; ``weights`` of smooth-L1, KL and CE in the loss."""
        smooth, kl, ce, positions, tokens, rounds = self.values[:6].tolist()
        positions, rounds = max(positions, 1.0), max(rounds, 1.0)
        report = {
            f"{prefix}_loss": sum(a * b for a, b in zip(weights, (smooth, kl, ce), strict=True)) / positions,
            f"{prefix}_smooth_l1": smooth / positions,
            f"{prefix}_kl": kl / positions,
            f"{prefix}_ce": ce / positions,
            f"{prefix}_tau": max(tokens - rounds, 0.0) / rounds,
            f"{prefix}_tau_with_bonus": tokens / rounds,
        }
        names = [*(f"pass{number}" for number in range(1, self._plan.passes + 1)), "corrected"]
        for name, places in zip(names, self.counts().tolist(), strict=True):
            for place, (count, *hits) in enumerate(places, start=1):
                if count:
                    for top, hit in zip(TOPS, hits, strict=True):
                        report[f"{prefix}_{name}_position{place}_top{top}"] = hit / count
        return report


@torch.no_grad()
def answer_ranks(estimates: torch.Tensor, places: torch.Tensor, head: DraftHead, width: int) -> torch.Tensor:
    """``[n]``: rank, from 0, of each answer among the ``width`` likeliest tokens; [`MISSED`] if it is not there.

    Args:
        estimates: ``[n, H]``.
        places: ``[n]``, the answers' places in the draft vocabulary, -1 outside.
        head: the head over it.
        width: candidates to look at.
    """
    width = min(width, head.weight.shape[0])
    ranks = torch.full_like(places, MISSED)
    for start in range(0, len(places), CHUNK):
        part = slice(start, start + CHUNK)
        hits = head.logits(estimates[part]).topk(width, dim=-1).indices == places[part, None]
        ranks[part] = torch.where(hits.any(-1), hits.int().argmax(-1), MISSED)
    return ranks


@torch.no_grad()
def evaluate_batch(
    model: nn.Module,
    pairs: PairBatch,
    features: torch.Tensor,
    embed: Callable[[torch.Tensor], torch.Tensor],
    plan: EvaluationPlan,
    tally: Tally,
    beta: float,
) -> None:
    """Add a batch to the tally: every block alignment, so that a round may begin at any column.

    Args:
        model: the drafter, or a wrapper whose forward is the drafter's.
        pairs: the batch.
        features: ``[B, S, W]``, its input features in the drafter's dtype.
        embed: tokens ``[B, S]`` -> embeddings of the pairs.
        plan: the plan.
        tally: where to add.
        beta: of smooth-L1.
    """
    k, device = plan.block_size, features.device
    table = TreeTable(plan.shape)
    width = max(table.width, max(TOPS))
    embeddings = embed(pairs.tokens)
    rows, columns = pairs.tokens.shape
    places = plan.draft_places[pairs.answers]
    previous = None if plan.correct is None else embed(pairs.before).flatten(0, 1)
    accepted = torch.zeros(rows, columns, dtype=torch.long)
    column = torch.arange(columns, device=device)
    for offset in range(k):
        wanted = [pairs.learned]
        for _ in range(plan.passes - 1):  # a further pass reads estimates of learned columns only
            before = torch.zeros_like(pairs.learned)
            before[:, k:] = wanted[-1][:, :-k]
            wanted.append(pairs.learned & before)
        flat = [mask.flatten().nonzero()[:, 0] for mask in wanted]
        further: dict[str, Any] = {}
        if plan.passes > 1:
            further = {"rollout_embeddings": embeddings, "rollout_selects": flat[1:]}
        out = model(
            features=features,
            embeddings=embeddings,
            block_offset=torch.full((rows,), offset, device=device),
            pair_mask=pairs.real,
            **further,
        )
        first, *others = out if further else [out]
        estimates = [first.flatten(0, 1).index_select(0, flat[0]), *others]
        if offset == 0:  # one alignment is enough for the losses
            targets = pairs.targets.flatten(0, 1).index_select(0, flat[0])
            _, sums, _ = vocabulary_loss(estimates[0], targets, plan.head)
            smooth = feature_loss(estimates[0], targets, beta)
            tally.values[:4] += torch.stack([smooth.double(), *sums.double(), sums.new_tensor(len(targets)).double()])
        place = ((column + offset) % k).expand(rows, -1).flatten()
        pass_ranks = []
        for number, (estimate, index) in enumerate(zip(estimates, flat, strict=True)):
            ranks = answer_ranks(estimate, places.flatten().index_select(0, index), plan.head, width)
            tally.add(number, ranks, place.index_select(0, index))
            if plan.correct is not None and previous is not None:
                behind = place.index_select(0, index) > 0
                mine = index[behind]
                better = plan.correct(estimate[behind], previous.index_select(0, mine))
                ranks[behind] = answer_ranks(better, places.flatten().index_select(0, mine), plan.head, width)
                if number == 0:
                    tally.add(plan.passes, ranks[behind], place.index_select(0, mine))
            dense = torch.full((rows * columns,), MISSED, dtype=torch.long, device=device)
            pass_ranks.append(dense.index_copy_(0, index, ranks).view(rows, columns))
        begins = table.accepted(block_ranks(pass_ranks, k, min(table.depth, k * plan.passes)))
        starts = ((column + offset) % k == 0).cpu()
        accepted[:, starts] = begins[:, starts]
    tokens, rounds = walk(accepted, pairs.learned)
    tally.values[4:6] += torch.tensor([tokens, rounds], dtype=torch.float64, device=device)
