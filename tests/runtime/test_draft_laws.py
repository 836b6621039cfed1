"""Laws of a draft: corrected through the head, they are the head's over corrected estimates."""

import pytest
import torch

from falcon_hf.runtime.draft_laws import DraftLaws
from falcon_hf.runtime.target import head_weight, input_embeddings

from .helpers import with_correction

VOCAB = 32


@pytest.mark.parametrize(
    "settings", [{}, {"draft_vocab_size": 12}, {"logit_scale": 0.5, "logit_softcap": 2.0}], ids=str
)
def test_products_are_corrected_as_estimates_are(tiny_target, tiny_drafter, settings):
    """The control is the same law for another token before."""
    target = tiny_target(VOCAB).double()
    drafter = with_correction(tiny_drafter(target, 2, correction_rank=4, **settings)).double()
    generator = torch.Generator().manual_seed(0)
    estimates = torch.randn(2, 3, drafter.config.hidden_size, generator=generator, dtype=torch.float64)
    before = torch.randint(VOCAB, (2, 3), generator=generator)
    laws = DraftLaws(drafter, target)
    with torch.no_grad():
        own = laws.logits(laws.corrected(laws.products(estimates), estimates, before))
        better = drafter.correct(estimates, input_embeddings(target, before))
        expected = drafter.logits(better, drafter.draft_head(head_weight(target)))
        other = laws.logits(laws.corrected(laws.products(estimates), estimates, (before + 1) % VOCAB))
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(other, expected, rtol=1e-2)


def test_one_estimate_spreads_over_the_tokens_before(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB).double()
    drafter = with_correction(tiny_drafter(target, 2, correction_rank=4)).double()
    estimate = torch.randn(1, 1, drafter.config.hidden_size, dtype=torch.float64)
    before = torch.arange(5)[None]
    laws = DraftLaws(drafter, target)
    with torch.no_grad():
        spread = laws.corrected(laws.products(estimate), estimate.expand(-1, 5, -1), before)
        alone = [laws.corrected(laws.products(estimate), estimate, before[:, i : i + 1]) for i in range(5)]
    torch.testing.assert_close(spread, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)


def test_a_drafter_without_a_correction_corrects_nothing(tiny_target, tiny_drafter):
    target = tiny_target(VOCAB)
    drafter = tiny_drafter(target, 2)
    laws, estimates = DraftLaws(drafter, target), torch.zeros(1, 1, drafter.config.hidden_size)
    with pytest.raises(ValueError, match="correction_rank"):
        laws.corrected(laws.products(estimates), estimates, torch.zeros(1, 1, dtype=torch.long))
