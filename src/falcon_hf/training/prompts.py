"""User turns to answer: read from a dataset, or made by the target itself; and chat prompts from them."""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..chat_template import ChatTemplateError, templated
from .batched_generation import Sampler, generate_texts
from .errors import DistillationError
from .stems import draw_stem

logger = logging.getLogger(__name__)

_COLUMNS = ("prompt", "instruction", "question", "text", "input")
_SENTINEL = "falcon0sentinel"
_LONGEST_TURN = 160  # tokens of a self-made turn; longer ones are dropped, as they have no end
_EXCLUDED_CHARACTERS = 40
_EXCLUDED_WORDS = 8


def normalised(turn: str) -> str:
    """A turn as deduplication sees it: lower case, single spaces."""
    return " ".join(turn.casefold().split())


def end_ids(target: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end a turn: those of the generation config, and the tokenizer's end of text."""
    ids = target.generation_config.eos_token_id
    given = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*given, tokenizer.eos_token_id} - {None})


def chat_prompt(tokenizer: Any, turn: str) -> list[int]:
    """Token ids of one user turn and the header of the answer; the bare text where there is no chat template.

    Raises:
        DistillationError: if the template refuses it.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer(turn)["input_ids"])
    message = [{"role": "user", "content": turn}]
    return list(_templated(tokenizer, message)["input_ids"])


def turn_opening(tokenizer: Any) -> str:
    """The chat template's text up to where the user's turn begins; empty where there is no template.

    Raises:
        DistillationError: if the template changes what the user says, or refuses it.
    """
    if tokenizer.chat_template is None:
        return ""
    message = [{"role": "user", "content": _SENTINEL}]
    text = str(_templated(tokenizer, message, tokenize=False))
    if _SENTINEL not in text:
        raise DistillationError("The tokenizer's chat template changes the user's text; give prompts with --prompts.")
    return text.split(_SENTINEL)[0]


def _templated(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """[`templated`], with this room's error."""
    try:
        return templated(tokenizer, messages, **options)
    except ChatTemplateError as error:
        raise DistillationError(str(error)) from error


def read_turns(source: str, column: str | None = None, split: str = "train") -> Iterator[str]:
    """User turns of a dataset, the first of each conversation.

    Args:
        source: a ``.jsonl``, ``.jsonl.gz``, ``.json`` or ``.parquet`` file, or a dataset's Hub id.
        column: the column to read; by default ``messages`` (OpenAI), ``conversations`` (ShareGPT), ``turns``
            (Spec-Bench), or one of the plain ``prompt``, ``instruction``, ``question``, ``text``, ``input``.
        split: of a Hub dataset.

    Raises:
        DistillationError: if the source cannot be read or has no such column.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    kind = "parquet" if path.suffix == ".parquet" else "json"
    try:
        if path.suffix in {".json", ".jsonl", ".gz", ".parquet"}:
            if not path.is_file():
                raise DistillationError(f"There is no file {source!r}.")
            rows = load_dataset(kind, data_files=str(path), split="train")
        else:
            rows = load_dataset(source, split=split)
    except DistillationError:
        raise
    except Exception as error:  # datasets raises many kinds, all with the reason
        raise DistillationError(f"Cannot read prompts from {source!r}: {error}") from error
    known = ("messages", "conversations", "turns", *_COLUMNS)
    chosen = column or next((name for name in known if name in rows.column_names), None)
    if chosen is None or chosen not in rows.column_names:
        raise DistillationError(
            f"{source!r} has the columns {', '.join(rows.column_names)}; name the one with the prompts (--column)."
        )
    logger.info("Prompts: column %r of %s.", chosen, source)
    for row in rows:
        turn = first_user_turn(row[chosen])
        if turn:
            yield turn


def first_user_turn(value: Any) -> str:
    """The first user turn of a cell: text, a list of texts, one or several of OpenAI's or ShareGPT's messages.

    Empty if there is none, or it is no text: of a message in parts those of text count.
    """
    if isinstance(value, str):
        return value.strip()
    messages = [value] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    for message in messages:
        if isinstance(message, str):
            return message.strip()
        if not isinstance(message, Mapping) or (message.get("role") or message.get("from")) not in {"user", "human"}:
            continue
        content = message.get("content") or message.get("value")
        parts = content if isinstance(content, (list, tuple)) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str)).strip()
    return ""


def made_turns(
    target: PreTrainedModel,
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int,
    stems: list[str] | None = None,
    chunk: int = 256,
) -> Iterator[str]:
    """User turns as the target writes them after its template's user header, without end.

    Args:
        target: the model.
        tokenizer: its tokenizer.
        batch_size: rows decoded together.
        seed: of stems and sampling (temperature 1, top-p 0.95).
        stems: beginnings to choose from; those of ``stems.py`` by default.
        chunk: turns begun together.

    Raises:
        DistillationError: if the target cannot make turns: as [`turn_opening`], or none of a chunk comes to an end.
    """
    chooser, sampler = random.Random(seed), Sampler(seed=seed)
    opening, ends = turn_opening(tokenizer), end_ids(target, tokenizer)
    if not ends:
        raise DistillationError("Neither generation config nor tokenizer has an end token, so no turn would ever end.")
    while True:
        begun = [draw_stem(chooser, stems) for _ in range(chunk)]
        prompts = [tokenizer(opening + stem, add_special_tokens=not opening)["input_ids"] for stem in begun]
        if not all(prompts):
            raise DistillationError("A tokenizer without template and bos token needs stems that are not empty.")
        made = generate_texts(
            target, prompts, batch_size=batch_size, max_new_tokens=_LONGEST_TURN, end_ids=ends, choose=sampler
        )
        ended = 0
        for text in made:
            if text.tokens[-1] in ends:
                ended += 1
                words = _added(tokenizer, prompts[text.number], text.tokens[:-1])
                yield (begun[text.number] + words).strip()
        if not ended:
            raise DistillationError(
                f"None of {chunk} user turns that the target began ended within {_LONGEST_TURN} tokens: it does not "
                "write user turns. Give prompts with --prompts."
            )


def _added(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """What ``tokens`` add to the text of ``before``: decoded alone they may lack the space that they begin with."""
    known, text = tokenizer.decode(before), str(tokenizer.decode(before + tokens))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(known, text, strict=False))
    return text[sum(1 for _ in same) :]


def distinct(turns: Iterable[str], seen: set[str], excluded: Iterable[str] = ()) -> Iterator[str]:
    """The turns that are new, have more than a few letters, and share no passage with any of ``excluded``.

    Args:
        turns: candidates.
        seen: normalised turns there are already; the new ones are added.
        excluded: turns, such as a benchmark's questions, whose first 40 characters none may share, nor eight words
            that follow each other.
    """
    barred, passages = set(), set()
    for turn in excluded:
        barred.add(normalised(turn)[:_EXCLUDED_CHARACTERS])
        passages |= _passages(turn)
    for turn in turns:
        key = normalised(turn)
        if len(key) < 4 or key in seen or key[:_EXCLUDED_CHARACTERS] in barred:
            continue
        if passages and not passages.isdisjoint(_passages(turn)):
            continue
        seen.add(key)
        yield turn


def _passages(turn: str) -> set[tuple[str, ...]]:
    """All runs of eight words, punctuation left out."""
    words = re.findall(r"\w+", turn.casefold())
    return {tuple(words[first : first + _EXCLUDED_WORDS]) for first in range(len(words) - _EXCLUDED_WORDS + 1)}
