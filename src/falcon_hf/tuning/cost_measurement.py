"""Times of what a round consists of, by the calls that a round makes, on the target's device, dtype and attention.

Sizes are timed in turn, round after round, so that a slow moment of the machine hits them all; a time is a median.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..measured_calls import padding_token, synchronize
from ..runtime.candidate_generator import FalconCandidateGenerator
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target_session import TargetSession, cache_key
from ..runtime.tree import DraftTree
from ..runtime.tree_shape import Path, TreeShape
from .calibration import DraftTime, VerifyTime
from .errors import TuningError
from .rank_measurement import GreedyText

# Both sides of where products change their kernels (see ``runtime/few_rows.py``): between them costs jump.
VERIFY_NODES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 96, 128)
DRAFT_WIDTHS = (1, 2, 4, 8, 16)
# Candidates of the first pass that a probe asks for at least: the root's children.
_ROOT_CHILDREN = 10

Key = TypeVar("Key")


def medians(calls: Mapping[Key, Callable[[], object]], repeats: int, device: torch.device) -> dict[Key, float]:
    """Median seconds of each call, all called in turn ``repeats`` times after one round to warm up."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(repeats + 1):
        for key, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn:
                times[key].append(time.perf_counter() - start)
    return {key: statistics.median(own) for key, own in times.items()}


def start_session(target: PreTrainedModel, ids: torch.Tensor, room: int) -> tuple[TargetSession, Any]:
    """A session that has read ``ids`` ``[1, L]``, as ``generate()`` starts one, and its generation config."""
    config = copy.deepcopy(target.generation_config)
    config.output_hidden_states = False
    config.max_length = ids.shape[1]  # and the rest of the slots are the tree's
    kwargs = {cache_key(target): DynamicCache(config=target.config.get_text_config()), "use_cache": True}
    session = TargetSession(target, 1, ids.shape[1] + room, room, kwargs)
    session.prefill(ids, config)
    return session, config


def check_contexts(target: PreTrainedModel, contexts: Sequence[int]) -> None:
    """See that verification can be timed behind so many tokens.

    Raises:
        TuningError: if a context does not fit the target.
    """
    room = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and max(contexts) + 2 > room:
        raise TuningError(f"The target has {room} positions; ask for contexts up to {room - 2}.")


def check_draft_vocabulary(drafter: FalconDrafter) -> int:
    """The tokens that are drafted over.

    Raises:
        TuningError: if they are too few to time drafts.
    """
    most = drafter.config.draft_vocab_size or drafter.config.vocab_size
    if most < _ROOT_CHILDREN:
        raise TuningError(f"A draft vocabulary of {most} tokens is too small to tune for: {_ROOT_CHILDREN} at least.")
    return most


@torch.no_grad()
def time_verification(
    target: PreTrainedModel, text: torch.Tensor, nodes: Sequence[int], contexts: Sequence[int], repeats: int
) -> tuple[VerifyTime, ...]:
    """Time ``TargetSession.verify`` on stars of ``nodes`` nodes behind ``contexts`` tokens.

    Args:
        target: the target.
        text: ``[1, L]`` tokens to read and to verify, repeated to the lengths wanted.
        nodes: numbers of nodes, the root included.
        contexts: cached tokens.
        repeats: times each size is timed.

    Raises:
        TuningError: as [`check_contexts`].
    """
    check_contexts(target, contexts)
    found = []
    for context in contexts:
        ids = text.to(target.device).repeat(1, -(-(context + max(nodes)) // text.shape[1]))
        session, config = start_session(target, ids[:, :context], max(nodes))
        trees = {size: _star(ids[:, context : context + size]) for size in nodes}

        def verify(tree: DraftTree, session: TargetSession = session, config: Any = config) -> None:
            session.verify(tree, [tree.size + 1], config)
            session.cache.crop(-tree.size)

        calls = {size: partial(verify, tree) for size, tree in trees.items()}
        found += [VerifyTime(context, size, median) for size, median in medians(calls, repeats, target.device).items()]
    return tuple(found)


def _star(tokens: torch.Tensor) -> DraftTree:
    """A root with ``[1, N]`` tokens minus one children: what a node costs does not depend on its place."""
    size = tokens.shape[1]
    parents = torch.zeros(1, size, dtype=torch.long, device=tokens.device)
    parents[:, 0] = -1
    depths = torch.ones_like(parents)
    depths[:, 0] = 0
    ancestors = torch.eye(size, dtype=torch.bool, device=tokens.device)[None].clone()
    ancestors[:, :, 0] = True
    return DraftTree(tokens, parents, depths, ancestors)


def probe_shape(block_size: int, passes: int, width: int) -> TreeShape:
    """A tree whose passes after the first all have ``width`` blocks, with ten children at the root at least."""
    paths: set[Path] = {(rank,) for rank in range(max(width, _ROOT_CHILDREN))}
    for rank in range(width):
        paths |= {(rank, *[0] * depth) for depth in range(passes * block_size)}
    return TreeShape.from_paths(paths)


@torch.no_grad()
def time_drafts(
    target: PreTrainedModel, drafter: FalconDrafter, text: GreedyText, passes: int, widths: Sequence[int], repeats: int
) -> tuple[tuple[DraftTime, ...], float]:
    """Time ``FalconCandidateGenerator.draft`` for numbers of passes and widths, and one ``append`` of two pairs.

    Args:
        target: gives embeddings and head.
        drafter: the drafter.
        text: behind which is drafted.
        passes: m at most.
        widths: n, boundary nodes that each pass but the first continues.
        repeats: calls of each; their median counts.

    Returns:
        The draft times, and the seconds of ``append``.

    Raises:
        TuningError: as [`check_draft_vocabulary`].
    """
    k, most = drafter.config.block_size, check_draft_vocabulary(drafter)
    sizes = [(1, 1)] + [(m, n) for m in range(2, passes + 1) for n in widths if max(n, _ROOT_CHILDREN) <= most]
    length, features = text.ids.shape[1] - 1, text.features(drafter)
    calls: dict[Any, Callable[[], object]] = {}
    for m, n in sizes:
        generator = FalconCandidateGenerator(drafter, target, probe_shape(k, m, n))
        generator.append(features[:, :length], text.ids[:, 1 : length + 1])
        root = text.ids[:, -1:]
        calls[m, n] = partial(generator.draft, root, m * k)
    appended = FalconCandidateGenerator(drafter, target, probe_shape(k, 1, 1))
    calls["append"] = partial(appended.append, features[:, :2], text.ids[:, 1:3])
    times = medians(calls, repeats, target.device)
    drafts = tuple(DraftTime(m, n, times[m, n]) for m, n in sizes)
    return drafts, times["append"]


class TokenClock(StoppingCriteria):
    """Notes when each token of a call of ``generate()`` was emitted; ends nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note the time; ``[B]`` False."""
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def plain_decoding(target: PreTrainedModel, prompt: torch.Tensor, options: dict[str, Any]) -> tuple[int, float]:
    """Tokens that plain ``generate()`` emitted behind the first, and the seconds they took."""
    clock = TokenClock()
    prompt = prompt.to(target.device)
    target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        stopping_criteria=StoppingCriteriaList([clock]),
        **{"pad_token_id": padding_token(target), **options},
    )
    return len(clock.times) - 1, clock.times[-1] - clock.times[0]
