"""Compiled decoding on any device: the keywords that make ``generate()`` compile its forwards."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig

from .runtime.candidate_generator import config_tree


def compiled(longest: int | None = None, drafter: Any = None, mode: str | None = None) -> dict[str, Any]:
    """Keywords for ``generate()``: a static cache, and forwards compiled by ``torch.compile``, on a CPU too.

    Transformers compiles by itself for static caches on accelerators only. Compiling takes a minute or so and a C++
    compiler on the machine; it is done at the first round, and again for another shape: so give ``longest`` (and the
    drafter), and all calls share one cache size and one graph. Works with and without a drafter::

        target.generate(**inputs, assistant_model=drafter, **compiled(2048, drafter))

    Args:
        longest: of all texts to come, prompt included, in tokens. None: as long as each call's own longest text.
        drafter: whose tree needs room beside the text.
        mode: of ``torch.compile``; transformers' own default is "reduce-overhead".

    Raises:
        ValueError: if the drafter's tree is impossible.
    """
    compile_config = CompileConfig() if mode is None else CompileConfig(mode=mode)
    compile_config._compile_all_devices = True  # transformers' own switch; it has no public name yet
    keywords: dict[str, Any] = {"cache_implementation": "static", "compile_config": compile_config}
    if longest is not None:
        keywords["max_cache_len"] = longest + (0 if drafter is None else config_tree(drafter.config).size)
    return keywords
