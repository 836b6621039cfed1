"""A target's features of training text: computed on the fly, or once and kept on disk for every epoch and run.

The cache is a folder: ``index.json`` and safetensors shards of bfloat16, each with the rows of whole dialogues in the
data's order. A shard is written beside its name and renamed, and the index after it, so that whatever happens, what the
index names is whole; a cache that broke off goes on, and two runs may fill one cache.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..runtime.target import fingerprint
from ..whole_files import whole_file, write_whole
from .dataset import TrainingData
from .errors import TrainingError

logger = logging.getLogger(__name__)

_INDEX = "index.json"
_VERSION = 1
_TENSOR = "features"
_SHARD_BYTES = 256 * 2**20
_BATCH_TOKENS = 4096
# Checkpoints, logs and other people need room too.
_FREE_SHARE = 0.5

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


def feature_width(target: PreTrainedModel, feature_layers: list[int] | None = None) -> int:
    """W: H, or H times the number of feature layers."""
    return int(target.config.get_text_config().hidden_size) * len(feature_layers or [0])


def estimate_bytes(tokens: int, width: int, element: int = 2) -> int:
    """Bytes that the features of ``tokens`` tokens take on disk."""
    return tokens * width * element


def cache_fits(folder: str | Path, size: int) -> bool:
    """Whether a cache of ``size`` bytes takes no more than half of what is free where ``folder`` is or will be."""
    return size <= free_bytes(folder) * _FREE_SHARE


def free_bytes(folder: str | Path) -> int:
    """Bytes free on the file system where ``folder`` is or will be."""
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def target_digest(target: PreTrainedModel) -> str:
    """Hash of every weight's shape, dtype and up to 256 of its values: changes with any fine-tune, merge or dtype."""
    digest = hashlib.sha256()
    for whole_name, whole in target.state_dict().items():
        for name, weight in _plain_tensors(whole_name, whole):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, len(flat) // 256)][:256]
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight, or the tensors that a quantised one (torchao's) is made of: it takes no views and slices itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(weight, part))


def held_digest(target: PreTrainedModel) -> str | None:
    """[`target_digest`], or None for a target whose weights are offloaded."""
    return None if any(weight.is_meta for weight in target.parameters()) else target_digest(target)


@torch.no_grad()
def compute_features(
    target: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    feature_layers: list[int] | None = None,
) -> torch.Tensor:
    """``[B, L]`` right-padded ids -> ``[B, L, W]`` features, in the target's dtype.

    The last hidden state is the one behind the final norm, as at inference; several layers' lie side by side.
    """
    options: dict[str, Any] = {"use_cache": False, "output_hidden_states": True, "return_dict": True}
    if "logits_to_keep" in inspect.signature(target.forward).parameters:
        options["logits_to_keep"] = 1  # the head over all positions costs more than the features
    states = target(input_ids=input_ids, attention_mask=attention_mask, **options).hidden_states
    if feature_layers is None:
        return states[-1]
    return torch.cat([states[layer] for layer in feature_layers], dim=-1)


class FeatureCache:
    """Features on disk, read by dialogue; made by [`build`] or [`open`].

    Args:
        folder: where the shards are.
        index: the content of ``index.json``.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.index = index
        self._shards: dict[int, torch.Tensor] = {}
        self._offsets = np.asarray(index["offsets"], dtype=np.int64)
        self._first_rows = np.asarray([shard["first_dialogue"] for shard in index["shards"]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def rows(self, dialogue: int) -> torch.Tensor:
        """``[n, W]``: the features of a dialogue's n tokens, a view of the file as long as nobody writes to it."""
        number, part = self.place(dialogue)
        return self.shard(number)[part]

    def place(self, dialogue: int) -> tuple[int, slice]:
        """A dialogue's shard, and its rows there."""
        number = int(np.searchsorted(self._first_rows, dialogue, side="right")) - 1
        start = self._offsets[self._first_rows[number]]
        return number, slice(int(self._offsets[dialogue] - start), int(self._offsets[dialogue + 1] - start))

    def shard(self, number: int) -> torch.Tensor:
        """``[tokens, W]``, mapped into memory when first asked for."""
        if number not in self._shards:
            self._shards[number] = load_file(self.folder / self.index["shards"][number]["file"])[_TENSOR]
        return self._shards[number]

    @classmethod
    def open(cls, folder: str | Path, key: dict[str, Any]) -> FeatureCache:
        """Open a finished cache and check that it is what ``key`` says (see [`cache_key`]).

        Raises:
            TrainingError: no cache, an unfinished one, one of other text or of another target, a missing or truncated
                shard.
        """
        folder = Path(folder).expanduser()
        index = _read_index(folder)
        if index is None:
            raise TrainingError(f"There is no feature cache in {folder}.")
        _check_key(folder, index, key)
        if not index["complete"]:
            raise TrainingError(
                f"The feature cache in {folder} is not finished; run the training again, it will go on."
            )
        for shard in index["shards"]:
            if not is_whole(folder, shard):
                raise TrainingError(
                    f"Shard {folder / shard['file']} is missing or truncated; delete it and run again: only it will be "
                    "computed anew."
                )
        return cls(folder, index)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        target: PreTrainedModel,
        data: TrainingData,
        key: dict[str, Any],
        feature_layers: list[int] | None = None,
        progress: Progress | None = None,
        shard_bytes: int = _SHARD_BYTES,
        ready: Callable[[int], torch.Tensor | None] | None = None,
    ) -> FeatureCache:
        """Compute what the cache lacks, shard by shard, and open it.

        Args:
            folder: where; made if it is not there.
            target: in evaluation mode.
            data: all dialogues, in the order they will be asked for.
            key: see [`cache_key`].
            feature_layers: hidden states side by side, or None for the last.
            progress: called after every batch and every shard.
            shard_bytes: about how much a shard holds.
            ready: ``ready(dialogue)`` gives features ``[n, W]`` that are there already, or None: the target computes
                the shards that lack any.

        Raises:
            TrainingError: a cache of other text or of another target is there, or the disk has no room; what had been
                written stays, and the next call goes on from there.
        """
        folder = Path(folder).expanduser()
        width = feature_width(target, feature_layers)
        index = _read_index(folder)
        if index is None:
            index = {
                **key,
                "complete": False,
                "offsets": data.offsets.tolist(),
                "shards": _plan(data, width, shard_bytes),
            }
        else:
            _check_key(folder, index, key)
        missing = [shard for shard in index["shards"] if not is_whole(folder, shard)]
        if index["complete"] and not missing:
            return cls.open(folder, key)  # nothing is written: the folder may be read-only, or of several runs
        needed = sum(shard["bytes"] for shard in missing)
        if needed > free_bytes(folder):
            raise TrainingError(
                f"The features need {needed / 1e9:.2f} GB in {folder}, and {free_bytes(folder) / 1e9:.2f} GB are free: "
                "make room, name another folder, cut the text shorter, or compute the features on the fly."
            )
        done = int(data.offsets[-1]) - sum(shard["tokens"] for shard in missing)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / _INDEX, json.dumps({**index, "complete": not missing}))
            for shard in missing:
                rows = range(shard["first_dialogue"], shard["end_dialogue"])
                block = _ready_shard(rows, ready)
                if block is None:
                    block = _compute_shard(target, data, rows, width, feature_layers, progress, done)
                write_shard(folder / shard["file"], {_TENSOR: block})
                done += shard["tokens"]
                if progress is not None:
                    progress(done, int(data.offsets[-1]))
            write_whole(folder / _INDEX, json.dumps({**index, "complete": True}))
        except OSError as error:
            raise TrainingError(
                f"Cannot write features to {folder}: {error}. What was written stays; make room and run again."
            ) from error
        return cls.open(folder, key)


def is_complete(folder: Path) -> bool:
    """Whether all of a cache's features are there; whose they are is not looked at.

    Raises:
        TrainingError: if the index is damaged.
    """
    index = _read_index(folder)
    return index is not None and index["complete"] and all(is_whole(folder, shard) for shard in index["shards"])


def cache_key(
    target: PreTrainedModel, data: TrainingData, max_length: int, feature_layers: list[int] | None
) -> dict[str, Any]:
    """What makes a cache this target's and this text's.

    Raises:
        TrainingError: if the target's weights are offloaded, so that no hash of them can be taken.
    """
    digest = held_digest(target)
    if digest is None:
        raise TrainingError("Features of an offloaded target cannot be cached: set features to 'live'.")
    return {
        "version": _VERSION,
        "target": digest,
        "target_fingerprint": fingerprint(target),
        "target_name": target.config._name_or_path,
        "data": data.sha256(),
        "max_length": max_length,
        "feature_layers": feature_layers,
    }


_MEANINGS = {
    "version": "it was written by another version of falcon_hf",
    "target": "the target has changed (other weights or dtype)",
    "data": "the training text has changed",
    "max_length": "the text was cut at another length",
    "feature_layers": "it holds other layers' states",
}


def _check_key(folder: Path, index: dict[str, Any], key: dict[str, Any]) -> None:
    for name, meaning in _MEANINGS.items():
        if index.get(name) != key[name]:
            raise TrainingError(
                f"The features in {folder} cannot serve: {meaning}. Name another folder, or delete this one."
            )


def _plan(data: TrainingData, width: int, shard_bytes: int) -> list[dict[str, Any]]:
    """Shards of whole dialogues."""
    shards: list[dict[str, Any]] = []
    first = 0
    while first < len(data):
        limit = data.offsets[first] + max(1, shard_bytes // (2 * width))
        end = max(first + 1, int(np.searchsorted(data.offsets, limit, side="right")) - 1)
        tokens = int(data.offsets[end] - data.offsets[first])
        name = f"features-{len(shards):05d}.safetensors"
        entry = {"first_dialogue": first, "end_dialogue": end, "tokens": tokens, "bytes": tokens * width * 2}
        shards.append({"file": name, **entry})
        first = end
    return shards


def _ready_shard(rows: range, ready: Callable[[int], torch.Tensor | None] | None) -> torch.Tensor | None:
    """``[tokens, W]`` of the dialogues ``rows`` if all of them are ready."""
    blocks: list[torch.Tensor] = []
    for row in rows:
        block = None if ready is None else ready(row)
        if block is None:
            return None
        blocks.append(block)
    return torch.cat(blocks)


def _compute_shard(
    target: PreTrainedModel,
    data: TrainingData,
    rows: range,
    width: int,
    feature_layers: list[int] | None,
    progress: Progress | None,
    done: int,
) -> torch.Tensor:
    """``[tokens, W]`` bfloat16; dialogues of like length share a forward."""
    start = int(data.offsets[rows.start])
    block = torch.empty(int(data.offsets[rows.stop]) - start, width, dtype=torch.bfloat16)
    lengths = data.lengths
    waiting = sorted(rows, key=lambda row: lengths[row])
    whole = int(data.offsets[-1])
    while waiting:
        batch = [waiting.pop()]
        longest = int(lengths[batch[0]])
        while waiting and (len(batch) + 1) * longest <= _BATCH_TOKENS:
            batch.append(waiting.pop())
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for place, row in enumerate(batch):
            ids[place, : lengths[row]] = torch.from_numpy(data.tokens[data.offsets[row] : data.offsets[row + 1]])
            mask[place, : lengths[row]] = 1
        states = compute_features(target, ids.to(target.device), mask.to(target.device), feature_layers)
        states = states.to("cpu", torch.bfloat16)
        for place, row in enumerate(batch):
            block[data.offsets[row] - start : data.offsets[row + 1] - start] = states[place, : lengths[row]]
            done += int(lengths[row])
        if progress is not None:
            progress(done, whole)
    if not bool(block.isfinite().all()):
        raise TrainingError("The target's features are not finite; load it in bfloat16 or float32.")
    return block


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file in one step.

    Raises:
        OSError: if it cannot be written.
    """
    with whole_file(path) as scratch:
        try:
            save_file(tensors, scratch)
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(str(error)) from error


def is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard's file has the header and the bytes that it must have."""
    path = folder / shard["file"]
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        return path.stat().st_size == 8 + header + int(shard["bytes"])
    except OSError:
        return False


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / _INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return {**index, "shards": index["shards"], "offsets": index["offsets"], "complete": index["complete"]}
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); delete the folder and run again.") from error
