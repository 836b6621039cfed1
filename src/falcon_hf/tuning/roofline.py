"""Costs of a round on a GPU that is not at hand: a roofline from the target's shape.

    forward over N tokens = max(bytes / bandwidth, operations / rate) + a fixed time a layer

Bytes are the weights, read once, and the cached keys and values; operations are 2 a weight and token, and attention's.
A forward is bound by bandwidth until N reaches some hundred tokens, which is why a tree verifies almost for free.

What is fitted, all to one table (see ``tests/tuning/test_roofline.py``): 80% of the data sheet's bandwidth, 20
microseconds a layer of launches and small kernels in a captured graph, and 40 more where the layer is split over
several GPUs, for two all-reduces. They reproduce gpt-fast's published decode rates on A100 80 GB in bfloat16
(pytorch-labs/gpt-fast, README, 7B on 1, 2, 4, 8 GPUs: 104.9, 168.8, 254.0, 328.4 tokens/s; 70B on 2, 4, 8: 21.3, 38.0,
62.5) to 10%. Without graphs the host's launches bound a layer: 0.75 ms, from 24.2 ms a token of transformers' 7B llama
on A100 (Sequoia's baseline, together.ai's blog). 60% of the data sheet's arithmetic rate is an assumption.

Data sheets: NVIDIA's for A100, H100, H200, L4, L40S, A10 and the GA102/AD102 white papers for the GeForce cards;
dense bfloat16 with float32 accumulation, GB as 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import TuningError

_BYTES = 2  # bfloat16
_BANDWIDTH_SHARE = 0.8
_RATE_SHARE = 0.6
_GRAPH_SECONDS = 20e-6
_SPLIT_SECONDS = 40e-6
_EAGER_SECONDS = 0.75e-3
# Kernels a drafter's LSTM launches for each of its k steps, per layer, as parts of a target's layer.
_LSTM_STEP_SHARE = 0.25


@dataclass(frozen=True)
class GPU:
    """A device: memory bandwidth in bytes/s, dense bfloat16 operations/s, memory in bytes."""

    name: str
    bandwidth: float
    rate: float
    memory: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40gb", 1555e9, 312e12, 40e9),
        GPU("a100-80gb", 2039e9, 312e12, 80e9),
        GPU("h100-sxm", 3350e9, 989.4e12, 80e9),
        GPU("h100-pcie", 2000e9, 756e12, 80e9),
        GPU("h200", 4800e9, 989.4e12, 141e9),
        GPU("l4", 300e9, 121e12, 24e9),
        GPU("l40s", 864e9, 362e12, 48e9),
        GPU("a10", 600e9, 125e12, 24e9),
        GPU("rtx-3090", 936e9, 71e12, 24e9),
        GPU("rtx-4090", 1008e9, 165.2e12, 24e9),
    )
}


@dataclass(frozen=True)
class TargetShape:
    """A decoder-only target with gated MLPs; heads and vocabulary as in its config."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer."""
        kv_width = self.hidden // self.heads * self.kv_heads
        return 2 * self.hidden * self.hidden + 2 * self.hidden * kv_width + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights of the LM head; the embedding is looked up, not read."""
        return self.hidden * self.vocab

    @property
    def read_weights(self) -> int:
        """Weights that one forward reads."""
        return self.layers * self.layer_weights + self.head_weights

    def cache_bytes(self, context: int) -> int:
        """Keys and values of so many tokens."""
        return 2 * self.layers * (self.hidden // self.heads) * self.kv_heads * context * _BYTES


# TinyLlama-1.1B, Llama-2-7B, Llama-3.1-8B, Llama-2-13B, Llama-2-70B (their config.json).
SHAPES = {
    shape.name: shape
    for shape in (
        TargetShape("1B", 22, 2048, 32, 4, 5632, 32000),
        TargetShape("7B", 32, 4096, 32, 32, 11008, 32000),
        TargetShape("8B", 32, 4096, 32, 8, 14336, 128256),
        TargetShape("13B", 40, 5120, 40, 40, 13824, 32000),
        TargetShape("70B", 80, 8192, 64, 8, 28672, 32000),
    )
}


def gpu_named(name: str) -> GPU:
    """A GPU by name; the beginning of a name will do if it is only one's.

    Raises:
        TuningError: if there is none or more than one.
    """
    found = [gpu for key, gpu in GPUS.items() if key == name.lower()]
    found = found or [gpu for key, gpu in GPUS.items() if key.startswith(name.lower())]
    if len(found) != 1:
        raise TuningError(f"There is no one GPU {name!r}; known are {', '.join(GPUS)}.")
    return found[0]


def shape_named(name: str) -> TargetShape:
    """A target's shape by name.

    Raises:
        TuningError: if there is none.
    """
    if name.upper() not in SHAPES:
        raise TuningError(f"There is no target shape {name!r}; known are {', '.join(SHAPES)}.")
    return SHAPES[name.upper()]


@dataclass(frozen=True)
class RooflineCosts:
    """Costs of a round (see ``choice.Costs``): target and drafter on ``gpus`` GPUs of one kind, batch 1, bfloat16.

    The drafter is one decoder layer of the target's shape and two LSTM layers, whose recurrent weights are read at each
    of the k steps; it drafts over ``draft_vocab`` tokens of the head and lies on one GPU.

    Attributes:
        shape: of the target.
        gpu: the device.
        block_size: k.
        gpus: how many share the target's layers (tensor parallelism).
        context: tokens in the cache.
        mode: ``graph`` (compiled or captured) or ``eager``.
        draft_vocab: tokens drafted over; the whole vocabulary by default.
    """

    shape: TargetShape
    gpu: GPU
    block_size: int
    gpus: int = 1
    context: int = 512
    mode: str = "graph"
    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("graph", "eager"):
            raise TuningError(f"The mode is graph or eager, not {self.mode!r}.")
        if self.shape.read_weights * _BYTES > self.gpu.memory * self.gpus:
            need = -(-self.shape.read_weights * _BYTES // int(self.gpu.memory))
            raise TuningError(f"{self.shape.name} in bfloat16 does not fit {self.gpus} {self.gpu.name}; give {need}.")

    @property
    def plain_seconds(self) -> float:
        """A forward over one token."""
        return self.verify_seconds(1)

    def verify_seconds(self, nodes: int) -> float:
        """The target's forward over so many nodes."""
        shape = self.shape
        attended = 2 * 2 * shape.layers * shape.hidden * self.context * nodes
        work = self._roofline(
            shape.read_weights * _BYTES + shape.cache_bytes(self.context),
            2 * shape.read_weights * nodes + attended,
            self.gpus,
        )
        return self._with_launches(work, shape.layers, self.gpus)

    def draft_seconds(self, widths: Sequence[int]) -> float:
        """Passes of so many blocks of k positions each."""
        return sum(self._pass_seconds(width) for width in widths)

    def _pass_seconds(self, width: int) -> float:
        shape, k = self.shape, self.block_size
        recurrent = 2 * 4 * shape.hidden**2
        lstm = 4 * shape.hidden * (2 * shape.hidden) + 4 * shape.hidden * shape.hidden + recurrent
        head = shape.hidden * min(self.draft_vocab or shape.vocab, shape.vocab)
        weights = lstm + shape.layer_weights + head
        read = (weights + (k - 1) * recurrent) * _BYTES + shape.cache_bytes(self.context) / shape.layers
        work = self._roofline(read, 2 * weights * width * k, 1)
        return self._with_launches(work, 1 + 2 * k * _LSTM_STEP_SHARE, 1)

    def rest_seconds(self, tokens: float) -> float:
        """Nothing: what a round costs beside its forwards is not known without measuring."""
        return 0.0 * tokens

    def _roofline(self, read: float, operations: float, gpus: int) -> float:
        return max(read / (self.gpu.bandwidth * _BANDWIDTH_SHARE), operations / (self.gpu.rate * _RATE_SHARE)) / gpus

    def _with_launches(self, work: float, layers: float, gpus: int) -> float:
        """Device time and launches: in a row in a captured graph, side by side where the host runs ahead."""
        fixed = layers * (_GRAPH_SECONDS + (_SPLIT_SECONDS if gpus > 1 else 0.0))
        return work + fixed if self.mode == "graph" else max(work + fixed, layers * _EAGER_SECONDS)
