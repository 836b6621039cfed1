"""What several runtime tests share: trees, tiny prompts, and the two comparisons that say "lossless"."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from falcon_hf.runtime.tree_masks import TreeMasks


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers of their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_ids(vocab_size: int, length: int, seed: int = 5) -> torch.Tensor:
    """``[1, length]`` random ids, 0 (padding) left out; the global generator is left alone."""
    return torch.randint(1, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def bushy_tree(vocab_size: int, depth: int, budget: int) -> list[list[int]]:
    """All paths whose product of (rank + 1) is within ``budget``, and three quarters of the vocabulary at the root.

    On a tiny vocabulary much of it is accepted, at ranks of all kinds.
    """
    paths = [
        list(path)
        for length in range(1, depth + 1)
        for path in itertools.product(range(vocab_size), repeat=length)
        if math.prod(rank + 1 for rank in path) <= budget
    ]
    return paths + [[rank] for rank in range(budget, vocab_size * 3 // 4)]


def run(target: Any, seed: int, inputs: Any, **options: Any) -> tuple[Any, torch.Tensor]:
    """``generate()`` under a seed: its output, and the state of the global generator behind it."""
    torch.manual_seed(seed)
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    output = target.generate(**inputs, **options)
    return output, torch.get_rng_state()


def assert_same_text(
    target: Any,
    drafter: Any,
    inputs: Any,
    seed: int = 0,
    per_call: Iterator[dict[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """Falcon's tokens and random draws are those of plain ``generate()``; returns Falcon's output.

    ``per_call`` gives further options for the plain call, then for Falcon's, such as a cache for each.
    """
    further = itertools.repeat({}) if per_call is None else per_call
    plain, plain_state = run(target, seed, inputs, **options, **next(further))
    drafter.last_generation = None
    falcon, falcon_state = run(target, seed, inputs, assistant_model=drafter, **options, **next(further))
    assert drafter.last_generation is not None, "generate() never reached Falcon"
    plain_ids, falcon_ids = (getattr(output, "sequences", output) for output in (plain, falcon))
    assert falcon_ids.tolist() == plain_ids.tolist()
    assert torch.equal(falcon_state, plain_state), "another number of random draws"
    return falcon


def returned_cache(output: Any) -> Any:
    """The cache of an output object, in old and new transformers."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def cache_error(target: Any, sequences: torch.Tensor, cache: Any, attention_mask: torch.Tensor | None = None) -> float:
    """Largest difference of next-token logits: the cache and the last token against a forward without a cache.

    The cache must hold all of ``sequences`` ``[1, L]`` but the last token. The forward adds a row to it.
    """
    from falcon_hf.runtime.target_session import cache_key

    assert int(cache.get_seq_length()) == sequences.shape[1] - 1
    mask = torch.ones_like(sequences) if attention_mask is None else attention_mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        free = target(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        cached = target(
            sequences[:, -1:],
            attention_mask=mask,
            position_ids=positions[:, -1:],
            use_cache=True,
            **{cache_key(target): cache},
        ).logits[:, -1]
    return float((free - cached).abs().max())


def with_correction(drafter: Any, seed: int = 5) -> Any:
    """The drafter with a correction that does something, as a trained one's would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drafter.correction.up.normal_(std=0.7, generator=generator)
    return drafter


def break_masks(monkeypatch: Any) -> None:
    """For controls: every node of a tree sees all nodes before it, its own path or not."""
    right = TreeMasks.of

    def wrong(self: TreeMasks, slots: Any, ancestors: torch.Tensor, positions: torch.Tensor) -> Any:
        return right(self, slots, torch.ones_like(ancestors).tril(), positions)

    monkeypatch.setattr(TreeMasks, "of", wrong)
