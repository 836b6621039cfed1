"""Reading of training text, and every way in which it can be wrong."""

from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from falcon_hf.training.dataset import joined, load_training_data, rows_not_in, split
from falcon_hf.training.errors import TrainingError

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 1, 1]},
    {"input_ids": [1, 2, 3, 4, 5, 6, 7], "loss_mask": [0, 0, 0, 1, 0, 1, 1]},
    {"input_ids": [9, 9, 9, 9], "loss_mask": [0, 0, 0, 1]},
]


def write_lines(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def rows_of(data):
    return [
        {"input_ids": data.tokens[a:b].tolist(), "loss_mask": data.loss_mask[a:b].astype(int).tolist()}
        for a, b in zip(data.offsets, data.offsets[1:], strict=False)
    ]


@pytest.mark.parametrize("kind", ["folder", "shuffled", "jsonl", "jsonl.gz", "p and r"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / "data"
    if kind == "folder":
        Dataset.from_list([{**row, "source": "x"} for row in ROWS]).save_to_disk(path)
    elif kind == "shuffled":  # an indices mapping over the table
        Dataset.from_list(ROWS[::-1]).select([2, 1, 0]).save_to_disk(path)
    elif kind == "p and r":
        pairs = [{"p": row["input_ids"][:2], "r": row["input_ids"][2:]} for row in ROWS]
        path = write_lines(tmp_path / "data.jsonl", pairs)
    else:
        path = write_lines(tmp_path / f"data.{kind}", ROWS)
    data = load_training_data(path, 10, 100)
    assert len(data) == 3
    expected = ROWS
    if kind == "p and r":
        expected = [{**row, "loss_mask": [0, 0] + [1] * (len(row["input_ids"]) - 2)} for row in ROWS]
    assert rows_of(data) == expected


def test_cut_rows_and_rows_without_anything_to_learn(tmp_path):
    """Row 2 loses its only learned token by the cut at 3; nothing of a text's first two tokens is ever estimated."""
    first_only = {"input_ids": [1, 2, 3, 4], "loss_mask": [1, 1, 0, 0]}
    path = write_lines(tmp_path / "data.jsonl", [*ROWS, first_only, {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1]}])
    data = load_training_data(path, 10, 4)
    assert rows_of(data) == [{name: row[name][:4] for name in row} for row in ROWS]
    with pytest.raises(TrainingError, match="token to learn"):
        load_training_data(write_lines(tmp_path / "none.jsonl", [first_only]), 10, 100)


def test_hash_tells_texts_apart_and_not_files(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    folder = load_training_data(tmp_path / "folder", 10, 100)
    lines = load_training_data(write_lines(tmp_path / "data.jsonl", ROWS), 10, 100)
    assert folder.sha256() == lines.sha256()
    changed = [{**ROWS[0], "loss_mask": [0, 0, 0, 1, 1]}, *ROWS[1:]]
    hashes = {
        load_training_data(write_lines(tmp_path / f"{n}.jsonl", rows), 10, 100).sha256()
        for n, rows in enumerate([ROWS, changed, ROWS[::-1], ROWS[:2]])
    }
    assert len(hashes) == 4


def refused(path, *words, vocab_size=10):
    with pytest.raises(TrainingError) as error:
        load_training_data(path, vocab_size, 100)
    for word in words:
        assert word in str(error.value)


def test_missing_data(tmp_path):
    refused(tmp_path / "nothing", "nothing", "distill")


def test_missing_columns(tmp_path):
    Dataset.from_list([{"input_ids": [1, 2, 3, 4], "text": "x"}]).save_to_disk(tmp_path / "data")
    refused(tmp_path / "data", "loss_mask", "text")
    refused(write_lines(tmp_path / "a.jsonl", [ROWS[0], {"input_ids": [1, 2]}]), "line 2", "loss_mask")


def test_several_splits(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "data")
    refused(tmp_path / "data", "splits", "train")


def test_other_vocabulary(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    refused(path, "token id 9", "9 tokens", vocab_size=9)
    refused(write_lines(tmp_path / "b.jsonl", [{**ROWS[0], "input_ids": [-1, 6, 7, 8, 9]}]), "token id -1")


def test_masks_of_another_length(tmp_path):
    wrong = {**ROWS[0], "loss_mask": [1]}
    refused(write_lines(tmp_path / "a.jsonl", [ROWS[1], wrong]), "line 2", "same length")
    Dataset.from_list([wrong]).save_to_disk(tmp_path / "data")
    refused(tmp_path / "data", "same length")


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": "text", "loss_mask": [1, 1, 1, 1]},
        {"input_ids": 3, "loss_mask": 1},
        [1],
        {"input_ids": [[5, 6, 7]], "loss_mask": [[0, 1, 1]]},
        {"input_ids": [1.7, 2.9], "loss_mask": [0, 1]},
        {"input_ids": [2**40 + 5, 6], "loss_mask": [0, 1]},
        {"input_ids": [2**70, 6], "loss_mask": [0, 1]},
        {"input_ids": [5, 6], "loss_mask": [[0], [1]]},
    ],
)
def test_values_that_are_no_ids(tmp_path, row):
    refused(write_lines(tmp_path / "a.jsonl", [row]), "line 1")


def test_truncated_files(tmp_path):
    whole = write_lines(tmp_path / "a.jsonl.gz", ROWS * 50).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "b.jsonl.gz", "breaks off")
    text = write_lines(tmp_path / "c.jsonl", ROWS).read_text()
    (tmp_path / "d.jsonl").write_text(text[:-10])
    refused(tmp_path / "d.jsonl", "line 3", "truncated")
    (tmp_path / "e.jsonl").write_text("")
    refused(tmp_path / "e.jsonl", "empty")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    (shard,) = (tmp_path / "data").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:200])
    refused(tmp_path / "data", "truncated")


def test_joined_texts_keep_their_order(tmp_path):
    paths = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", ROWS[1:]), ("b", ROWS[:1]))]
    texts = [load_training_data(path, 10, 100) for path in paths]
    assert rows_of(joined(texts)) == [*ROWS[1:], *ROWS[:1]]
    assert rows_of(split(joined(texts), 1)[1]) == ROWS[:1]
    assert joined(texts[:1]).sha256() == texts[0].sha256() != joined(texts[::-1]).sha256()


def test_split_holds_the_last_out(tmp_path):
    data = load_training_data(write_lines(tmp_path / "a.jsonl", ROWS), 10, 100)
    train, held_out = split(data, 1)
    assert rows_of(train) == ROWS[:2]
    assert rows_of(held_out) == ROWS[2:]
    assert len(split(data, 0)[1]) == 0
    with pytest.raises(TrainingError, match="3 dialogues"):
        split(data, 3)


def test_rows_that_another_text_has_not(tmp_path):
    """To the last token: a beginning is another dialogue."""
    longer = {"input_ids": [*ROWS[2]["input_ids"], 1], "loss_mask": [0, 0, 0, 1, 1]}
    data = load_training_data(write_lines(tmp_path / "a.jsonl", [*ROWS, longer]), 10, 100)
    other = load_training_data(write_lines(tmp_path / "b.jsonl", [ROWS[2], ROWS[0]]), 10, 100)
    assert rows_not_in(data, other).tolist() == [1, 3]
    assert rows_not_in(data, split(other, 0)[1]).tolist() == [0, 1, 2, 3]


def test_a_distillation_that_has_not_finished(tmp_path):
    write_lines(tmp_path / "dialogues.jsonl", [{"n": 0, "p": [1, 2], "r": [3, 4, 5]}])
    with pytest.raises(TrainingError, match=r"same distill command.*or give .*dialogues\.jsonl"):
        load_training_data(tmp_path, 10, 100)
    assert len(load_training_data(tmp_path / "dialogues.jsonl", 10, 100)) == 1
    Dataset.from_list(ROWS).save_to_disk(tmp_path)  # finished
    assert len(load_training_data(tmp_path, 10, 100)) == 3
