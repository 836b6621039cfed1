"""Products with few rows in the graph of a compiled verification: multiplied as ``few_rows.py`` does.

A compiler leaves products to BLAS as they stand, x W^T, which is slow for the few rows of a tree, so that compiling
gained nothing. Here its graph is rewritten to (W x^T)^T before code is made of it (``tree_graphs.py``). Verification
of four nodes by SmolLM2-135M-Instruct, float32, 2 threads of an AVX2 CPU, ms: 83 uncompiled, 93 compiled as it stands,
55 so; a plain token takes 77 and, compiled, 62.

``tests/runtime/test_few_row_graphs.py`` holds that the numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .few_rows import MOST_ROWS, PADDED_ROWS

_ops = torch.ops.aten


def turn_products(graph: fx.Graph) -> int:
    """Rewrite each float32 product of few rows with a turned weight, with or without a bias; returns their number.

    Args:
        graph: of aten operations, each with its (fake) value in ``meta["val"]``; ``x [R, I]``, ``W [O, I]``.
    """
    found = 0
    for node, x, weight, bias in few_row_products(graph, (torch.float32,), fewest=2):
        rows = x.meta["val"].shape[0]
        with graph.inserting_before(node):
            spare = PADDED_ROWS.get(rows, rows) - rows if isinstance(rows, int) else 0
            if spare:
                x = call(graph, _ops.constant_pad_nd.default, x, [0, 0, 0, spare])
            product = call(graph, _ops.mm.default, weight, call(graph, _ops.permute.default, x, [1, 0]))
            if spare:
                product = call(graph, _ops.slice.Tensor, product, 1, 0, rows)
            result = call(graph, _ops.permute.default, product, [1, 0])
            for added in bias:
                result = call(graph, _ops.add.Tensor, result, added)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found += 1
    return found


def few_row_products(
    graph: fx.Graph, dtypes: tuple[torch.dtype, ...], fewest: int = 1
) -> list[tuple[fx.Node, Any, Any, list[Any]]]:
    """The graph's products of few rows with a whole W^T on a CPU: node, x, W, and the bias or nothing."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (_ops.mm.default, _ops.addmm.default) or node.kwargs:
            continue
        *bias, x, turned = node.args
        if _has_few_rows(x, dtypes, fewest) and _is_turned(turned):
            found.append((node, x, turned.args[0], bias))
    return found


def _has_few_rows(x: Any, dtypes: tuple[torch.dtype, ...], fewest: int) -> bool:
    value = x.meta["val"]
    rows = value.shape[0]
    if not isinstance(rows, int):
        rows = rows.node.hint  # a graph for any number, made for this one
    return rows is not None and fewest <= rows <= MOST_ROWS and value.dtype in dtypes and value.device.type == "cpu"


def _is_turned(weight: Any) -> bool:
    """Whether a factor is W^T of a whole W, as a linear layer's is."""
    turned = weight.op == "call_function" and weight.target is _ops.permute.default and list(weight.args[1]) == [1, 0]
    return turned and bool(weight.args[0].meta["val"].is_contiguous())


def call(graph: fx.Graph, operation: Any, *arguments: Any) -> fx.Node:
    """A new node, with its (fake) value; arguments may be nodes and lists of them."""
    node = graph.call_function(operation, arguments)
    node.meta["val"] = operation(*fx.map_arg(arguments, lambda own: own.meta["val"]))
    return node
