"""Routes ``target.generate(assistant_model=drafter)`` to Falcon's decoding loop, and nothing else.

Two methods of transformers' ``GenerationMixin`` are wrapped once: ``_validate_generation_mode``, so that what Falcon
cannot do is refused before any work, and ``_assisted_decoding``. A drafter is known by its attributes
``_falcon_validate`` and ``_falcon_decode``, not by its class, because a Hub repo's copy of this code and an installed
``falcon_hf`` define two classes in one process. Every other assistant goes the way it always went.

Models that override these methods themselves are not reached; use [`FalconGenerationMixin`] as their base class.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin

# Holds the wrapper itself: functools.wraps hands attributes on to a stranger's wrapper around ours, which then has
# the mark but is not the marked.
_MARK = "_falcon_hf_routing"
_LOCK = threading.RLock()


def install() -> None:
    """Route Falcon drafters; nothing happens if this or another copy of the code did so already. Thread-safe."""
    with _LOCK:
        for name, route in _ROUTES.items():
            current = getattr(GenerationMixin, name)
            if not hasattr(current, _MARK):
                wrapped = route(current)
                setattr(wrapped, _MARK, wrapped)
                setattr(GenerationMixin, name, wrapped)


def uninstall() -> None:
    """Undo [`install`]: ``GenerationMixin`` is again as it was before. Thread-safe.

    Raises:
        RuntimeError: if another library has wrapped the methods since, so that ours cannot be taken out from under it.
    """
    with _LOCK:
        for name in _ROUTES:
            current = getattr(GenerationMixin, name)
            if getattr(current, _MARK, current) is not current:
                raise RuntimeError(f"Another library wrapped GenerationMixin.{name} after falcon_hf; undo that first.")
        for name in _ROUTES:
            current = getattr(GenerationMixin, name)
            if hasattr(current, _MARK):
                setattr(GenerationMixin, name, current.__wrapped__)


def _route_decoding(current: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(current)  # transformers reads the signature to decide what to pass
    def _assisted_decoding(self: Any, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        decode = getattr(assistant_model, "_falcon_decode", None)
        if decode is None:
            return current(self, *args, assistant_model=assistant_model, **kwargs)
        return decode(self, *args, **kwargs)

    return _assisted_decoding


def _route_validation(current: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(current)
    def _validate_generation_mode(
        self: Any, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> Any:
        validate = getattr(generation_mode_kwargs.get("assistant_model"), "_falcon_validate", None)
        if validate is not None:
            generation_config = validate(self, generation_mode, generation_config, generation_mode_kwargs)
        return current(self, generation_mode, generation_config, generation_mode_kwargs)

    return _validate_generation_mode


_ROUTES = {"_assisted_decoding": _route_decoding, "_validate_generation_mode": _route_validation}
