"""Training text: token ids and loss masks, held flat in memory, read from a ``datasets`` folder or from JSON lines.

A *dialogue* is one row: token ids, and a mask that is 1 where a token is to be learned (the target's own words). Rows
lie one behind the other in one array, so that a row of tokens and a row of features are one slice each.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TrainingError

COLUMNS = ("input_ids", "loss_mask")
# What save_to_disk writes: one of them is in any folder of it.
_DATASET_FILES = ("state.json", "dataset_dict.json")
# A pair needs a token behind it, and a target one more.
_SHORTEST = 4


@dataclass(frozen=True)
class TrainingData:
    """D dialogues of N tokens in all.

    Attributes:
        tokens: ``[N]`` int32.
        loss_mask: ``[N]`` bool, True where the token is to be learned.
        offsets: ``[D + 1]`` int64; dialogue d is ``offsets[d]`` to ``offsets[d + 1]`` - 1.
        source: where it was read from.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    source: str = ""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """``[D]``, tokens of each dialogue."""
        return np.diff(self.offsets)

    def sha256(self) -> str:
        """Hash of tokens, masks and offsets: what tells one data set from another, whatever file it came from."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.tokens, np.packbits(self.loss_mask)):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def subset(self, rows: np.ndarray) -> TrainingData:
        """The dialogues ``rows``, in that order."""
        slices = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        lengths = self.lengths[rows]
        return TrainingData(
            np.concatenate([self.tokens[part] for part in slices]) if slices else self.tokens[:0],
            np.concatenate([self.loss_mask[part] for part in slices]) if slices else self.loss_mask[:0],
            np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            self.source,
        )


def load_training_data(path: str | Path, vocab_size: int, max_length: int) -> TrainingData:
    """Read a folder of ``datasets.Dataset.save_to_disk``, or a ``.jsonl`` or ``.jsonl.gz`` file.

    Rows have ``input_ids`` and ``loss_mask``; JSON lines may have ``p`` (prompt ids) and ``r`` (answer ids) instead.
    Rows are cut at ``max_length`` tokens; what then has nothing to learn, or is shorter than 4 tokens, is left out.

    Args:
        path: folder or file.
        vocab_size: V of the target; ids must lie below it.
        max_length: tokens kept of a row.

    Raises:
        TrainingError: missing or empty data, missing columns, masks of another length, a truncated file, ids of another
            vocabulary.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        tokens, mask, offsets = _read_folder(path)
    elif path.is_file():
        if path.suffix not in (".jsonl", ".json", ".gz"):
            raise TrainingError(f"{path} is neither .jsonl nor .jsonl.gz, nor a folder of a saved datasets.Dataset.")
        tokens, mask, offsets = _read_lines(path)
    else:
        raise TrainingError(f"There is no training data at {path}; make some with `falcon-hf distill`.")
    if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        wrong = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise TrainingError(
            f"{path} has token id {wrong}, but the target's vocabulary has {vocab_size} tokens: it was made for "
            "another target. Distill anew with this one."
        )
    return _usable(TrainingData(tokens, mask, offsets, str(path)), max_length)


def joined(texts: list[TrainingData]) -> TrainingData:
    """All dialogues of at least one text, in their order."""
    return TrainingData(
        np.concatenate([text.tokens for text in texts]),
        np.concatenate([text.loss_mask for text in texts]),
        np.concatenate(([0], np.cumsum(np.concatenate([text.lengths for text in texts])))).astype(np.int64),
        ", ".join(text.source for text in texts),
    )


def split(data: TrainingData, held_out: int) -> tuple[TrainingData, TrainingData]:
    """Training and held-out dialogues: the last ``held_out`` ones, so that more data in front changes neither.

    Raises:
        TrainingError: if nothing is left to train on.
    """
    if held_out >= len(data):
        raise TrainingError(
            f"{data.source or 'The data'} has {len(data)} dialogues; cannot hold {held_out} of them out."
        )
    rows = np.arange(len(data))
    cut = len(data) - held_out
    return data.subset(rows[:cut]), data.subset(rows[cut:])


def rows_not_in(data: TrainingData, other: TrainingData) -> np.ndarray:
    """Numbers of the dialogues of ``data`` that ``other`` has not, to the last token."""
    there = {other.tokens[start:end].tobytes() for start, end in itertools.pairwise(other.offsets)}
    new = [data.tokens[start:end].tobytes() not in there for start, end in itertools.pairwise(data.offsets)]
    return np.flatnonzero(new)


def _usable(data: TrainingData, max_length: int) -> TrainingData:
    """Cut at ``max_length``, and leave out rows with nothing to learn."""
    lengths = np.minimum(data.lengths, max_length)
    position = np.arange(len(data.tokens)) - np.repeat(data.offsets[:-1], data.lengths)
    row = np.repeat(np.arange(len(data)), data.lengths)
    # The first two tokens of a text are never estimated: f_1 is the first estimate, and gives the law of token 2.
    learned = np.bincount(
        row, weights=data.loss_mask & (position >= 2) & (position < lengths[row]), minlength=len(data)
    )
    keep = (learned > 0) & (lengths >= _SHORTEST)
    if not keep.any():
        raise TrainingError(
            f"{data.source} has no dialogue with a token to learn within {max_length} tokens (loss_mask is 1 there)."
        )
    chosen = keep[row] & (position < lengths[row])
    offsets = np.concatenate(([0], np.cumsum(lengths[keep]))).astype(np.int64)
    return TrainingData(data.tokens[chosen], data.loss_mask[chosen], offsets, data.source)


def _read_folder(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from datasets import Dataset, load_from_disk

    dialogues = path / "dialogues.jsonl"
    if dialogues.is_file() and not any((path / name).is_file() for name in _DATASET_FILES):
        raise TrainingError(
            f"{path} is of a `falcon-hf distill` that has not finished: run the same distill command again to finish "
            f"it, or give {dialogues} to train on what is there."
        )
    try:
        data = load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise whatever they like for a damaged file
        raise TrainingError(
            f"{path} is no readable dataset ({type(error).__name__}: {error}); it may be truncated. Save it again."
        ) from error
    if not isinstance(data, Dataset):
        raise TrainingError(f"{path} holds several splits ({', '.join(data)}); name the folder of one of them.")
    missing = [column for column in COLUMNS if column not in data.column_names]
    if missing:
        raise TrainingError(
            f"{path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; it has "
            f"{', '.join(data.column_names) or 'none'}. `falcon-hf distill` makes the right ones."
        )
    data = data.select_columns(list(COLUMNS)).flatten_indices()
    ids, ids_at = _flat_column(data, "input_ids", np.int32, path)
    mask, mask_at = _flat_column(data, "loss_mask", np.bool_, path)
    if not np.array_equal(ids_at, mask_at):
        raise TrainingError(f"In {path}, input_ids and loss_mask of a row must have the same length.")
    return ids, mask, ids_at


def _flat_column(data: Any, name: str, dtype: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A list column's values one behind the other, and where each row begins."""
    values: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for chunk in data.data.column(name).chunks:
        try:
            values.append(chunk.flatten().to_numpy(zero_copy_only=False).astype(dtype))
            lengths.append(chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
        except (AttributeError, TypeError, ValueError) as error:
            raise TrainingError(f"Column {name} of {path} must be lists of integers: {error}") from error
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum().astype(np.int64)
    return np.concatenate(values) if values else np.zeros(0, dtype), offsets


def _read_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    number = 0
    try:
        for number, row in enumerate(_rows(path), start=1):  # what is no JSON is the line behind ``number``
            ids, mask = _ids_and_mask(row)
            if len(ids) != len(mask):
                raise TrainingError(f"{path}, line {number}: input_ids and loss_mask must have the same length.")
            tokens.append(_whole_numbers(ids))
            masks.append(_whole_numbers(mask).astype(np.bool_))
    except json.JSONDecodeError as error:
        raise TrainingError(f"{path}, line {number + 1} is no JSON ({error}); the file may be truncated.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} breaks off behind line {number} ({error}): copy it again.") from error
    except KeyError as error:
        raise TrainingError(
            f"{path}, line {number} lacks {error}; a line needs input_ids and loss_mask, or p and r."
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"{path}, line {number}: ids and masks must be lists of integers ({error}).") from error
    if not tokens:
        raise TrainingError(f"{path} is empty.")
    offsets = np.concatenate(([0], np.cumsum([len(ids) for ids in tokens]))).astype(np.int64)
    return np.concatenate(tokens), np.concatenate(masks), offsets


def _whole_numbers(values: Any) -> np.ndarray:
    """A flat list of int32's integers, as an array; ValueError on any other."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iub" and len(array)):
        raise ValueError(f"got {values!r:.80}")
    limits = np.iinfo(np.int32)
    if len(array) and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ValueError(f"{array.max()} is no token's id")
    return array.astype(np.int32)


def _rows(path: Path) -> Iterator[Any]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _ids_and_mask(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    if "p" in row and "input_ids" not in row:
        return row["p"] + row["r"], [0] * len(row["p"]) + [1] * len(row["r"])
    return row["input_ids"], row["loss_mask"]
