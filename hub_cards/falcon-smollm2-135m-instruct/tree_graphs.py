"""What torch's compiler makes of a verification on a CPU: its graph is rewritten for the few nodes of a tree.

Products with few rows become a kernel's (``native_product_graphs.py``) or are turned (``few_row_graphs.py``), and key
heads are shared (``shared_head_graphs.py``): the same that an uncompiled verification does without a graph
(``few_rows.py``, ``shared_heads.py``).

The rewriting is handed to torch's compiler as its own custom pass, for the length of a verification.
``tests/runtime/test_tree_graphs.py`` holds that texts stay plain's, and that nothing is left behind.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import torch
from torch import fx

from .few_row_graphs import turn_products
from .few_rows import MOST_ROWS, PADDED_ROWS, native_dtypes
from .native_kernel import SOURCE_HASH
from .native_product_graphs import make_products_native, operation
from .native_products import has_native_products, native_products
from .shared_head_graphs import share_heads


class TreeGraphs:
    """While entered, what torch's compiler compiles is rewritten so. A user's own custom pass stays alone.

    In a torch where the setting is the process's (2.13 has one a thread), what another thread compiles meanwhile is
    rewritten as well: numbers are the same but for the order of sums.

    Args:
        device: nothing happens unless it is a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._wanted = device.type == "cpu"

    def __enter__(self) -> None:
        if not self._wanted:
            return
        from torch._inductor import config

        if has_native_products():
            operation()  # a graph out of the compiler's cache calls it without being rewritten
        if config.post_grad_custom_pre_pass is None:
            config.post_grad_custom_pre_pass = _custom_pass()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._wanted:
            return
        from torch._inductor import config

        if config.post_grad_custom_pre_pass is _custom_pass():
            config.post_grad_custom_pre_pass = None


@functools.cache
def _custom_pass() -> Any:
    # Not imported with the runtime: a torch that never compiles need not have it.
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class TreePass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            if has_native_products():
                make_products_native(graph)
            if torch.backends.mkl.is_available():  # the library that turned products are fast in
                turn_products(graph)
            share_heads(graph)

        def uuid(self) -> Any:  # tells graphs in the compiler's cache apart from those without it
            used = (make_products_native, native_products, turn_products, share_heads, native_dtypes)
            files = (__file__, *(function.__code__.co_filename for function in used))
            native = has_native_products() and native_dtypes()
            return get_hash_for_files(files, f"{MOST_ROWS} {PADDED_ROWS} {native} {SOURCE_HASH}")

    return TreePass()
