"""The roofline against published decode figures, and its shape."""

from __future__ import annotations

import pytest

from falcon_hf.tuning.errors import TuningError
from falcon_hf.tuning.roofline import GPUS, SHAPES, RooflineCosts, gpu_named, shape_named

# pytorch-labs/gpt-fast, README, "Benchmarks" and "Tensor Parallelism": A100 80 GB, bfloat16, batch 1, compiled.
GPT_FAST = [
    ("7B", 1, 104.9), ("7B", 2, 168.84), ("7B", 4, 254.02), ("7B", 8, 328.43),
    ("70B", 2, 21.32), ("70B", 4, 38.01), ("70B", 8, 62.50),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "gpus", "published"), GPT_FAST)
def test_gpt_fast_on_a100(shape, gpus, published):
    costs = RooflineCosts(shape_named(shape), gpu_named("a100-80gb"), 2, gpus, context=100)
    assert 1 / costs.plain_seconds == pytest.approx(published, rel=0.1)


def test_llama_8b_on_h100():
    """A card that nothing was fitted to: 5.1 ms a step in a CUDA graph, bfloat16.

    cloudai.pt, "CUDA Graphs + torch.compile", Llama 3.1 8B on H100 SXM5.
    """
    costs = RooflineCosts(shape_named("8B"), gpu_named("h100-sxm"), 2, context=100)
    assert 1000 * costs.plain_seconds == pytest.approx(5.1, rel=0.25)


def test_eager_transformers_on_a100():
    """24.2 ms a token, Llama-2-7B (Sequoia's baseline, together.ai's blog); bound by the host, whatever the card."""
    for gpu in ("a100-80gb", "h100-sxm"):
        costs = RooflineCosts(shape_named("7B"), gpu_named(gpu), 2, mode="eager", context=100)
        assert 1000 * costs.plain_seconds == pytest.approx(24.2, rel=0.05)


def test_no_card_decodes_faster_than_its_memory_delivers():
    for gpu in GPUS.values():
        for shape in SHAPES.values():
            if shape.read_weights * 2 < gpu.memory:
                costs = RooflineCosts(shape, gpu, 2)
                assert costs.plain_seconds > shape.read_weights * 2 / gpu.bandwidth


@pytest.mark.parametrize(
    ("name", "parameters"), [("1B", 1.03e9), ("7B", 6.61e9), ("8B", 7.50e9), ("13B", 12.85e9), ("70B", 68.7e9)]
)
def test_weights_read_are_the_models_without_the_embedding(name, parameters):
    """Parameter counts of TinyLlama-1.1B, Llama-2 and Llama-3.1-8B, minus their input embeddings."""
    assert shape_named(name).read_weights == pytest.approx(parameters, rel=0.01)


def test_verification_is_flat_until_arithmetic_binds():
    costs = RooflineCosts(shape_named("7B"), gpu_named("a100-80gb"), 2)
    assert costs.verify_seconds(64) == pytest.approx(costs.verify_seconds(1), rel=0.01)
    assert costs.verify_seconds(1024) > 4 * costs.verify_seconds(1)
    seconds = [costs.verify_seconds(nodes) for nodes in range(1, 512, 16)]
    assert seconds == sorted(seconds)


def test_drafts_cost_by_pass_block_size_and_vocabulary():
    def seconds(k=2, widths=(1,), **other):
        return RooflineCosts(shape_named("7B"), gpu_named("a100-80gb"), k, **other).draft_seconds(widths)

    assert seconds(widths=(1, 1, 1)) == pytest.approx(3 * seconds())
    assert seconds(k=4) > seconds(k=2) > seconds(k=1)
    assert seconds(draft_vocab=4096) < seconds()
    assert seconds(widths=()) == 0
    assert seconds() < RooflineCosts(shape_named("7B"), gpu_named("a100-80gb"), 2).plain_seconds / 3


def test_a_longer_context_costs_more():
    short, long = (RooflineCosts(shape_named("7B"), gpu_named("l40s"), 2, context=n) for n in (128, 4096))
    assert long.plain_seconds > short.plain_seconds
    assert long.draft_seconds((1,)) > short.draft_seconds((1,))


def test_names():
    assert gpu_named("H200").name == "h200"
    assert gpu_named("rtx-4").name == "rtx-4090"
    assert shape_named("7b").name == "7B"
    with pytest.raises(TuningError, match=r"no one GPU 'a100'.*a100-80gb"):
        gpu_named("a100")
    with pytest.raises(TuningError, match="no target shape '3B'"):
        shape_named("3B")


def test_what_does_not_fit_is_refused():
    with pytest.raises(TuningError, match="does not fit 1 a100-80gb; give 2"):
        RooflineCosts(shape_named("70B"), gpu_named("a100-80gb"), 2)
    with pytest.raises(TuningError, match="graph or eager"):
        RooflineCosts(shape_named("7B"), gpu_named("a100-80gb"), 2, mode="fast")
