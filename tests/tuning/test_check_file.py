"""A check's file: a check that was cut off goes on, and no other one does."""

import json

import pytest

from falcon_hf.tuning.check import Measurement, Turn
from falcon_hf.tuning.check_file import CheckFile, read_check
from falcon_hf.tuning.errors import TuningError

PLAN = {"settings": [["drafter", [[0], [1]]]], "repeats": 1}
TURNS = [Turn(task, (Measurement(1, 9, 1.5, 9), Measurement(1, 9, 1.0, 4))) for task in ("sums", "tales")]


def test_a_check_goes_on_where_it_was(tmp_path):
    path = tmp_path / "folder" / "check.json"
    CheckFile(path, PLAN).add(TURNS[0])
    again = CheckFile(path, PLAN)
    assert again.turns == TURNS[:1]
    assert again.result is None
    with pytest.raises(TuningError, match="cut off"):
        read_check(path)
    again.add(TURNS[1])
    again.finish({"settings": []})
    whole = CheckFile(path, PLAN)
    assert whole.turns == TURNS
    assert whole.result == read_check(path)
    assert whole.result["complete"]


def test_another_check_is_refused(tmp_path):
    path = tmp_path / "check.json"
    CheckFile(path, PLAN).add(TURNS[0])
    before = path.read_text()
    with pytest.raises(TuningError, match="other settings"):
        CheckFile(path, PLAN | {"repeats": 2})
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format="falcon-hf-check/1"), "older"),
        (lambda value: value.pop("turns"), "not a result"),
        (lambda value: value.update(complete=True), "not a result"),  # without a comparison's settings
        (lambda value: value["turns"][0].pop("calls"), "damaged"),
        (lambda value: value["turns"][0]["calls"][0].update(joules=1), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    path = tmp_path / "check.json"
    CheckFile(path, PLAN).add(TURNS[0])
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(TuningError, match=message):
        CheckFile(path, PLAN)
