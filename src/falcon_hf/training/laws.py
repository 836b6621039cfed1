"""What the vocabulary loss needs of the target's laws, computed once and kept beside the features.

The gradient of KL(p || p^) with respect to f^ is (p^ - p) W, and p W does not depend on the drafter. So a position's
law p over the draft vocabulary comes down to its *mean head row* p W ``[H]``, its negative entropy sum(p log p), and
its likeliest token. With them a step needs two products with the head instead of three, one softmax instead of two: by
the arithmetic of a step of k = 2 (hidden size 576, 8,192 draft tokens, one layer) 70 GFLOP become 60. Top-k lists would
cost as much time and be inexact. Not for heads with a softcap, whose logits are not linear in f^.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..whole_files import write_whole
from .errors import TrainingError
from .features import FeatureCache, Progress, free_bytes, is_whole, write_shard
from .losses import CHUNK, DraftHead

_INDEX = "index.json"


@dataclass(frozen=True)
class TargetLaws:
    """Laws of n positions (leading dimensions may be more).

    Attributes:
        mean_rows: ``[n, H]``, p W.
        negentropy: ``[n]`` float32, sum(p log p).
        labels: ``[n]`` int32, place of the likeliest token in the draft vocabulary.
    """

    mean_rows: torch.Tensor
    negentropy: torch.Tensor
    labels: torch.Tensor

    def take(self, index: torch.Tensor) -> TargetLaws:
        """Those at flat places ``[m]`` of the leading dimensions."""
        rows = self.mean_rows.reshape(-1, self.mean_rows.shape[-1]).index_select(0, index)
        return TargetLaws(
            rows, self.negentropy.flatten().index_select(0, index), self.labels.flatten().index_select(0, index)
        )


@torch.no_grad()
def compute_laws(features: torch.Tensor, head: DraftHead, chunk: int = CHUNK) -> TargetLaws:
    """``[n, H]`` true features -> their laws; the mean rows in the head's dtype.

    Raises:
        ValueError: for a head with a softcap.
    """
    if head.softcap is not None:
        raise ValueError("Laws of a head with a softcap do not come down to a mean row.")
    rows = features.shape[0]
    exact = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    means = torch.empty(rows, head.weight.shape[1], dtype=head.weight.dtype, device=features.device)
    negentropy = torch.empty(rows, dtype=exact, device=features.device)
    labels = torch.empty(rows, dtype=torch.int32, device=features.device)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        logits = head.logits(features[part])
        law = torch.softmax(logits, -1, dtype=exact)
        best = logits.max(-1)
        labels[part] = best.indices.int()
        normaliser = best.values.to(exact) - law.amax(-1).log()
        negentropy[part] = torch.linalg.vecdot(law, logits.to(exact)) - normaliser
        means[part] = torch.mm(law.to(head.weight.dtype), head.weight)
    return TargetLaws(means, negentropy, labels)


class LawCache:
    """Laws on disk, read by dialogue; one shard for each of the feature cache.

    Args:
        features: the cache they were made from.
        folder: where the shards are.
    """

    def __init__(self, features: FeatureCache, folder: Path) -> None:
        self._features = features
        self._folder = folder
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def rows(self, dialogue: int) -> dict[str, torch.Tensor]:
        """Fields of [`TargetLaws`] for a dialogue's tokens, views of the file."""
        number, part = self._features.place(dialogue)
        if number not in self._shards:
            self._shards[number] = load_file(self._folder / _name(number))
        return {name: tensor[part] for name, tensor in self._shards[number].items()}

    @classmethod
    def build(cls, features: FeatureCache, head: DraftHead, progress: Progress | None = None) -> LawCache:
        """Compute what is missing, in a folder inside the feature cache's that is named for the head.

        Raises:
            TrainingError: if the disk has no room; what was written stays.
        """
        computed = f"{head.scale} {head.weight.dtype}"  # the dtype rounds the laws, whatever the head's values
        digest = hashlib.sha256(head.weight.float().cpu().numpy().tobytes() + computed.encode()).hexdigest()
        folder = features.folder / f"laws-{digest[:16]}"
        width = head.weight.shape[1]
        shards = [
            {"file": _name(number), "bytes": estimate_law_bytes(shard["tokens"], width), "tokens": shard["tokens"]}
            for number, shard in enumerate(features.index["shards"])
        ]
        missing = [number for number, shard in enumerate(shards) if not is_whole(folder, shard)]
        needed = sum(shards[number]["bytes"] for number in missing)
        if needed > free_bytes(folder):
            raise TrainingError(
                f"The target's laws need {needed / 1e9:.2f} GB in {folder}, and {free_bytes(folder) / 1e9:.2f} GB are "
                "free: make room, or train without cached laws."
            )
        whole = sum(shard["tokens"] for shard in shards)
        done = whole - sum(shards[number]["tokens"] for number in missing)
        if not missing and (folder / _INDEX).is_file():
            return cls(features, folder)  # which may be on a disk that cannot be written
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / _INDEX, json.dumps({"head": digest, "draft_tokens": head.weight.shape[0]}))
            for number in missing:
                block = features.shard(number)
                parts = []
                for piece in block.split(16 * CHUNK):
                    # Of several feature layers the last is what the head reads.
                    parts.append(compute_laws(piece[:, -width:].to(head.weight.device), head))
                    done += len(piece)
                    if progress is not None:
                        progress(done, whole)
                _write(folder, number, parts)
        except OSError as error:
            raise TrainingError(
                f"Cannot write laws to {folder}: {error}. What was written stays; make room and run again."
            ) from error
        return cls(features, folder)


def estimate_law_bytes(tokens: int, width: int) -> int:
    """Bytes that the laws of ``tokens`` tokens take on disk, for a head of this width."""
    return tokens * (width * 2 + 8)


def _name(number: int) -> str:
    return f"laws-{number:05d}.safetensors"


def _write(folder: Path, number: int, parts: list[TargetLaws]) -> None:
    fields = {
        "mean_rows": torch.cat([part.mean_rows for part in parts]).to("cpu", torch.bfloat16),
        "negentropy": torch.cat([part.negentropy for part in parts]).to("cpu", torch.float32),
        "labels": torch.cat([part.labels for part in parts]).cpu(),
    }
    write_shard(folder / _name(number), fields)
