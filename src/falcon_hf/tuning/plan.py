"""Plans for targets and devices that are not at hand: best k, m, n, N, speedup, and its limit as acceptance falls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .acceptance import AcceptanceModel, ParametricAcceptance
from .calibration import Calibration
from .choice import Option, Prediction, choose
from .errors import TuningError
from .roofline import GPU, RooflineCosts, TargetShape

BLOCK_SIZES = (1, 2, 3, 4)
# Acceptance of the likeliest first token, from hopeless to all but certain.
TOP1_GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Profile:
    """Three numbers of a [`ParametricAcceptance`]."""

    top1: float
    decay: float = 0.85
    tail: float = 0.4

    def model(self, block_size: int, passes: int) -> AcceptanceModel:
        """The model of a drafter of block size k."""
        return _model(self, block_size, passes)


@functools.lru_cache(maxsize=128)
def _model(profile: Profile, block_size: int, passes: int) -> AcceptanceModel:
    """One object a profile, because trees are kept by model."""
    return ParametricAcceptance(block_size, block_size * passes, profile.top1, profile.decay, profile.tail)


# The paper's: fitted so that its trees accept its tau (arXiv 2412.12639, MT-Bench, Vicuna-7B: 3.34, 2.52 and 2.35 for
# k = 2, 3 and 4, met within 0.07); Llama-2-chat-7B (2.82, k = 2) has the same decay and tail, which is an assumption.
# tests/tuning/test_plan.py does these sums.
# "first-smollm2": measured on held-out text, see ParametricAcceptance.
PROFILES = {
    "paper-vicuna-7b": Profile(0.848, 0.76, 0.2),
    "paper-llama2-7b": Profile(0.786, 0.76, 0.2),
    "first-smollm2": Profile(0.41, 0.73),
}


def options_for(
    acceptance: str, shape: TargetShape, gpu: GPU, gpus: int, context: int, mode: str, passes: int
) -> list[Option]:
    """Drafters to choose from: a named profile's at k = 1 to 4, or a calibration's own.

    Raises:
        TuningError: if ``acceptance`` is neither, or the target does not fit the GPUs.
    """
    if acceptance in PROFILES:
        return _options(PROFILES[acceptance], shape, gpu, gpus, context, mode, passes)
    if not Path(acceptance).is_file():
        raise TuningError(f"--acceptance is one of {', '.join(PROFILES)}, or a calibration file; got {acceptance!r}.")
    return [
        Option(
            option.name,
            option.model,
            RooflineCosts(shape, gpu, option.model.block_size, gpus, context, mode),
            option.expected_tokens,
        )
        for option in Calibration.read(Path(acceptance)).options()
    ]


def _options(
    profile: Profile, shape: TargetShape, gpu: GPU, gpus: int, context: int, mode: str, passes: int
) -> list[Option]:
    return [
        Option(f"k={k}", profile.model(k, passes), RooflineCosts(shape, gpu, k, gpus, context, mode))
        for k in BLOCK_SIZES
    ]


def best_setting(options: Sequence[Option], passes: int, nodes: int) -> Prediction:
    """The fastest, plain decoding included."""
    return choose(options, passes, nodes)[0]


def best_by_block_size(options: Sequence[Option], passes: int, nodes: int) -> list[Prediction]:
    """The fastest of each drafter."""
    return [choose([option], passes, nodes)[0] for option in options]


def limit_curve(
    profile: Profile,
    shape: TargetShape,
    gpu: GPU,
    gpus: int,
    context: int,
    mode: str,
    passes: int,
    nodes: int,
    grid: Sequence[float] = TOP1_GRID,
) -> list[tuple[float, Prediction]]:
    """The best setting for each acceptance of the likeliest first token, the profile's decay and tail kept."""
    found = []
    for top1 in grid:
        own = Profile(top1, profile.decay, profile.tail)
        found.append((top1, best_setting(_options(own, shape, gpu, gpus, context, mode, passes), passes, nodes)))
    return found
