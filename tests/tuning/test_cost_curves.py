"""Cost curves on random weights: the shape that was asked for is the shape that is timed."""

from __future__ import annotations

import pytest
import torch

from falcon_hf.tuning.cost_curves import measure_curves, random_target
from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.roofline import TargetShape

SHAPE = TargetShape("tiny", 2, 64, 4, 2, 96, 128)


def test_random_target_has_the_shapes_weights():
    target = random_target(SHAPE, torch.device("cpu"), torch.bfloat16, 64)
    assert target.dtype == torch.bfloat16
    norms = (2 * SHAPE.layers + 1) * SHAPE.hidden
    assert target.num_parameters() == SHAPE.read_weights + SHAPE.hidden * SHAPE.vocab + norms
    assert torch.get_default_dtype() == torch.float32


def test_a_context_of_nothing_is_refused():
    with pytest.raises(TuningError, match="at least one token, got 0"):
        measure_curves(SHAPE, (1,), torch.device("cpu"), torch.float32, (8, 0), 2, 1)


def test_curves():
    state = torch.get_rng_state()
    found = measure_curves(SHAPE, (1, 2), torch.device("cpu"), torch.float32, (8, 16), 2, 1, nodes=(1, 4))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert [(time["context"], time["nodes"]) for time in found["verify_times"]] == [(8, 1), (8, 4), (16, 1), (16, 4)]
    assert set(found["drafts_by_block_size"]) == {"1", "2"}
    widths = {(time["passes"], time["width"]) for time in found["drafts_by_block_size"]["2"]["times"]}
    assert widths == {(1, 1), (2, 1), (2, 2), (2, 4), (2, 8), (2, 16)}
    assert found["plain_seconds"] > 0
    assert found["plain_context"] == 24
    assert found["shape"]["name"] == "tiny"
