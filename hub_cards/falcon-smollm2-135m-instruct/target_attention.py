"""Attention implementations: which take a tree's mask and in which form, and how the others are switched for a while.

Flash attention knows causal masks alone. A target that uses it decodes with Falcon under sdpa (eager where it has no
sdpa), from the prefill on, and has its own implementation back when the call ends, however it ends.
``tests/runtime/test_attention_implementations.py`` holds both.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TREE_ATTENTIONS = ("eager", "sdpa", "flex_attention")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Calls of generate() may overlap in threads: the first switches, the last restores. By id of the target's config, the
# number of calls and what to restore.
_LOCK = threading.Lock()
_SWITCHED: dict[int, tuple[int, list[tuple[Any, str]]]] = {}


def attention_of(target: PreTrainedModel) -> str:
    """The implementation of the target's decoder layers: of a model with an image encoder, its text model's."""
    return target.config.get_text_config()._attn_implementation


def check_attention(target: PreTrainedModel) -> None:
    """Refuse an attention implementation that neither takes a tree's mask nor can be switched.

    Raises:
        ValueError: with the remedy.
    """
    attention = attention_of(target)
    if attention in TREE_ATTENTIONS:
        return
    if "flash" not in attention:
        raise ValueError(
            f"Attention implementation {attention!r} is not known to take a tree mask; call "
            f"model.set_attn_implementation({_substitute(target)!r}) first."
        )
    if not target._can_set_attn_implementation():
        raise ValueError(
            f"Attention implementation {attention!r} takes no tree mask, and {type(target).__name__} cannot change it "
            f"once loaded; load it with attn_implementation={_substitute(target)!r}."
        )


def _substitute(target: PreTrainedModel) -> str:
    return "sdpa" if target._supports_sdpa else "eager"


@contextlib.contextmanager
def tree_attention(target: PreTrainedModel) -> Iterator[None]:
    """The target under an attention implementation that takes a tree's mask; its own is restored at the end."""
    key = id(target.config)
    with _LOCK:
        calls, restore = _SWITCHED.get(key, (0, []))
        if calls == 0 and attention_of(target) in TREE_ATTENTIONS:
            key = -1
        else:
            if calls == 0:
                restore = _implementations(target)
                _log_once(type(target).__name__, attention_of(target), _substitute(target))
                target.set_attn_implementation(_substitute(target))
            _SWITCHED[key] = calls + 1, restore
    try:
        yield
    finally:
        if key != -1:
            with _LOCK:
                calls, restore = _SWITCHED.pop(key)
                if calls > 1:
                    _SWITCHED[key] = calls - 1, restore
                else:
                    # Not by set_attn_implementation, which may load a kernel anew, or fail.
                    for config, implementation in restore:
                        config._attn_implementation_internal = implementation


def under_tree_attention(decode: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Run a decoding function, whose first argument is the target, within [`tree_attention`]."""

    @functools.wraps(decode)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        target: Any = args[0]
        with tree_attention(target):
            return decode(*args, **kwargs)

    return wrapped


def _implementations(target: PreTrainedModel) -> list[tuple[Any, str]]:
    """Every config in the target with its attention implementation."""
    open_configs = [module.config for module in target.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, Any] = {}
    while open_configs:
        config = open_configs.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            open_configs += [getattr(config, name, None) for name in config.sub_configs]
    return [(config, config._attn_implementation_internal) for config in found.values()]


@functools.cache
def _log_once(name: str, own: str, substitute: str) -> None:
    logger.warning(
        "%s takes no tree mask: %s decodes with Falcon under %s, and has it back after.", own, name, substitute
    )


def mask_for(target: PreTrainedModel, visible: torch.Tensor) -> Any:
    """A mask in the form that the target's attention implementation takes.

    Args:
        target: the target.
        visible: ``[B, 1, N, width]`` bool.

    Returns:
        ``visible`` itself for sdpa, a ``BlockMask`` for flex attention; for eager attention, which adds it,
        ``[B, 1, N, width]`` in the target's dtype.
    """
    implementation = attention_of(target)
    if implementation == "eager":
        blocked = torch.zeros(visible.shape, dtype=target.dtype, device=visible.device)
        return blocked.masked_fill(~visible, torch.finfo(target.dtype).min)
    if implementation == "flex_attention":
        return _block_mask(visible)
    return visible


def _block_mask(visible: torch.Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return visible[row, 0, query, key]

    rows, _, queries, keys = visible.shape
    return create_block_mask(is_visible, rows, None, queries, keys, device=visible.device)
