"""Windows and chunks go by a token's place among the slots of plain decoding, also where a prompt has gaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from falcon_hf.runtime.target_slots import CachedSlots

from .families import VOCAB, WINDOW, tiny_family
from .helpers import bushy_tree, prompt_ids, run

TREE = bushy_tree(VOCAB, 3, 12)


def with_gaps(rows: int) -> dict[str, Any]:
    """Prompts of 20 tokens, masked at the left and twice in the middle, within a window of the end."""
    ids = torch.cat([prompt_ids(VOCAB, 20, seed) for seed in range(rows)])
    mask = torch.ones_like(ids)
    mask[:, 15:17] = 0
    mask[-1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gap(target: Any, drafter: Any, rows: int) -> tuple[bool, float]:
    """Whether the texts are the same, and the largest difference of logits up to where they part."""
    options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True}
    plain, _ = run(target, 0, with_gaps(rows), **options)
    falcon, _ = run(target, 0, with_gaps(rows), assistant_model=drafter, **options)
    largest = 0.0
    for row in range(rows):
        for step in range(20):
            a, b = plain.logits[step][row], falcon.logits[step][row]
            largest = max(largest, float((a - b).abs().max() / a.std()))
            if plain.sequences[row, 20 + step] != falcon.sequences[row, 20 + step]:
                break
    return torch.equal(plain.sequences, falcon.sequences), largest


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "llama4_text"])
def test_a_gap_within_a_prompt(tiny_drafter, family, rows):
    target = tiny_family(family)
    same, largest = gap(target, tiny_drafter(target, tree=TREE), rows)
    assert same
    assert largest < 1e-4


def test_by_position_it_would_be_another_text(tiny_drafter, monkeypatch):
    target = tiny_family("mistral")
    assert target.config.sliding_window == WINDOW
    noted = CachedSlots.__init__

    def by_position(self: Any, valid: torch.Tensor, next_position: torch.Tensor) -> None:
        noted(self, valid, next_position)
        self.place, self._ahead = (valid.long().cumsum(-1) - 1).clamp_min(0), torch.zeros_like(self._ahead)

    monkeypatch.setattr(CachedSlots, "__init__", by_position)
    assert gap(target, tiny_drafter(target, tree=TREE), 1)[1] > 1e-3
