"""From dialogues to batches: rows of like length together, padded on the right, with their features if they are cached.

And from a batch to pairs: column c of a pair sequence is pair c - (k - 1), see ``modeling_falcon_drafter.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from .dataset import TrainingData
from .features import FeatureCache
from .laws import LawCache, TargetLaws
from .row_draws import mix

# Batches whose rows are sorted by length together: enough for little padding, few enough to stay random.
_SORTED_TOGETHER = 16


class DialogueDataset(Dataset[dict[str, Any]]):
    """Dialogues by number, with their features where a cache has them.

    Args:
        data: the dialogues.
        features: their cache, or None to compute features on the fly.
        numbers: ``[D]``, the caches' number of each dialogue; by default they are as here.
        laws: the cache of the target's laws, if there is one.
    """

    def __init__(
        self,
        data: TrainingData,
        features: FeatureCache | None = None,
        numbers: np.ndarray | None = None,
        laws: LawCache | None = None,
    ) -> None:
        self.data = data
        self.features = features
        self.laws = laws
        self._numbers = np.arange(len(data)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = slice(self.data.offsets[index], self.data.offsets[index + 1])
        item: dict[str, Any] = {"input_ids": self.data.tokens[part], "loss_mask": self.data.loss_mask[part]}
        number = int(self._numbers[index])
        if self.features is not None:
            item["features"] = self.features.rows(number)
        if self.laws is not None:
            item |= self.laws.rows(number)
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items of [`DialogueDataset`] -> ``input_ids``, ``loss_mask`` ``[B, L]``, ``lengths`` ``[B]``, tensors padded."""
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    rows, longest = len(items), int(lengths.max())
    ids = torch.zeros(rows, longest, dtype=torch.long)
    learned = torch.zeros(rows, longest, dtype=torch.bool)
    for row, item in enumerate(items):
        ids[row, : lengths[row]] = torch.from_numpy(np.asarray(item["input_ids"]))
        learned[row, : lengths[row]] = torch.from_numpy(np.asarray(item["loss_mask"]))
    batch = {"input_ids": ids, "loss_mask": learned, "lengths": lengths}
    for name, first in items[0].items():
        if isinstance(first, torch.Tensor):
            padded = torch.zeros(rows, longest, *first.shape[1:], dtype=first.dtype)
            for row, item in enumerate(items):
                padded[row, : lengths[row]] = item[name]
            batch[name] = padded
    return batch


class LengthGroupedOrder(Sampler[int]):
    """A random order whose consecutive batches are of like length, the batches themselves in random order.

    Args:
        lengths: ``[D]`` tokens of each dialogue.
        batch_size: rows of a global batch.
        seed: with the epoch, decides the order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order for another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng(mix(self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        whole = len(order) // self.batch_size * self.batch_size
        together = self.batch_size * _SORTED_TOGETHER
        batches: list[np.ndarray] = []
        for start in range(0, whole, together):
            part = order[start : min(start + together, whole)]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [
                random.permutation(part[at : at + self.batch_size]) for at in range(0, len(part), self.batch_size)
            ]
        shuffled = [batches[place] for place in random.permutation(len(batches))]
        for batch in (*shuffled, order[whole:]):  # an incomplete batch comes last
            yield from batch.tolist()


@dataclass(frozen=True)
class PairBatch:
    """Pairs of a batch; S columns.

    Attributes:
        features: ``[B, S, W]``, the pair's feature; zeros for start pairs and padding.
        tokens: ``[B, S]``, the pair's token (0 where there is none).
        real: ``[B, S]`` bool: a pair or a start pair, no padding.
        paired: ``[B, S]`` bool: a pair, whose feature and token are true.
        targets: ``[B, S, H]``, the feature to estimate, f_{c+1}; a view where features are one layer's.
        answers: ``[B, S]``, the token that f_{c+1} leads to, t_{c+2}.
        learned: ``[B, S]`` bool, columns with a loss.
        laws: of the targets, ``[B, S]`` leading, where they came with the batch.
    """

    features: torch.Tensor
    tokens: torch.Tensor
    real: torch.Tensor
    paired: torch.Tensor
    targets: torch.Tensor
    answers: torch.Tensor
    learned: torch.Tensor
    laws: TargetLaws | None = None

    @property
    def before(self) -> torch.Tensor:
        """``[B, S]``, the token in front of each answer."""
        return F.pad(self.answers[:, :-1], (1, 0))

    def rows(self, order: list[int]) -> PairBatch:
        """The same rows in another order."""
        index = torch.tensor(order, device=self.tokens.device)
        tensors = {name: value[index] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        laws = self.laws
        if laws is not None:
            laws = TargetLaws(*(value[index] for value in (laws.mean_rows, laws.negentropy, laws.labels)))
        return PairBatch(**tensors, laws=laws)


def make_pairs(batch: dict[str, torch.Tensor], block_size: int, hidden_size: int) -> PairBatch:
    """Lay a batch (features ``[B, L, W]``) out as pairs: k - 1 start pairs and L - 1 pairs, S = L + k - 2 columns."""
    ids, features, lengths = batch["input_ids"], batch["features"], batch["lengths"]
    k, longest = block_size, ids.shape[1]
    columns = longest + k - 2

    def placed(pairs: torch.Tensor, back: int) -> torch.Tensor:
        """Put entry 0 into column ``back`` (or drop the first ``-back``), and cut or fill up to S columns."""
        pairs = pairs[:, max(-back, 0) :]
        after = columns - max(back, 0) - pairs.shape[1]
        ends = (max(back, 0), after) if pairs.ndim == 2 else (0, 0, max(back, 0), after)
        return F.pad(pairs, ends)

    column = torch.arange(columns, device=ids.device)[None]
    paired = (column >= k - 1) & (column < lengths[:, None] + k - 2)  # pairs 0 to n - 2
    within = column < lengths[:, None] - 2  # t_{c+2} exists
    laws = None
    if "mean_rows" in batch:
        laws = TargetLaws(*(placed(batch[name], -1) for name in ("mean_rows", "negentropy", "labels")))
    return PairBatch(
        features=placed(features, k - 1) * paired[..., None],
        tokens=placed(ids[:, 1:], k - 1) * paired,
        real=column < lengths[:, None] + k - 2,
        paired=paired,
        targets=placed(features[..., -hidden_size:], -1),
        answers=placed(ids, -2),
        learned=placed(batch["loss_mask"], -2) & within,
        laws=laws,
    )
