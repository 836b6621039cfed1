"""Each family of ``TREE_FAMILIES``: a tree's logits are its paths', beside masks that are broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from falcon_hf.runtime.target import TREE_FAMILIES
from falcon_hf.runtime.target_session import TargetSession
from falcon_hf.runtime.tree_masks import TreeMasks, layer_kinds

from .families import FAMILIES, VOCAB, WINDOW, tiny_family
from .helpers import assert_same_text, break_masks, cache_error, prompt_ids, returned_cache

# A branch longer than the windows of 8, others off it at several depths, and more children at the root.
TREE = [[0] * depth for depth in range(1, 11)]
TREE += [[0, 1], [0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1, 0], *([rank] for rank in range(1, 12)), [1, 0], [1, 1]]


def class_of(family: str) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(family))]


# Some families have no sdpa attention at all (which ones depends on the version of transformers).
PAIRS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("eager", "sdpa")
    if attention == "eager" or class_of(family)._supports_sdpa
]
WINDOWED = [family for family in FAMILIES if set(layer_kinds(tiny_family(family).config)) != {"full_attention"}]


def test_every_family_served_is_tested():
    assert set(FAMILIES) == set(TREE_FAMILIES)


def test_windows_are_tested():
    assert len(WINDOWED) >= 6


class Rounds:
    """Keeps each verified tree with its logits, and holds them against each path alone, without a cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, Any, torch.Tensor]] = []
        plain = TargetSession.verify

        def verify(session: TargetSession, tree: Any, *args: Any) -> Any:
            length = session.committed.slots.length
            outputs = plain(session, tree, *args)
            self.seen.append((length, tree, outputs.logits))
            return outputs

        monkeypatch.setattr(TargetSession, "verify", verify)

    def error(self, model: Any, sequence: torch.Tensor) -> float:
        """Largest logit difference along any root-to-leaf path, over the largest logit; first and last rounds."""
        worst = 0.0
        for length, tree, logits in (self.seen[0], self.seen[1], self.seen[len(self.seen) // 2]):
            leaves = set(range(tree.size)) - set(tree.parents[0].tolist())
            for leaf in leaves:
                path = tree.ancestors[0, leaf].nonzero()[:, 0]
                ids = torch.cat((sequence[:, :length], tree.tokens[:, path]), dim=1)
                with torch.no_grad():
                    alone = model(ids, use_cache=False).logits[0, length:]
                worst = max(worst, float((logits[0, path] - alone).abs().max() / alone.abs().max()))
        return worst


@pytest.mark.parametrize(("family", "attention"), PAIRS)
def test_family(tiny_drafter, monkeypatch, family, attention):
    target = tiny_family(family, attention)
    drafter = tiny_drafter(target, 2, tree=TREE)
    rounds = Rounds(monkeypatch)
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    for length in (3, WINDOW + 5):
        rounds.seen.clear()
        out = assert_same_text(target, drafter, prompt_ids(VOCAB, length), **options)
        assert drafter.last_generation.accepted > 0
        # Rounding: granite does not scale its attention scores, so that it grows. The controls below see 1e-2.
        assert rounds.error(target, out.sequences) < 3e-4
        assert cache_error(target, out.sequences, returned_cache(out)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_comparison_sees_a_causal_mask(tiny_drafter, monkeypatch, family):
    """Every node sees all nodes before it, its own path or not."""
    target = tiny_family(family)
    break_masks(monkeypatch)
    rounds = Rounds(monkeypatch)
    drafter = tiny_drafter(target, 2, tree=TREE)
    out = target.generate(prompt_ids(VOCAB, 5), max_new_tokens=24, do_sample=False, assistant_model=drafter)
    assert rounds.error(target, out) > 1e-2


@pytest.mark.parametrize("family", WINDOWED)
def test_comparison_sees_a_forgotten_window(tiny_drafter, monkeypatch, family):
    target = tiny_family(family)
    monkeypatch.setattr(TreeMasks, "_in_reach", lambda self, kind, keys, queries: torch.ones_like(keys == queries))
    rounds = Rounds(monkeypatch)
    drafter = tiny_drafter(target, 2, tree=TREE)
    out = target.generate(prompt_ids(VOCAB, 5), max_new_tokens=24, do_sample=False, assistant_model=drafter)
    assert rounds.error(target, out) > 1e-2
