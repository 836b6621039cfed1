"""Drafters that read several of the target's hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .helpers import assert_same_text, bushy_tree, prompt_ids

VOCAB = 24
LAYERS = [1, 2]


@pytest.fixture
def pair(tiny_target: Any, tiny_drafter: Any) -> tuple[Any, Any]:
    target = tiny_target(VOCAB)
    return target, tiny_drafter(target, feature_layers=LAYERS, tree=bushy_tree(VOCAB, 3, 6))


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.9}])
def test_the_text_stays_the_targets(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    target, drafter = pair
    assert_same_text(target, drafter, prompt_ids(VOCAB, 7), max_new_tokens=20, **options)
    assert drafter.last_generation.accepted > 0


def test_the_drafter_gets_the_states_of_the_committed_tokens(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = pair
    given: list[torch.Tensor] = []
    combine = drafter.combine

    def watched(features: torch.Tensor) -> torch.Tensor:
        given.append(features)
        return combine(features)

    monkeypatch.setattr(drafter, "combine", watched)
    prompt = prompt_ids(VOCAB, 7)
    text = target.generate(prompt, assistant_model=drafter, max_new_tokens=20, do_sample=False)
    got = torch.cat(given, dim=1)
    with torch.no_grad():
        states = target(text[:, : got.shape[1]], output_hidden_states=True).hidden_states
    torch.testing.assert_close(got, torch.cat([states[layer] for layer in LAYERS], dim=-1), atol=1e-4, rtol=1e-4)
    other = torch.cat([states[layer] for layer in (0, 2)], dim=-1)  # the control: another layer's states
    assert not torch.allclose(got, other, atol=1e-2)


def test_channels_are_brought_to_one_size(tiny_target: Any, tiny_drafter: Any) -> None:
    drafter = tiny_drafter(tiny_target(VOCAB), feature_layers=LAYERS)
    size = drafter.config.hidden_size
    sample = torch.randn(500, 2 * size, generator=torch.Generator().manual_seed(0))
    sample[:, :size] = sample[:, :size] * 100 + 30
    drafter.standardise(sample)
    seen: list[torch.Tensor] = []
    handle = drafter.feature_fusion.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        drafter.combine(sample[None])
    handle.remove()
    (joined,) = seen
    torch.testing.assert_close(joined[0, :, :size].mean(0), torch.zeros(size), atol=1e-4, rtol=0)
    torch.testing.assert_close(joined[0, :, :size].std(0), torch.ones(size), atol=1e-4, rtol=0)
    torch.testing.assert_close(joined[0, :, size:], sample[:, size:])  # the last layer's as they are
