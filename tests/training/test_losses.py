"""The losses, against their definition written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_hf.training.laws import compute_laws
from falcon_hf.training.losses import DraftHead, feature_loss, vocabulary_loss


def head_of(scale=1.0, softcap=None, size=11, width=5, dtype=torch.double):
    weight = torch.randn(size, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return DraftHead(weight, scale, softcap)


def features_of(rows=7, width=5, seed=2):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=random).double() for _ in range(2)]


def definition(estimates, features, head, kl_weight, ce_weight):
    """KL(p || p^) and the cross-entropy of p's likeliest token, as torch has them."""
    drafted, wanted = ((of @ head.weight.T) * head.scale for of in (estimates, features))
    if head.softcap is not None:
        drafted, wanted = (head.softcap * torch.tanh(of / head.softcap) for of in (drafted, wanted))
    kl = F.kl_div(drafted.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
    ce = F.cross_entropy(drafted, wanted.argmax(-1), reduction="sum")
    return kl_weight * kl + ce_weight * ce, kl, ce, drafted.argmax(-1) == wanted.argmax(-1)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.3, 2.0)])
def test_cached_laws_give_the_same(scale, weights):
    head = head_of(scale)
    estimates, features = features_of()
    estimates.requires_grad_()
    laws = compute_laws(features, head, 3)
    results = []
    for of in (features, laws, laws.take(torch.arange(7))):
        loss, sums, agree = vocabulary_loss(estimates, of, head, *weights, 2)
        results.append((loss, sums, agree, *torch.autograd.grad(loss, estimates)))
    for other in results[1:]:
        assert all(torch.allclose(a, b) for a, b in zip(results[0], other, strict=True))
    with pytest.raises(ValueError, match="softcap"):
        compute_laws(features, head_of(1.0, 2.0))


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("weights", [(0.9, 0.1), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_value_and_gradient_are_the_definitions(scale, softcap, weights):
    head = head_of(scale, softcap)
    estimates, features = features_of()
    estimates.requires_grad_()
    expected, kl, ce, agree = definition(estimates, features, head, *weights)
    (expected_gradient,) = torch.autograd.grad(expected * 0.37, estimates)
    for chunk in (1, 3, 256):
        loss, sums, same = vocabulary_loss(estimates, features, head, *weights, chunk)
        (gradient,) = torch.autograd.grad(loss * 0.37, estimates)
        assert torch.allclose(loss, expected)
        assert torch.allclose(sums, torch.stack([kl, ce]).detach())
        assert torch.equal(same, agree)
        assert torch.allclose(gradient, expected_gradient)
        assert torch.equal(head.likeliest(estimates.detach(), chunk), (estimates @ head.weight.T).argmax(-1))


def test_gradcheck():
    estimates, features = features_of(4)
    head = head_of(0.7, 3.0)
    assert torch.autograd.gradcheck(
        lambda of: vocabulary_loss(of, features, head, 0.9, 0.1, 3)[0], estimates.requires_grad_(), eps=1e-6
    )


def test_divergence_of_equal_laws_is_zero_and_large_logits_are_finite():
    head = head_of(dtype=torch.float32)
    features = torch.randn(6, 5) * 200
    estimates = features.clone().requires_grad_()
    loss, sums, agree = vocabulary_loss(estimates, features, head, 1.0, 0.0)
    loss.backward()
    assert agree.all()
    assert float(sums[0].abs()) < 1e-2
    assert estimates.grad.abs().max() < 1e-3
    far, _, _ = vocabulary_loss(-estimates, features, head)
    assert far.isfinite()


def test_bfloat16_is_close_to_exact():
    exact, rough = head_of(size=300, width=64), head_of(size=300, width=64, dtype=torch.bfloat16)
    estimates, features = features_of(40, 64)
    one, other = estimates.clone().requires_grad_(), estimates.clone().requires_grad_()
    expected, loss = vocabulary_loss(one, features, exact)[0], vocabulary_loss(other, features, rough)[0]
    (expected / 40).backward()
    (loss / 40).backward()
    assert float(loss) == pytest.approx(float(expected), rel=0.01)
    assert float(F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0)) > 0.999


def test_no_rows_are_no_loss():
    head = head_of()
    empty = torch.zeros(0, 5, dtype=torch.double, requires_grad=True)
    loss, sums, agree = vocabulary_loss(empty, empty.detach(), head)
    loss.backward()
    assert float(loss) == 0
    assert sums.tolist() == [0, 0]
    assert agree.shape == (0,)
    assert float(feature_loss(empty, empty.detach())) == 0
    assert head.likeliest(empty.detach()).shape == (0,)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_laws_of_all_rows_are_never_held():
    head = head_of(size=500, width=8)
    estimates, features = features_of(200, 8)
    estimates.requires_grad_()
    for chunk, bound in ((16, 16 * 500), (1000, 200 * 500)):  # the second: the measure would notice
        with LargestTensor() as largest:
            vocabulary_loss(estimates, features, head, 0.9, 0.1, chunk)[0].backward()
            head.likeliest(estimates.detach(), chunk)
        assert largest.elements == bound


def test_feature_loss_is_smooth_l1_mean_over_width():
    estimates, features = features_of()
    expected = F.smooth_l1_loss(estimates.float(), features.float(), beta=0.5, reduction="none").mean(-1).sum()
    assert torch.allclose(feature_loss(estimates, features, 0.5), expected)
