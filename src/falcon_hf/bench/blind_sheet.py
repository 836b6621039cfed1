"""A blind side-by-side sheet for human raters: the prompts on which a method's text and plain's differ.

One HTML file that needs nothing else, and a key apart that says which side was whose. Raters save their choices as
JSON from the page; [`score`] counts them with the key. Texts of float32 do not differ: nothing to rate there.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from .errors import BenchError
from .methods import BASELINE
from .questions import QuestionSet
from .tables import Result

CHOICES = ("left", "right", "equal")


@dataclass(frozen=True)
class Pair:
    """Two texts on one prompt, ``left`` and ``right`` as the rater sees them; ``methods`` in the same order.

    ``turns`` are the user's, ``answers`` those given to all but the last.
    """

    turns: tuple[str, ...]
    answers: tuple[str, ...]
    left: str
    right: str
    methods: tuple[str, str]
    question_id: int | str
    turn: int


def make_pairs(result: Result, questions: QuestionSet, seed: int) -> list[Pair]:
    """One pair for each question on which a method differs from plain, sides and order drawn by ``seed``.

    Of a question's turns and methods that differ one is drawn, as plain's text in two pairs would say whose it is. Of
    repeats and seeds the first is taken.

    Raises:
        BenchError: if ``questions`` are not the result's, the result has no texts, or none differs.
    """
    asked = result["settings"]["questions"]
    if questions.sha256 != asked["sha256"]:
        raise BenchError(f"{questions.name} is not the question set of the result, which is {asked['file']}.")
    by_id = {question.question_id: question for question in questions.questions}
    first = (result["settings"]["seeds"][0], 0)
    runs = [entry for entry in result["runs"] if (entry["seed"], entry["repeat"]) == first]
    if not any("text" in entry for entry in runs):
        raise BenchError("The result has no texts (format 1, or a run without plain): run falcon-hf bench again.")
    plain = {(entry["question_id"], entry.get("turn", 0)): entry for entry in runs if entry["method"] == BASELINE}
    draw = random.Random(seed)
    differing: dict[int | str, list[dict[str, Any]]] = {}
    for entry in runs:
        if entry["identical"] is False:
            differing.setdefault(entry["question_id"], []).append(entry)
    pairs = []
    for entry in map(draw.choice, differing.values()):
        place = (entry["question_id"], entry.get("turn", 0))
        sides = [(BASELINE, plain[place]["text"]), (entry["method"], entry["text"])]
        draw.shuffle(sides)
        (left_method, left), (right_method, right) = sides
        turns = by_id[place[0]].turns[: place[1] + 1]
        answers = tuple(plain[place[0], turn]["text"] for turn in range(place[1]))
        pairs.append(Pair(turns, answers, left, right, (left_method, right_method), *place))
    if not pairs:
        raise BenchError("Every text is plain's; there is nothing to rate.")
    draw.shuffle(pairs)
    return pairs


def write_sheet(result: Result, questions: QuestionSet, path: Path, seed: int = 0) -> Path:
    """Write the sheet to ``path`` and its key beside it, ``<name>.key.json``; see [`make_pairs`].

    Returns:
        The key's path.

    Raises:
        BenchError: as [`make_pairs`], or if a file cannot be written.
    """
    pairs = make_pairs(result, questions, seed)
    key_path = path.with_suffix(".key.json")
    key = {
        "sheet": _sheet_id(pairs),
        "seed": seed,
        "questions": result["settings"]["questions"]["file"],
        "pairs": [
            {"question_id": pair.question_id, "turn": pair.turn, "left": pair.methods[0], "right": pair.methods[1]}
            for pair in pairs
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(pairs), encoding="utf-8")
        key_path.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"The sheet {path} cannot be written: {error.strerror}.") from error
    return key_path


def _sheet_id(pairs: Sequence[Pair]) -> str:
    """What tells one sheet from another, in its page, its key and the ratings saved from it."""
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()[:12]


def score(ratings: dict[str, Any], key: dict[str, Any]) -> dict[str, dict[str, int]]:
    """For each method, how often a rater preferred it, plain, or neither; unrated pairs are left out.

    Args:
        ratings: the content of the file that the page saves: the ``sheet``, and as ``choices`` one of [`CHOICES`] a
            pair or None, in the sheet's order.
        key: the content of the key file.

    Raises:
        BenchError: if the ratings are not this key's.
    """
    pairs, choices = key["pairs"], ratings.get("choices", ())
    if ratings.get("sheet") != key["sheet"] or len(choices) != len(pairs) or not set(choices) <= {*CHOICES, None}:
        raise BenchError(f"These are not ratings of the sheet {key['sheet']}, which has {len(pairs)} pairs.")
    counts: dict[str, dict[str, int]] = {}
    for rating, pair in zip(choices, pairs, strict=True):
        method = pair["left"] if pair["right"] == BASELINE else pair["right"]
        own = counts.setdefault(method, {"preferred": 0, BASELINE: 0, "equal": 0})
        if rating == "equal":
            own["equal"] += 1
        elif rating is not None:
            own[BASELINE if pair[rating] == BASELINE else "preferred"] += 1
    return counts


def _page(pairs: Sequence[Pair]) -> str:
    sections = "\n".join(map(_pair, range(len(pairs)), pairs))
    return _PAGE.substitute(count=len(pairs), sheet=_sheet_id(pairs), pairs=sections)


def _pair(number: int, pair: Pair) -> str:
    said = itertools.zip_longest(pair.turns, pair.answers, fillvalue="")
    turns = "".join(
        f"<p>{_escape(turn)}</p>" + (f"<p class=answer>{_escape(answer)}</p>" if answer else "")
        for turn, answer in said
    )
    if len(pair.turns) > 1:
        turns = (
            "<p class=note>The last of these turns is answered; both sides had the same answers before it.</p>" + turns
        )
    choices = " ".join(
        f'<label><input type="radio" name="pair{number}" value="{choice}"> {text}</label>'
        for choice, text in zip(CHOICES, ("left is better", "right is better", "equally good"), strict=True)
    )
    return (
        f'<section><h2>{number + 1}</h2><div class="prompt">{turns}</div>'
        f'<div class="sides"><pre>{_escape(pair.left)}</pre><pre>{_escape(pair.right)}</pre></div>'
        f"<p>{choices}</p></section>"
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Side by side</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
section { border-top: 2px solid #888; margin-top: 2rem; }
.prompt { background: #eef3f8; padding: .5rem 1rem; white-space: pre-wrap; }
.note { color: #555; font-size: .9em; }
.answer { margin-left: 2rem; color: #444; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; border: 1px solid #ccc; padding: .5rem 1rem; }
label { margin-right: 2rem; }
button { font: inherit; padding: .5rem 1rem; }
</style></head><body>
<h1>Which answer is better?</h1>
<p>$count prompts, two answers each. Texts are cut at a fixed length; judge what is there. The sides are in
random order.
When you are done, save your choices with the button at the end.</p>
$pairs
<p><button id="save">Save choices</button> <span id="left"></span></p>
<script>
const count = $count;
const choices = () => [...Array(count).keys()].map(i => {
  const chosen = document.querySelector('input[name="pair' + i + '"]:checked');
  return chosen ? chosen.value : null;
});
const show = () => {
  document.getElementById('left').textContent = choices().filter(c => c === null).length + ' not rated yet';
};
document.addEventListener('change', show); show();
document.getElementById('save').onclick = () => {
  const link = document.createElement('a');
  const ratings = JSON.stringify({sheet: '$sheet', choices: choices()});
  link.href = URL.createObjectURL(new Blob([ratings], {type: 'application/json'}));
  link.download = 'ratings.json'; link.click();
};
</script></body></html>
""")
