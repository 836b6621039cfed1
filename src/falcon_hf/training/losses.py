"""The losses: smooth-L1 on features, and KL and cross-entropy on token laws that never fill ``[tokens, vocabulary]``.

    L = feature_weight * SmoothL1(f, f^) + vocabulary_weight * (kl_weight * KL + ce_weight * CE)

with the paper's weights 1, 0.1, 0.9 and 0.1 by default (section 3.3). KL is KL(p || p^) of the target's law p, which
comes from the true feature through the target's head, over the draft vocabulary; CE is the cross-entropy of p's
likeliest token. Head and target are fixed, so the gradient with respect to f^ is ((kl + ce) p^ - kl p - ce onehot) W,
and is made in the forward, chunk by chunk, and the logits are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .fewer_shapes import makes_code_by_shape, padded_rows

if TYPE_CHECKING:
    from .laws import TargetLaws

CHUNK = 256
"""Rows whose laws are held at once: 8 MB each of logits in float32 at 8,192 tokens, which stays in a CPU's cache."""


@dataclass(frozen=True)
class DraftHead:
    """The target's head over the draft vocabulary: logits = cap * tanh(scale * (f W^T) / cap).

    Attributes:
        weight: ``[V', H]``, in the dtype its products shall be computed in.
        scale: logit scale.
        softcap: cap, or None for none.
    """

    weight: torch.Tensor
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """``[n, H]`` -> ``[n, V']``, in the weight's dtype."""
        logits = self._product(features.to(self.weight.dtype), self.weight.T)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def mixed_rows(self, shares: torch.Tensor) -> torch.Tensor:
        """``[n, V']`` shares of the head's rows -> their sums ``[n, H]``, in the weight's dtype."""
        return self._product(shares.to(self.weight.dtype), self.weight)

    def _product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not makes_code_by_shape(weight.device, weight.dtype):
            return torch.mm(rows, weight)
        return torch.mm(padded_rows(rows), weight)[: rows.shape[0]]

    @torch.no_grad()
    def likeliest(self, features: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
        """``[n, H]`` -> ``[n]``, places in the draft vocabulary of the likeliest tokens."""
        best = [self.logits(part).max(-1).indices for part in features.split(chunk)]
        return torch.cat(best) if best else torch.empty(0, dtype=torch.long, device=features.device)


def feature_loss(estimates: torch.Tensor, features: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Smooth-L1 of ``[n, H]`` estimates, mean over H and summed over the n rows."""
    raw = F.smooth_l1_loss(estimates.float(), features.float(), beta=beta, reduction="sum")
    return raw / max(features.shape[-1], 1)


def vocabulary_loss(
    estimates: torch.Tensor,
    features: torch.Tensor | TargetLaws,
    head: DraftHead,
    kl_weight: float = 0.9,
    ce_weight: float = 0.1,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kl_weight * KL + ce_weight * CE, summed over the rows.

    Args:
        estimates: ``[n, H]``, f^; the gradient goes here.
        features: ``[n, H]``, f: gives the target's law. Or what is needed of the laws (see ``laws.py``).
        head: the target's head over the draft vocabulary.
        kl_weight: weight of the divergence from the target's law.
        ce_weight: weight of the cross-entropy of its likeliest token.
        chunk: rows at a time.

    Returns:
        The loss; ``[2]`` KL and CE without their weights, summed, no gradient; ``[n]`` bool, whether the likeliest
        tokens of the two laws agree.
    """
    return _VocabularyLoss.apply(estimates, features, head, kl_weight, ce_weight, chunk)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        estimates: torch.Tensor,
        features: torch.Tensor | TargetLaws,
        head: DraftHead,
        kl_weight: float,
        ce_weight: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = estimates.shape[0]
        weight = head.weight
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        gradient = torch.empty(estimates.shape, dtype=weight.dtype, device=estimates.device)
        sums = torch.zeros(2, dtype=exact, device=estimates.device)
        agree = torch.empty(rows, dtype=torch.bool, device=estimates.device)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            drafted = head.logits(estimates[part])
            law = torch.softmax(drafted, -1, dtype=exact)
            best = drafted.max(-1)
            # log of a law's normaliser from its likeliest token, whose probability cannot underflow
            normaliser = best.values.to(exact) - law.gather(1, best.indices[:, None])[:, 0].log()
            if isinstance(features, torch.Tensor):
                wanted = head.logits(features[part])
                target_law = torch.softmax(wanted, -1, dtype=exact)
                target_best = wanted.max(-1)
                labels = target_best.indices
                target_normaliser = target_best.values.to(exact) - target_law.amax(-1).log()
                gap = torch.linalg.vecdot(target_law, (wanted - drafted).to(exact))
                sums[0] += (gap - target_normaliser + normaliser).sum()
                slope = law.mul_(kl_weight + ce_weight).sub_(target_law, alpha=kl_weight)
            else:
                labels = features.labels[part].long()
                means = features.mean_rows[part].to(exact)
                mean_logit = torch.linalg.vecdot(estimates[part].to(exact), means) * head.scale
                sums[0] += (features.negentropy[part] - mean_logit + normaliser).sum()
                slope = law.mul_(kl_weight + ce_weight)
            agree[part] = best.indices == labels
            label = labels[:, None]
            sums[1] += (normaliser - drafted.gather(1, label)[:, 0].to(exact)).sum()
            slope.scatter_add_(1, label, slope.new_full(label.shape, -ce_weight))
            if head.softcap is not None:
                slope *= 1 - (drafted.to(exact) / head.softcap) ** 2
            rows_of_head = head.mixed_rows(slope)
            if not isinstance(features, torch.Tensor):
                rows_of_head = rows_of_head - features.mean_rows[part].to(weight.dtype) * kl_weight
            gradient[part] = rows_of_head
        if head.scale != 1.0:
            gradient *= head.scale
        ctx.save_for_backward(gradient)
        ctx.dtype = estimates.dtype
        loss = kl_weight * sums[0] + ce_weight * sums[1]
        ctx.mark_non_differentiable(sums, agree)
        return loss, sums, agree

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.dtype) * slope.to(ctx.dtype), None, None, None, None, None
