"""A step's loss: those of its passes and of the correction, weighted, as a mean over the positions of all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .arguments import FalconTrainingArguments
from .batches import PairBatch
from .laws import TargetLaws
from .losses import DraftHead, feature_loss, vocabulary_loss
from .training_notes import TrainingNotes


class StepLosses:
    """The losses of a training's steps (``losses.py`` has their formulas).

    Args:
        args: has the weights.
        head: the target's, over the draft vocabulary.
        notes: gets the parts of each loss.
        over_processes: adds a tensor up over all processes.
    """

    def __init__(
        self,
        args: FalconTrainingArguments,
        head: DraftHead,
        notes: TrainingNotes,
        over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._args, self._head, self._notes, self._over_processes = args, head, notes, over_processes

    def of(
        self,
        outputs: list[torch.Tensor],
        wanted: list[torch.Tensor],
        pairs: PairBatch,
        corrected: torch.Tensor | None,
        later: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of one batch, a scalar; accumulated batches count alike.

        Args:
            outputs: of each pass, the estimates ``[M_p, H]`` that have a loss.
            wanted: of each pass, their flat columns ``[M_p]``.
            pairs: the batch, with the answers.
            corrected: pass 1's estimates corrected for the token before them, if the drafter has a correction.
            later: ``[B, S]`` bool, the columns behind a block's first.
        """
        args = self._args
        targets = pairs.targets.flatten(0, 1)
        weights = [1.0] + [args.rollout_weight] * (len(outputs) - 1)
        counts = sum(weight * len(index) for weight, index in zip(weights, wanted, strict=True))
        # DDP averages gradients over processes, so each divides by the average count.
        shared = self._over_processes(torch.tensor(float(counts), device=targets.device)) / max(1, args.world_size)
        total = torch.zeros((), device=targets.device)
        for number, (estimates, index, weight) in enumerate(zip(outputs, wanted, weights, strict=True), start=1):
            features = targets.index_select(0, index)
            smooth = feature_loss(estimates, features, args.smooth_l1_beta)
            laws = features if pairs.laws is None else pairs.laws.take(index)
            vocabulary, divergence, agreement = self._vocabulary(estimates, laws)
            total = total + weight * (args.feature_weight * smooth + args.vocabulary_weight * vocabulary)
            prefix = "" if number == 1 else f"pass{number}_"
            means = {"smooth_l1": smooth.detach() / max(1, len(index)), "kl": divergence, "agreement": agreement}
            self._notes.add(**{prefix + name: value for name, value in means.items()})
        if corrected is not None:  # only behind a first position is there a token that a law does not know
            mine = later.flatten().index_select(0, wanted[0])
            index = wanted[0][mine]
            laws = targets.index_select(0, index) if pairs.laws is None else pairs.laws.take(index)
            vocabulary, divergence, agreement = self._vocabulary(corrected[mine], laws)
            total = total + args.vocabulary_weight * args.correction_weight * vocabulary
            self._notes.add(corrected_kl=divergence, corrected_agreement=agreement)
        self._notes.positions_seen += len(wanted[0])
        return total / shared.clamp_min(1)

    def _vocabulary(
        self, estimates: torch.Tensor, laws: torch.Tensor | TargetLaws
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of the estimates' vocabulary losses, and means of KL and of agreement in the likeliest token."""
        args, rows = self._args, max(1, len(estimates))
        loss, sums, agree = vocabulary_loss(
            estimates, laws, self._head, args.kl_weight, args.ce_weight, args.vocabulary_chunk
        )
        return loss, sums[0] / rows, agree.sum() / rows
