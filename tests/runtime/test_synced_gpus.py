"""``synced_gpus``: a device that has finished keeps running forwards until all have, and they leave no trace."""

from __future__ import annotations

import torch

from .helpers import cache_error, prompt_ids, returned_cache


def test_idle_forwards_are_run_and_leave_no_trace(tiny_target, tiny_drafter, monkeypatch):
    target = tiny_target()
    drafter = tiny_drafter(target)
    ids = prompt_ids(24, 7)
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    waits = 3
    forwards = 0

    def unfinished(finished, synced_gpus, device):
        nonlocal waits
        assert synced_gpus
        if finished:
            waits -= 1
        return waits >= 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    monkeypatch.setattr(target, "_has_unfinished_sequences", unfinished)
    with target.register_forward_pre_hook(count):
        output = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            assistant_model=drafter,
            synced_gpus=True,
            return_dict_in_generate=True,
        )
    assert output.sequences.tolist() == plain.tolist()
    assert forwards == 1 + drafter.last_generation.rounds + 3
    assert cache_error(target, output.sequences, returned_cache(output)) < 1e-4
