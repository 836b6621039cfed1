"""``target.generate(custom_generate=REPO, trust_remote_code=True)``: the second way in, without a drafter at hand.

A drafter's repo holds this file as ``custom_generate/generate.py`` too. transformers copies it alone into its module
cache, calls [`generate`] with every argument of ``generate()`` as the user gave it, and does not say where it came
from; so the repo is read off the call itself, or off the place of the copy (see ``_find_repo``).
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModel, GenerationMixin

# Where and how to look for the repo; generate() hands them through to the loader of this file, and on to us.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# One drafter for each (repo, revision, dtype, device), with a folder's file times: the next call of generate() finds it
# loaded, and a folder that was written anew replaces what it held before.
_drafters: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def generate(model: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
    """``model.generate(assistant_model=drafter, ...)`` with the drafter of this repo.

    Args:
        model: the target.
        assistant_model: a Falcon drafter to use instead of this repo's.
        **kwargs: everything else that was given to ``generate()``, and options of the Hub such as ``revision``.

    Returns:
        What ``model.generate()`` returns.

    Raises:
        ValueError: if the repo cannot be told from the call, holds no Falcon drafter, or ``assistant_model`` is
            another kind of assistant; and all that a Falcon drafter refuses.
    """
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    if assistant_model is None:
        assistant_model = _load_drafter(model, hub)
    elif not hasattr(assistant_model, "_falcon_decode"):
        raise ValueError(
            f"custom_generate with a Falcon repo and assistant_model={type(assistant_model).__name__} exclude each "
            "other: drop one of the two."
        )
    # The class's own method: a model may carry a custom generate() of its own as an attribute.
    return type(model).generate(model, assistant_model=assistant_model, **kwargs)


def _load_drafter(model: Any, hub: dict[str, Any]) -> Any:
    """This repo's drafter in the target's dtype, on its device; loaded once."""
    repo, commit = _find_repo()
    if commit is not None:
        hub["revision"] = commit  # weights of the very revision this code is from
    folder = Path(repo)
    times = (
        tuple(sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.*"))) if folder.is_dir() else ()
    )
    key = (repo, hub.get("revision"), model.dtype, model.device)
    known_times, known = _drafters.get(key, (None, None))
    if known is None or known_times != times:
        drafter = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=model.dtype, **hub)
        if not hasattr(drafter, "_falcon_decode"):
            raise ValueError(f"{repo!r} holds a {type(drafter).__name__}, not a Falcon drafter.")
        known = drafter.to(model.device).eval()
        _drafters[key] = times, known
    return known


def _find_repo() -> tuple[str, str | None]:
    """The folder or Hub repo this code is from, and the Hub's commit if it is from there.

    Raises:
        ValueError: naming ``assistant_model`` as the remedy, where neither the call nor the copy's place tells it.
    """
    place = Path(__file__).parent.parent  # .../transformers_modules/ORGANISATION/NAME/COMMIT/custom_generate
    commit = place.name if _COMMIT.fullmatch(place.name) else None
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and isinstance(frame.f_locals.get("custom_generate"), str):
            return frame.f_locals["custom_generate"], commit
        frame = frame.f_back  # type: ignore[assignment]
    if commit is not None:
        # Called some other way: the place spells the repo's id, with "." and "-" written out.
        return "/".join(_restored(part) for part in place.parts[-3:-1]), commit
    raise ValueError(
        "The folder of this custom_generate cannot be told from the call: load the drafter, "
        "AutoModel.from_pretrained(folder, trust_remote_code=True), and pass it as assistant_model."
    )


def _restored(name: str) -> str:
    """The Hub's name that transformers wrote as the module name ``name``."""
    name = name.replace("_hyphen_", "-").replace("_dot_", ".")
    return name[1:] if name[:1] == "_" and name[1:2].isdigit() else name
