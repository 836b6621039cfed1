"""Finds a drafter for a target: in local folders, in the Hub's cache on this machine, and on the Hub by its tags.

One drafter serves a target and its fine-tunes. A fine-tune has another name, but nearly the same embedding: the
fingerprint in a drafter's config tells (``runtime/target.py``). On the Hub, a drafter's card names its base model and
carries a tag of vocabulary and hidden size, so two searches and a look into each config found are enough.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from transformers import PreTrainedModel

from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.repo_card import TAG, is_repo_id, shape_tag
from ..runtime.target import FINGERPRINT_TOLERANCE, fingerprint, fingerprint_distance
from ..runtime.target_name import target_name
from .errors import HubError

logger = logging.getLogger(__name__)

_MOST = 50  # repos of the Hub that are looked into, the most downloaded first


@dataclass(frozen=True)
class FoundDrafter:
    """A drafter that fits.

    Attributes:
        source: folder or Hub repo, for ``AutoModel.from_pretrained(source, trust_remote_code=True)``.
        distance: of the fingerprints, 0 for the very target, None where one of the two has none.
        same_name: whether it was made for a target of this name.
    """

    source: str
    distance: float | None
    same_name: bool


def find_drafter(
    target: PreTrainedModel | str, folders: Sequence[str | Path] = (), hub: bool = True, token: str | bool | None = None
) -> str:
    """The best drafter for ``target``: ``AutoModel.from_pretrained(find_drafter(target), trust_remote_code=True)``.

    Args:
        target: the model, or its name on the Hub; by the name alone, only drafters made for that name are found.
        folders: drafters' folders, or folders of such folders, looked into first.
        hub: look into the Hub's cache on this machine, and on the Hub. Without a connection, or with
            ``HF_HUB_OFFLINE=1``, the cache is all there is, and the log says so.
        token: of the Hub.

    Returns:
        A folder or a repo's name. Of several: the nearest fingerprint, then the order of looking.

    Raises:
        HubError: if there is none; the message says where was looked.
    """
    found = find_drafters(target, folders, hub, token)
    if not found:
        looked = [f"{len(folders)} folders"] if folders else []
        if hub:
            reached = "not asked: offline" if constants.is_offline_mode() else "or unreachable"
            looked += ["the Hub's cache on this machine", f"the Hub ({reached})"]
        name, _ = _identity(target)
        places = ", ".join(looked) or "nothing: give folders, or hub=True"
        raise HubError(
            f"No drafter for {name or type(target).__name__!r} in {places}. Train one with falcon-hf train, or convert "
            "one with falcon-hf convert."
        )
    best = min(found, key=lambda each: (each.distance is None, each.distance or 0.0))
    logger.info("Found the drafter %s (fingerprint distance %s).", best.source, best.distance)
    return best.source


def find_drafters(
    target: PreTrainedModel | str, folders: Sequence[str | Path] = (), hub: bool = True, token: str | bool | None = None
) -> list[FoundDrafter]:
    """All that fit, in the order of looking: folders, cache, Hub. See [`find_drafter`]."""
    places: list[Iterable[tuple[str, dict[str, Any]]]] = [_local(folders)]
    if hub:
        places += [_cached(), _on_the_hub(target, token)]
    found: dict[str, FoundDrafter] = {}
    for place in places:
        for source, settings in place:
            match = _match(source, settings, target)
            if match is not None:
                found.setdefault(source, match)
    return list(found.values())


def _identity(target: PreTrainedModel | str) -> tuple[str | None, list[float] | None]:
    if isinstance(target, str):
        return target_name(target), None
    return target_name(getattr(target.config, "_name_or_path", None)), fingerprint(target)


def _match(source: str, settings: dict[str, Any], target: PreTrainedModel | str) -> FoundDrafter | None:
    """The drafter, if it fits: the fingerprint decides where both sides have one, else the name."""
    if settings.get("model_type") != FalconDrafterConfig.model_type:
        return None
    if isinstance(target, PreTrainedModel):
        text = target.config.get_text_config()
        if (settings.get("vocab_size"), settings.get("hidden_size")) != (text.vocab_size, text.hidden_size):
            return None
    name, own = _identity(target)
    theirs = settings.get("target_fingerprint")
    same_name = name is not None and settings.get("target_name_or_path") == name
    if own is None or not isinstance(theirs, list):
        return FoundDrafter(source, None, True) if same_name else None
    try:
        distance = fingerprint_distance(own, [float(each) for each in theirs])
    except (TypeError, ValueError):
        return None
    return FoundDrafter(source, distance, same_name) if distance <= FINGERPRINT_TOLERANCE else None


def _local(folders: Sequence[str | Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in map(Path, folders):
        for path in sorted([folder / "config.json", *folder.glob("*/config.json")]):
            yield from _settings(str(path.parent), path)


def _cached() -> Iterator[tuple[str, dict[str, Any]]]:
    """The newest snapshot of each cached repo."""
    for repo in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        configs = sorted(repo.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime_ns)
        if configs:
            yield from _settings(repo.name.removeprefix("models--").replace("--", "/"), configs[-1])


def _on_the_hub(target: PreTrainedModel | str, token: str | bool | None) -> Iterator[tuple[str, dict[str, Any]]]:
    name, _ = _identity(target)
    searches = [[TAG, f"base_model:{name}"]] if is_repo_id(name) else []
    if isinstance(target, PreTrainedModel):
        text = target.config.get_text_config()
        searches.append([TAG, shape_tag(text.vocab_size, text.hidden_size)])
    seen: set[str] = set()
    try:
        for tags in searches:
            for model in HfApi(token=token).list_models(filter=tags, sort="downloads", limit=_MOST):
                if model.id not in seen:
                    seen.add(model.id)
                    try:
                        config = hf_hub_download(model.id, "config.json", token=token)
                    except LocalEntryNotFoundError:  # no connection
                        raise
                    except (HfHubHTTPError, EntryNotFoundError) as error:  # gated, or no drafter at all
                        logger.info("%s was not looked at: %s", model.id, type(error).__name__)
                        continue
                    yield from _settings(model.id, Path(config))
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        logger.warning("The Hub was not searched (%s): only what is on this machine was.", type(error).__name__)


def _settings(source: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config, if it is one; folders hold many other things."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(content, dict):
        yield source, content
