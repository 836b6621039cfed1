"""Products with few rows in the graph of a compiled verification, by the kernel of ``native_kernel.py``.

Products of the same rows, such as those of queries, keys and values, become one call.

``tests/runtime/test_native_product_graphs.py`` holds that the numbers are the same.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .few_row_graphs import call, few_row_products
from .few_rows import MOST_ROWS, is_native_faster
from .native_kernel import DTYPES, MULTIPLE, SOURCE_HASH
from .native_products import native_products

_NAMESPACE = "falcon_hf"
_SCHEMA = "(Tensor x, Tensor[] weights) -> Tensor[]"
_NAME = f"few_rows_{hashlib.sha256(f'{SOURCE_HASH}{_SCHEMA}'.encode()).hexdigest()[:16]}"


def make_products_native(graph: fx.Graph) -> int:
    """Rewrite the products of few rows with whole turned weights, with or without a bias; returns their number.

    Args:
        graph: of aten operations, each with its (fake) value in ``meta["val"]``; ``x [R, I]``, ``W [O, I]``.
    """
    found = 0
    for products in _by_rows(graph):
        node, x, _, _ = products[0]
        with graph.inserting_before(node):
            together = call(graph, operation(), x, [weight for _, _, weight, _ in products])
            results = [call(graph, operator.getitem, together, index) for index in range(len(products))]
        for result, (node, _, _, bias) in zip(results, products, strict=True):
            with graph.inserting_before(node):
                for added in bias:
                    result = call(graph, torch.ops.aten.add.Tensor, result, added)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            found += 1
    return found


def _by_rows(graph: fx.Graph) -> list[list[tuple[fx.Node, Any, Any, list[Any]]]]:
    """Products that the kernel should make, those of the same rows together.

    A weight that the graph computes may come too late for the first of them, or of it: it is multiplied alone.
    """
    groups: dict[Any, list[tuple[fx.Node, Any, Any, list[Any]]]] = {}
    for product in few_row_products(graph, tuple(DTYPES)):
        node, x, weight, _ = product
        value = weight.meta["val"]
        if value.shape[1] % MULTIPLE or value.dtype != x.meta["val"].dtype or not is_native_faster(value):
            continue
        given = weight.op in ("placeholder", "get_attr")
        groups.setdefault(_origin(x) if given else node, []).append(product)
    return list(groups.values())


def _origin(x: fx.Node) -> Any:
    """What tells apart the rows of different products: each product has a view of its own of the same rows."""
    return x.args if x.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default) else x


@functools.cache
def operation() -> Any:
    """The kernel as an operation that a graph may hold, and that a graph from the compiler's cache needs.

    Where a drafter's own copy of this file has made it already, that is it.
    """
    if not hasattr(getattr(torch.ops, _NAMESPACE), _NAME):
        library = torch.library.Library(_NAMESPACE, "FRAGMENT")
        _libraries.append(library)
        library.define(f"{_NAME}{_SCHEMA}", tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(_NAME, _products, "CPU")
        fake = torch.library.register_fake(f"{_NAMESPACE}::{_NAME}", lib=library)
        fake(lambda x, weights: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights])
    return getattr(getattr(torch.ops, _NAMESPACE), _NAME).default


def _products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if x.shape[0] > MOST_ROWS:  # a graph for any number of rows, made for few
        return [F.linear(x, weight) for weight in weights]
    return native_products(x, [weight.contiguous() for weight in weights])


_libraries: list[torch.library.Library] = []  # an operation lives as long as its library
