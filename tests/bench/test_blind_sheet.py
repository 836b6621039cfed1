"""The sheet: every text that differs, sides drawn by the seed, names only in the key, and its score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from falcon_hf.bench.blind_sheet import make_pairs, score, write_sheet
from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.questions import Question, QuestionSet

from .test_summary import entry

COUNT = 12
QUESTIONS = QuestionSet.of("sky.jsonl", [Question(n, "a", (f"Why {n} < {n + 1}?", "And?")) for n in range(COUNT)])


@pytest.fixture
def result() -> dict[str, Any]:
    """Falcon differs from plain on every question but the last, on the second turn of question 0 too."""
    runs = []
    for number in range(COUNT):
        same = number == COUNT - 1
        runs.append(entry("plain", number, 1.0, 5, text=f"plain {number}"))
        text = {} if same else {"text": f"<b>other</b> {number}"}
        runs.append(entry("falcon", number, 1.0, 5, identical=same, **text))
    runs.append(entry("plain", 0, 1.0, 5, turn=1, text="plain 0b"))
    runs.append(entry("falcon", 0, 1.0, 5, turn=1, identical=False, text="other 0b"))
    runs.append(entry("falcon", 0, 1.0, 5, repeat=1, identical=False, text="repeat"))
    settings = {"questions": {"file": "sky.jsonl", "sha256": QUESTIONS.sha256}, "seeds": [0]}
    return {"settings": settings, "runs": runs}


def test_one_pair_a_text_that_differs(result: dict[str, Any]) -> None:
    pairs = make_pairs(result, QUESTIONS, seed=0)
    assert sorted(pair.question_id for pair in pairs) == list(range(COUNT - 1))  # one a question, of one of its turns
    for pair in pairs:
        texts = {pair.methods[0]: pair.left, pair.methods[1]: pair.right}
        assert texts["plain"].startswith("plain")
        assert "other" in texts["falcon"]
        assert len(pair.turns) == pair.turn + 1
        assert pair.answers == ("plain 0",) * pair.turn
    turns = {pair.turn for seed in range(9) for pair in make_pairs(result, QUESTIONS, seed) if pair.question_id == 0}
    assert turns == {0, 1}


def test_several_methods_do_not_give_plain_away(result: dict[str, Any]) -> None:
    """No text comes twice: the one that did would be plain's."""
    result["runs"] += [{**run, "method": "lookup", "text": "third " + run["text"]}
                       for run in result["runs"] if run["method"] == "falcon" and "text" in run]  # fmt: skip
    pairs = make_pairs(result, QUESTIONS, seed=0)
    shown = [text for pair in pairs for text in (pair.left, pair.right)]
    assert len(shown) == len(set(shown)) == 2 * (COUNT - 1)
    assert {method for pair in pairs for method in pair.methods} == {"plain", "falcon", "lookup"}


def test_sides_and_order_are_drawn_by_the_seed(result: dict[str, Any]) -> None:
    pairs = make_pairs(result, QUESTIONS, seed=0)
    assert pairs == make_pairs(result, QUESTIONS, seed=0)
    assert pairs != make_pairs(result, QUESTIONS, seed=1)
    assert {pair.methods[0] for pair in pairs} == {"plain", "falcon"}
    assert [pair.question_id for pair in pairs] != sorted(pair.question_id for pair in pairs)


def test_the_page_does_not_say_who_is_who(result: dict[str, Any], tmp_path: Path) -> None:
    key = write_sheet(result, QUESTIONS, tmp_path / "sheet.html", seed=3)
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "falcon" not in page
    assert page.count("<section>") == COUNT - 1
    assert "&lt;b&gt;other&lt;/b&gt; 3" in page
    assert "<b>other" not in page
    assert "Why 3 &lt; 4?" in page
    assert "http" not in page  # nothing is loaded
    assert key == tmp_path / "sheet.key.json"
    content = json.loads(key.read_text(encoding="utf-8"))
    pairs = make_pairs(result, QUESTIONS, seed=3)
    assert [(one["left"], one["right"]) for one in content["pairs"]] == [pair.methods for pair in pairs]
    assert content["seed"] == 3


def test_score(result: dict[str, Any], tmp_path: Path) -> None:
    key = json.loads(write_sheet(result, QUESTIONS, tmp_path / "sheet.html").read_text(encoding="utf-8"))
    assert f"sheet: '{key['sheet']}'" in (tmp_path / "sheet.html").read_text(encoding="utf-8")

    def rated(choices: list[Any], sheet: str = key["sheet"]) -> dict[str, Any]:
        return {"sheet": sheet, "choices": choices}

    count = COUNT - 1
    for_falcon = ["left" if pair["left"] == "falcon" else "right" for pair in key["pairs"]]
    assert score(rated(for_falcon), key) == {"falcon": {"preferred": count, "plain": 0, "equal": 0}}
    for_plain = ["left" if pair["left"] == "plain" else "right" for pair in key["pairs"]]
    assert score(rated([*for_plain[:2], "equal", *[None] * (count - 3)]), key)["falcon"] == {
        "preferred": 0, "plain": 2, "equal": 1,
    }  # fmt: skip
    other = json.loads(write_sheet(result, QUESTIONS, tmp_path / "other.html", seed=1).read_text(encoding="utf-8"))
    for wrong in (rated([]), rated(["both"] * count), rated(for_falcon, other["sheet"]), {}):
        with pytest.raises(BenchError, match="not ratings of the sheet"):
            score(wrong, key)


def test_refused(result: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"not the question set of the result, which is sky\.jsonl"):
        make_pairs(result, QuestionSet.of("other", [Question(1, "a", ("x",))]), seed=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written"):
        write_sheet(result, QUESTIONS, tmp_path / "file" / "sheet.html")
    for run in result["runs"]:
        run["identical"] = run["method"] != "plain" or None
    with pytest.raises(BenchError, match="nothing to rate"):
        make_pairs(result, QUESTIONS, seed=0)
    for run in result["runs"]:
        run.pop("text", None)
    with pytest.raises(BenchError, match="run falcon-hf bench again"):
        make_pairs(result, QUESTIONS, seed=0)
