"""Attention without copies of the keys in the graph of a compiled verification, as ``shared_heads.py`` does uncompiled.

Where several query heads share a key head, transformers repeats keys and values for each; compiled, over the whole
static cache, in every layer. The CPU's kernel reads the shared head, so the graph hands it the cache as it lies.

``tests/runtime/test_shared_head_graphs.py`` holds that the bits are the same, in float32.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_ops = torch.ops.aten
# Older kernels take a query head's number for its key head's, and read behind the cache (pytorch/pytorch#157893).
_SHARING_TORCH = (2, 9)


def share_heads(graph: fx.Graph) -> int:
    """Take the repeating of key heads out before each of the CPU's attention kernels; returns the number of kernels.

    Args:
        graph: of aten operations, each with its (fake) value in ``meta["val"]``; ``q [B, heads, S, d]``, ``k`` and
            ``v [B, heads, T, d]`` that were repeated from ``[B, key heads, T, d]``. Dead nodes are left to the graph's
            own elimination.
    """
    found = 0
    if not kernel_shares_heads():
        return found
    for node in graph.find_nodes(op="call_function", target=_ops._scaled_dot_product_flash_attention_for_cpu.default):
        query, key, value, *rest = node.args
        keys, values = _before_repeating(key), _before_repeating(value)
        # The kernel takes the number of key heads for that of the values' heads.
        if keys is not None and values is not None and keys.meta["val"].shape[1] == values.meta["val"].shape[1]:
            node.args = (query, keys, values, *rest)
            found += 1
    return found


def kernel_shares_heads(version: str = torch.__version__) -> bool:
    """Whether the CPU's attention kernel of this torch knows fewer key heads than query heads."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(int(number) for number in numbers.groups()) >= _SHARING_TORCH


def _before_repeating(folded: Any) -> fx.Node | None:
    """``[B, key heads, T, d]`` of which the input is ``[B, heads, T, d]``: a new axis 2, expanded and folded in."""
    copied = _input_of(folded, _ops.view.default, _ops.reshape.default)
    expanded = _input_of(copied, _ops.clone.default) or copied
    widened = _input_of(expanded, _ops.expand.default)
    source = _input_of(widened, _ops.unsqueeze.default)
    if source is None or widened.args[1] not in (2, -3):
        return None
    before, between, after = (node.meta["val"].shape for node in (source, expanded, folded))
    if (len(before), len(between), len(after)) != (4, 5, 4):
        return None
    stays = [after[axis] == before[axis] for axis in (0, 2, 3)]
    folds = after[1] == between[1] * between[2]
    lies_in_order = source.meta["val"].stride(-1) == 1
    # Not by plain truth: sizes may be symbols, and a graph is not to be made anew for what this would ask of them.
    return source if all(statically_known_true(fact) for fact in (*stays, folds, lies_in_order)) else None


def _input_of(node: Any, *targets: Any) -> Any:
    """The first argument of one of these operations; None if it is none of them."""
    wanted = isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
    return node.args[0] if wanted else None
