"""Products with few rows in the graph of a compiled verification, by the kernel of ``native_products.py``.

Products of the same rows, such as those of queries, keys and values, become one call. Verification of four nodes by
SmolLM2-135M-Instruct, float32, 2 threads of an AVX2 CPU, ms: 44 with torch's products (``few_row_graphs.py``), NN so.

``tests/runtime/test_native_product_graphs.py`` holds that the numbers are the same.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from .few_row_graphs import few_row_products
from .native_products import MULTIPLE, SOURCE_HASH, native_products

_NAMESPACE = "falcon_hf"


def make_products_native(graph: fx.Graph) -> int:
    """Rewrite the products of few rows with whole turned weights, with or without a bias; returns their number.

    Args:
        graph: of aten operations, each with its (fake) value in ``meta["val"]``; ``x [R, I]``, ``W [O, I]``.
    """
    by_rows: dict[Any, list[tuple[fx.Node, fx.Node, fx.Node, list[Any]]]] = {}
    for node, x, weight, bias in few_row_products(graph, (torch.float32, torch.bfloat16)):
        if weight.meta["val"].shape[1] % MULTIPLE == 0 and weight.meta["val"].dtype == x.meta["val"].dtype:
            by_rows.setdefault(_origin(x), []).append((node, x, weight, bias))
    for products in by_rows.values():
        node, x, _, _ = products[0]
        weights = [weight for _, _, weight, _ in products]
        with graph.inserting_before(node):
            together = _call(graph, operation(), x, weights)
            results = [_call(graph, operator.getitem, together, index) for index in range(len(products))]
        for result, (node, _, _, bias) in zip(results, products, strict=True):
            with graph.inserting_before(node):
                for added in bias:
                    result = _call(graph, torch.ops.aten.add.Tensor, result, added)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    return sum(map(len, by_rows.values()))


def _origin(x: fx.Node) -> Any:
    """What tells apart the rows of different products: each product has a view of its own of the same rows."""
    return x.args if x.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default) else x


@functools.cache
def operation() -> Any:
    """The kernel as an operation that a graph may hold. A drafter's own copy of this file finds it made already."""
    name = f"few_rows_{SOURCE_HASH}"
    if not hasattr(getattr(torch.ops, _NAMESPACE), name):
        library = torch.library.Library(_NAMESPACE, "FRAGMENT")
        _libraries.append(library)
        library.define(f"{name}(Tensor x, Tensor[] weights) -> Tensor[]", tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, lambda x, weights: native_products(x, [weight.contiguous() for weight in weights]), "CPU")
        fake = torch.library.register_fake(f"{_NAMESPACE}::{name}", lib=library)
        fake(lambda x, weights: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights])
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


_libraries: list[torch.library.Library] = []  # an operation lives as long as its library


def _call(graph: fx.Graph, function: Any, *arguments: Any) -> fx.Node:
    node = graph.call_function(function, arguments)
    node.meta["val"] = function(*fx.map_arg(arguments, lambda own: own.meta["val"]))
    return node
