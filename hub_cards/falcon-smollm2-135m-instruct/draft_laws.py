"""Logits of drafted tokens: the target's head over a pass's estimates, and the correction in the head's terms."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .few_rows import few_row_linear
from .target import head_weight, input_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_falcon_drafter import FalconDrafter


class DraftLaws:
    """The laws of one call's drafts.

    The head is linear, so that head (f^ + U s) = head f^ + (head U) s: a pass's estimates are multiplied by the head
    once, and each token chosen before costs a product with the ``[draft vocabulary, rank]`` matrix head U alone
    (held to the correction of the estimates by ``tests/runtime/test_draft_laws.py``).

    Args:
        drafter: gives draft vocabulary, correction and scale.
        target: gives head rows and embeddings.
    """

    def __init__(self, drafter: FalconDrafter, target: PreTrainedModel) -> None:
        self.drafter = drafter
        self.target = target
        self._head = drafter.draft_head(head_weight(target)).to(drafter.device, drafter.dtype)

    @functools.cached_property
    def _head_up(self) -> torch.Tensor:
        """``[draft vocabulary, rank]``, head U."""
        return self._head @ self.drafter.required_correction().up

    def products(self, estimates: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` estimates -> ``[..., draft vocabulary]``, for [`logits`] or to be corrected first."""
        return few_row_linear(estimates, self._head)

    def corrected(self, products: torch.Tensor, estimates: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Products corrected for the tokens ``[...]`` chosen before theirs.

        Args:
            products: ``[..., draft vocabulary]``, or of a shape that spreads to it.
            estimates: ``[..., H]``, what the products are of.
            before: ``[...]``.

        Raises:
            ValueError: as [`FalconDrafter.required_correction`].
        """
        embeddings = input_embeddings(self.target, before).to(estimates.device, estimates.dtype)
        strengths = self.drafter.required_correction().strengths(estimates, embeddings)
        return products + few_row_linear(strengths, self._head_up)

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """The logits of products, scaled and capped as the target's."""
        return self.drafter.scale_logits(products)
