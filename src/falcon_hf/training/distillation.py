"""Distillation data: prompts answered by the target itself, kept so that a run cut off at any time goes on.

What is in the output folder: ``distillation_folder.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from ..runtime.target import family, fingerprint
from ..version import __version__
from .batched_generation import Sampler, generate_texts, greedy
from .distillation_folder import DIALOGUES, DIGEST, FEATURES, TURNS, keep_recipe, read_lines
from .errors import DistillationError
from .features import held_digest
from .prompts import chat_prompt, distinct, end_ids, made_turns, normalised, read_turns

logger = logging.getLogger(__name__)

_LOCK = ".lock"  # held while a run appends
_MOST_TOO_LONG = 1000  # prompts in a row before a run gives up


@dataclass(frozen=True)
class DistillationSettings:
    """What decides the data.

    Attributes:
        dialogues: how many.
        prompts: a file or Hub dataset of prompts; None: the target makes them.
        column: of the dataset.
        split: of the dataset.
        stems: beginnings of self-made turns; None: those of ``stems.py``.
        excluded: user turns that no prompt may share a passage with (a benchmark's), see [`distinct`].
        asked: user turns of other distillations, which are not asked again.
        temperature: of the answers; 0 is greedy.
        top_p: of sampled answers.
        max_prompt_tokens: longer prompts are left out.
        max_new_tokens: of an answer; longer ones are cut.
        batch_size: rows decoded together.
        feature_layers: hidden states to keep beside the text, for the trainer; None: none.
        seed: of turns and sampled answers.
    """

    dialogues: int = 10_000
    prompts: str | None = None
    column: str | None = None
    split: str = "train"
    stems: list[str] | None = None
    excluded: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    temperature: float = 0.0
    top_p: float = 0.95
    max_prompt_tokens: int = 256
    max_new_tokens: int = 192
    batch_size: int = 64
    feature_layers: list[int] | None = None
    seed: int = 0


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        dialogues: finished, earlier runs' included.
        answer_tokens: of this run.
        seconds: of this run.
    """

    dialogues: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0


class FeatureFile:
    """Features of the dialogues' tokens, in their order, as raw bfloat16 rows ``[tokens, W]``; appended to.

    Args:
        path: of the file.
        target: whose features.
        layers: hidden states side by side; None: the file stays away.
    """

    def __init__(self, path: Path, target: PreTrainedModel, layers: list[int] | None) -> None:
        self._path = path
        self._row_bytes = 2 * len(layers or ()) * int(target.config.get_text_config().hidden_size)

    def cut(self, tokens: int) -> None:
        """Drop rows behind those of ``tokens`` tokens: of a dialogue whose line was never written.

        Raises:
            DistillationError: if there are fewer.
        """
        if not self._row_bytes:
            return
        self._path.touch()
        wanted = tokens * self._row_bytes
        if self._path.stat().st_size < wanted:
            raise DistillationError(
                f"{self._path} lacks features of dialogues that are there: choose another --output."
            )
        os.truncate(self._path, wanted)

    def append(self, features: torch.Tensor | None) -> None:
        """Write the rows ``[n, W]`` of one dialogue."""
        if features is None:
            return
        with self._path.open("ab") as file:
            file.write(features.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())


def distil(target: PreTrainedModel, tokenizer: Any, settings: DistillationSettings, output: Path) -> Iterator[Progress]:
    """Answer prompts until the output folder holds ``settings.dialogues`` dialogues, or, with a warning, all are used.

    Yields:
        The state after every finished dialogue, the same object each time.

    Raises:
        DistillationError: if the folder holds data of other settings or another target, another run is writing to it,
            the target has no such feature layers or is of a family that has no such batches, or no prompt can be used.
    """
    _check_family(target)
    last = int(target.config.get_text_config().num_hidden_layers)
    if wrong := [layer for layer in settings.feature_layers or [] if not 0 <= layer <= last]:
        raise DistillationError(
            f"There is no hidden state {wrong[0]}: feature layers are from 0 (the embeddings) to {last} (the last, the "
            "model's num_hidden_layers)."
        )
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DistillationError(
            f"Another run is writing to {output}: wait for its end, or choose another --output."
        ) from error
    try:
        yield from _appended(target, tokenizer, settings, output)
    finally:
        lock.release()


def _check_family(target: PreTrainedModel) -> None:
    """See that rows of the target's batches can be replaced, which takes a cache whose slots are nothing but tokens.

    Raises:
        DistillationError: if they cannot.
    """
    support, name = family(target), type(target).__name__
    if support is not None and not support.drafts:
        raise DistillationError(f"Falcon cannot draft for {name}: {support.why}.")
    if support is not None and support.drafts == "chain":
        raise DistillationError(
            f"{name} has ALiBi biases or convolutions, which go by a cache's slots, so rows of its batches cannot be "
            "replaced: answer your prompts with generate(), and give falcon-hf train a .jsonl file whose lines are "
            '{"p": ids of the prompt, "r": ids of the answer}.'
        )


def _appended(
    target: PreTrainedModel, tokenizer: Any, settings: DistillationSettings, output: Path
) -> Iterator[Progress]:
    """[`distil`] in a folder that no other run writes to."""
    keep_recipe(output, _recipe(target, settings))
    earlier = read_lines(output / DIALOGUES)
    answered = {int(line["n"]) for line in earlier}
    progress, started = Progress(len(answered)), time.perf_counter()
    wanted = settings.dialogues - len(answered)
    if wanted <= 0:
        return
    numbers: list[int] = []
    prompts: dict[int, list[int]] = {}

    def feed() -> Iterator[list[int]]:
        too_long = 0
        for number, turn in _turns(target, tokenizer, settings, output, answered):
            if len(numbers) == wanted:
                return
            prompt = chat_prompt(tokenizer, turn)
            if len(prompt) <= settings.max_prompt_tokens:
                too_long = 0
                prompts[len(numbers)] = prompt
                numbers.append(number)
                yield prompt
                continue
            too_long += 1
            if settings.prompts is None and too_long == _MOST_TOO_LONG:  # the target makes turns without end
                raise DistillationError(
                    f"{too_long} prompts in a row were longer than {settings.max_prompt_tokens} tokens, the last "
                    f"{len(prompt)}, the chat template's own included: raise --max-prompt-tokens."
                )

    choose = Sampler(settings.temperature, settings.top_p, seed=settings.seed) if settings.temperature else greedy
    texts = generate_texts(
        target,
        feed(),
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        end_ids=end_ids(target, tokenizer),
        choose=choose,
        feature_layers=settings.feature_layers,
    )
    features = FeatureFile(output / FEATURES, target, settings.feature_layers)
    features.cut(sum(len(line["p"]) + len(line["r"]) for line in earlier))
    with (output / DIALOGUES).open("a", encoding="utf-8") as file:
        for text in texts:
            line = {"n": numbers[text.number], "p": prompts.pop(text.number), "r": text.tokens}
            features.append(text.features)  # first, so that a line is a promise
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            progress.dialogues += 1
            progress.answer_tokens += len(text.tokens)
            progress.seconds = time.perf_counter() - started
            yield progress
    if progress.dialogues == 0:
        raise DistillationError("There was no prompt to answer: all are too long or excluded.")
    if progress.dialogues < settings.dialogues:
        logger.warning(
            "The prompts ran out at %d of %d dialogues: the others are doubles, too long or excluded.",
            progress.dialogues,
            settings.dialogues,
        )


def _turns(
    target: PreTrainedModel, tokenizer: Any, settings: DistillationSettings, output: Path, answered: set[int]
) -> Iterator[tuple[int, str]]:
    """Numbered turns without an answer: those of earlier runs, then new ones, noted before they are used."""
    earlier = [str(line["turn"]) for line in read_lines(output / TURNS)]
    yield from ((number, turn) for number, turn in enumerate(earlier) if number not in answered)
    if settings.prompts is None:
        source = made_turns(
            target,
            tokenizer,
            batch_size=settings.batch_size,
            seed=settings.seed + len(earlier),  # a run that goes on makes other turns than those it has
            stems=settings.stems,
        )
    else:
        source = read_turns(settings.prompts, settings.column, settings.split)
    seen = {normalised(turn) for turn in (*earlier, *settings.asked)}
    with (output / TURNS).open("a", encoding="utf-8") as file:
        for number, turn in enumerate(distinct(source, seen, settings.excluded), start=len(earlier)):
            file.write(json.dumps({"turn": turn}, ensure_ascii=False) + "\n")
            file.flush()
            yield number, turn


def _recipe(target: PreTrainedModel, settings: DistillationSettings) -> dict[str, Any]:
    """Everything that decides the data, as JSON."""
    return {
        "target": target.config._name_or_path or type(target).__name__,
        "target_fingerprint": fingerprint(target),
        "target_dtype": str(target.dtype).removeprefix("torch."),
        DIGEST: held_digest(target),
        # A benchmark's questions are not for passing on: their hash says which they were.
        "settings": asdict(settings)
        | {"excluded": _digest(settings.excluded), "asked": _digest(settings.asked) if settings.asked else None},
        "versions": {
            "falcon_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _digest(turns: list[str]) -> dict[str, Any]:
    """Number and hash of user turns."""
    return {"count": len(turns), "sha256": hashlib.sha256(json.dumps(turns).encode()).hexdigest()}
