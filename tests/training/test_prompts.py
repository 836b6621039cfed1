"""User turns from data and from the target, and what is left out."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from falcon_hf.training import prompts
from falcon_hf.training.batched_generation import Text
from falcon_hf.training.errors import DistillationError
from falcon_hf.training.prompts import (
    chat_prompt,
    distinct,
    end_ids,
    first_user_turn,
    made_turns,
    read_turns,
    turn_opening,
)
from falcon_hf.training.stems import STEMS, draw_stem

from ..bench.tiny import VOCABULARY, byte_tokenizer

OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "user", "content": "B"},
]
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": " Why? "}, {"from": "gpt", "value": "So."}]


@pytest.mark.parametrize(
    ("cell", "turn"),
    [
        (OPENAI, "Why?"),
        (SHAREGPT, "Why?"),
        (["Why?", "And?"], "Why?"),
        (" Why? ", "Why?"),
        ([], ""),
        (None, ""),
        ({"role": "user", "content": "Why?"}, "Why?"),
        ({"role": "system", "content": "Why?"}, ""),
        (5, ""),
        ([5], ""),
        ([{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image_url"}]}], "Why?"),
        ([{"role": "user", "content": None}], ""),
    ],
)
def test_first_user_turn(cell: Any, turn: str) -> None:
    assert first_user_turn(cell) == turn


@pytest.mark.parametrize("column", ["messages", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_turns_are_read_from_files(tmp_path: Path, column: str, kind: str) -> None:
    from datasets import Dataset

    rows = [{column: OPENAI if column == "messages" else "Why?"}, {column: [] if column == "messages" else ""}]
    path = tmp_path / f"data.{kind}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    assert list(read_turns(str(path))) == ["Why?"]


def test_a_named_column_and_bad_sources(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": "Why?", "b": "How?"}\n')
    assert list(read_turns(str(path), column="b")) == ["How?"]
    with pytest.raises(DistillationError, match=r"columns a, b; name the one .*--column"):
        list(read_turns(str(path)))
    with pytest.raises(DistillationError, match="columns a, b"):
        list(read_turns(str(path), column="c"))
    with pytest.raises(DistillationError, match="There is no file"):
        list(read_turns(str(tmp_path / "none.jsonl")))
    path.write_text('{"a": "Wh')
    with pytest.raises(DistillationError, match="Cannot read prompts"):
        list(read_turns(str(path)))


def test_distinct_turns() -> None:
    seen = {"old one"}
    turns = ["Old  ONE", "new one", "New one", "x", "A question of the benchmark, and what is in no way its end"]
    excluded = ["A question of the benchmark, and what is its end"]
    assert list(distinct(turns, seen, excluded)) == ["new one"]
    assert "new one" in seen
    # The control: without the exclusion the benchmark's question comes through.
    assert turns[-1] in list(distinct(turns, set()))


def test_turns_that_quote_a_benchmark() -> None:
    excluded = ["Tom has three red apples and gives two of them to Ann. How many has he?"]
    quoting = "Solve this: tom has THREE red apples, and gives two\nto me"
    near = "Solve this: Tom has three red apples and gives one to me"  # seven words in a row
    assert list(distinct([quoting, near], set(), excluded)) == [near]
    assert list(distinct([quoting, near], set())) == [quoting, near]


def test_prompts_follow_the_template_where_there_is_one() -> None:
    with_template, without = byte_tokenizer(), byte_tokenizer(template=None)
    assert with_template.decode(chat_prompt(with_template, "Why?")) == "<user>Why?\n<assistant>"
    assert turn_opening(with_template) == "<user>"
    assert without.decode(chat_prompt(without, "Why?")) == "Why?"
    assert turn_opening(without) == ""
    shouting = byte_tokenizer(template="{{ messages[0].content | upper }}")
    with pytest.raises(DistillationError, match="--prompts"):
        turn_opening(shouting)
    refusing = byte_tokenizer(template="{{ raise_exception('No users.') }}")
    for ask in (lambda: turn_opening(refusing), lambda: chat_prompt(refusing, "Why?")):
        with pytest.raises(DistillationError, match="refuses the messages: No users"):
            ask()


def test_end_tokens_of_model_and_tokenizer(tiny_target: Any) -> None:
    tokenizer = byte_tokenizer()
    target = tiny_target(VOCABULARY, seed=31)
    assert end_ids(target, tokenizer) == []
    target.generation_config.eos_token_id = [9, 7]
    assert end_ids(target, tokenizer) == [7, 9]


def test_made_turns_begin_with_stems_end_by_themselves_and_repeat_with_the_seed(tiny_target: Any) -> None:
    tokenizer, target = byte_tokenizer(), tiny_target(VOCABULARY, seed=32)
    target.generation_config.eos_token_id = list(range(60))
    state = torch.get_rng_state()

    def some(seed: int) -> list[str]:
        made = made_turns(target, tokenizer, batch_size=4, seed=seed, stems=["Say ", "Sing {thing}"], chunk=6)
        return list(itertools.islice(made, 10))

    turns = some(1)
    assert all(turn.startswith(("Say", "Sing")) and "{" not in turn[:10] for turn in turns)
    assert turns == some(1) != some(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_made_turn_keeps_the_space_behind_its_stem(tiny_target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders as Llama 2's and Mistral's leave out the space before the first word of what they decode."""
    words = ["</s>", "\u2581Can", "\u2581you", "\u2581help", "\u2581me", "?"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "</s>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer.decode([3, 4]) == "help me"  # the control: alone it has no space to bring
    for said, turn in (([3, 4, 5, 0], "Can you help me?"), ([5, 0], "Can you?"), ([0], "Can you")):
        monkeypatch.setattr(prompts, "generate_texts", lambda *_, said=said, **__: [Text(0, said)])
        made = made_turns(tiny_target(VOCABULARY, seed=31), tokenizer, batch_size=1, seed=0, stems=["Can you "])
        assert next(made) == turn


def test_a_target_that_ends_no_turn_is_told(tiny_target: Any) -> None:
    """Instead of decoding without end: it has no end token, or never writes it."""
    target = copy.deepcopy(tiny_target(VOCABULARY, seed=32))
    target.generation_config.eos_token_id = None
    with pytest.raises(DistillationError, match="no turn would ever end"):
        next(made_turns(target, byte_tokenizer(), batch_size=4, seed=0))
    target.generation_config.eos_token_id = [VOCABULARY]  # a token it does not have
    with pytest.raises(DistillationError, match="None of 3 user turns"):
        next(made_turns(target, byte_tokenizer(), batch_size=4, seed=0, chunk=3))


def test_stems_are_filled_and_varied() -> None:
    chooser = random.Random(0)
    drawn = {draw_stem(chooser) for _ in range(400)}
    assert len(drawn) > 150
    assert not [stem for stem in drawn if "{" in stem or stem.endswith(" ")]
    assert all(STEMS.values())
