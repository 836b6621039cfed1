"""A run: every method answers every question, in turn, so that a slow minute of the machine hits all alike.

The order of the methods rotates from question to question, turn to turn and repeat to repeat. Each call starts from
the same seed, so that a method that draws as plain decoding does must give plain's very text. The result is written
after each question (each batch of them) and a run that was cut off goes on (see ``result_file.py``).

A question's later turns are asked as MT-Bench asks them: behind the model's own answers. In half precision the methods'
answers may part at a tie, and then each method would go on from a text of its own and do another amount of work. So
one history serves all: plain's answers, or the first method's where plain does not run. In float32 that is every
lossless method's own history.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from ..metrics import difference_gap, first_difference
from .errors import BenchError, first_line
from .methods import BASELINE, Method, MethodResult
from .provenance import describe_target, describe_tokenizer, machine, session, versions
from .questions import Question, QuestionSet, prompt_ids
from .result_file import ResultFile
from .summary import FORBIDDEN_GAP

logger = logging.getLogger(__name__)

_WARMUP_TOKENS = 16
# An answer decoded and read again may have a few tokens more.
_RETOKENISED = 16
# Options of generate() that change what a call returns, which is not for a run to decide.
_RETURNS = ("num_return_sequences", "return_dict_in_generate", "output_", "streamer")


@dataclass(frozen=True)
class RunPlan:
    """What to run.

    Attributes:
        questions: in this order.
        options: of ``generate()``, JSON values; ``do_sample`` is False unless given.
        seeds: one call a seed; only sampling can use more than one.
        repeats: times the whole set is run.
        warmup: untimed short calls of each method before the run.
        turns: turns of a question to ask at most; all for None.
        batch_size: questions a call, left-padded; the last batch may be smaller.

    Raises:
        BenchError: on an impossible value.
    """

    questions: QuestionSet
    options: dict[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    repeats: int = 1
    warmup: int = 1
    turns: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not self.questions.questions:
            raise BenchError("A run needs at least one question.")
        if self.repeats < 1 or self.warmup < 0:
            raise BenchError("repeats must be at least 1, and warmup at least 0.")
        if self.batch_size < 1 or (self.turns is not None and self.turns < 1):
            raise BenchError("The batch size and the number of turns must be at least 1.")
        if self.batch_size > 1 and "stop_strings" in self.options:
            raise BenchError("stop_strings end rows where a batch shows no end token: use a batch size of 1.")
        if returns := [name for name in self.options if name.startswith(_RETURNS)]:
            raise BenchError(f"{returns[0]} changes what generate() returns; bench reads one text a prompt.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise BenchError("Seeds must be one or more different numbers.")
        if len(self.seeds) > 1 and not self.generate_options["do_sample"]:
            raise BenchError("Greedy decoding draws nothing: give one seed, or a --temperature above 0.")
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BenchError(f"Options must be JSON values, to be kept with the result: {first_line(error)}") from error

    @property
    def generate_options(self) -> dict[str, Any]:
        """The options as ``generate()`` gets them; greedy whatever the target's own default."""
        return {"do_sample": False, **self.options}

    def asked(self, question: Question) -> int:
        """How many turns of a question are asked."""
        return min(len(question.turns), self.turns or len(question.turns))

    def batches(self) -> list[Sequence[Question]]:
        """The questions of each call."""
        questions = self.questions.questions
        return [questions[start : start + self.batch_size] for start in range(0, len(questions), self.batch_size)]

    def row_counts(self) -> set[int]:
        """Numbers of rows that calls have: the last batch, and later turns, may have fewer."""
        return {
            sum(self.asked(one) > turn for one in batch) for batch in self.batches() for turn in self.batch_turns(batch)
        }

    def batch_turns(self, batch: Sequence[Question]) -> range:
        """The turns that at least one question of a batch is asked."""
        return range(max(self.asked(one) for one in batch))


def run(
    target: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[Method],
    plan: RunPlan,
    output: Path,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Run ``plan`` and write ``output`` as it goes; a complete result of the same settings is returned as it is.

    A method that may fail on a machine (see [`Method`]) and does so in the warm-up is left out, and why is kept.

    Returns:
        The content of the result file.

    Raises:
        BenchError: if ``output`` holds something else or cannot be written, the tokenizer has no chat template,
            ``generate()`` refuses the options, or no method runs.
    """
    result = ResultFile(output, settings(target, tokenizer, methods, plan), session())
    if result.content["complete"]:
        logger.info("%s is complete; nothing to run.", output)
        return result.content
    options = dict(plan.generate_options)
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    done = result.done
    longest = longest_text(tokenizer, plan)
    result.write()  # now rather than after the first question: an output that cannot be written is known at once
    batches = plan.batches()
    prompts = [prompt_ids(tokenizer, question) for question in batches[0]]
    methods, failed = _warm_up(methods, prompts, options, plan, longest)
    if done and set(failed) != set(result.content["failed"]):
        changed = ", ".join(sorted(set(failed) ^ set(result.content["failed"])))
        raise BenchError(
            f"{output} cannot go on: {changed} ran in only some of its sessions, so that its figures would be of other "
            "questions; choose another --output, or delete it."
        )
    result.content["failed"] = failed
    caller = _Caller(target, tokenizer, methods, options, plan)
    with _progress(show_progress) as progress:
        task = progress.add_task("Benchmark", total=plan.repeats * len(plan.seeds) * len(batches))
        for repeat in range(plan.repeats):
            for seed in plan.seeds:
                for index, batch in enumerate(batches):
                    if (batch[0].question_id, seed, repeat) not in done:
                        result.add(list(caller.ask(batch, seed, repeat, index + repeat)))
                    progress.advance(task)
    result.finish()
    return result.content


def settings(target: PreTrainedModel, tokenizer: Any, methods: Sequence[Method], plan: RunPlan) -> dict[str, Any]:
    """Everything that must be equal for two runs to be one, and that a reader needs to repeat it."""
    return {
        "versions": versions(),
        "machine": machine(target.device),
        "target": describe_target(target),
        "tokenizer": describe_tokenizer(tokenizer),
        "questions": {
            "file": plan.questions.name,
            "sha256": plan.questions.sha256,
            "count": len(plan.questions.questions),
            **({} if len(plan.questions.questions) == plan.questions.size else {"chosen": "evenly by category"}),
            "turns": max(plan.asked(question) for question in plan.questions.questions),
        },
        "methods": {method.label: method.provenance() for method in methods},
        "options": plan.generate_options,
        "seeds": list(plan.seeds),
        "repeats": plan.repeats,
        "warmup": plan.warmup,
        "batch_size": plan.batch_size,
    }


def longest_text(tokenizer: Any, plan: RunPlan) -> int | None:
    """An upper bound of the run's longest text, prompt included, in tokens; None without ``max_new_tokens``."""
    new_tokens = plan.options.get("max_new_tokens")
    if not isinstance(new_tokens, int):
        return None
    longest = 0
    for question in plan.questions.questions:
        before = plan.asked(question) - 1
        prompt = prompt_ids(tokenizer, question, [""] * before).shape[1]
        longest = max(longest, prompt + before * (new_tokens + _RETOKENISED) + new_tokens)
    return longest


def _warm_up(
    methods: Sequence[Method],
    prompts: list[torch.Tensor],
    options: dict[str, Any],
    plan: RunPlan,
    longest: int | None,
) -> tuple[list[Method], dict[str, str]]:
    """Short calls, so that first-call costs are in no figure; and the first sign of options that do not work.

    Returns:
        The methods that run, and why the others do not.
    """
    short = options
    if isinstance(options.get("max_new_tokens"), int):
        short = {**options, "max_new_tokens": min(options["max_new_tokens"], _WARMUP_TOKENS)}
        short.pop("min_new_tokens", None)
    running, failed = [], {}
    room = max(method.room for method in methods)
    for method in methods:
        if longest is not None:
            method.prepare(longest + room)
        try:
            # One that may fail is tried in any case, or it would fail in the middle of the run.
            for _ in range(max(plan.warmup, int(method.may_fail))):
                _call(method, prompts, short)
            if method.may_fail:  # it makes a graph for each number of rows
                for rows in plan.row_counts() - {len(prompts)}:
                    _call(method, (prompts * rows)[:rows], short)
            running.append(method)
        except RuntimeError as error:
            if not method.may_fail:
                raise
            failed[method.label] = first_line(error)
            logger.warning("%s does not run here: %s", method.label, failed[method.label])
    if not running:
        raise BenchError(f"No method runs here: {'; '.join(failed.values())}")
    return running, failed


def _call(method: Method, prompts: list[torch.Tensor], options: dict[str, Any]) -> MethodResult:
    try:
        return method.generate(prompts, options)
    except (ValueError, TypeError) as error:  # what generate() raises on options
        raise BenchError(f"{method.label} cannot run with these options: {first_line(error)}") from error


@dataclass
class _Caller:
    """Asks every method a batch of questions."""

    target: PreTrainedModel
    tokenizer: Any
    methods: Sequence[Method]
    options: dict[str, Any]
    plan: RunPlan

    @property
    def _compared(self) -> set[str]:
        """Methods whose text must be plain's."""
        sampled = self.options["do_sample"]
        return {one.label for one in self.methods if one.label != BASELINE and (one.draws_as_plain or not sampled)}

    def ask(self, batch: Sequence[Question], seed: int, repeat: int, first: int) -> Iterator[dict[str, Any]]:
        """The entries of a batch, one a question, turn and method; method ``first`` (modulo) begins."""
        answers: dict[int | str, list[str]] = {question.question_id: [] for question in batch}
        for turn in self.plan.batch_turns(batch):
            members = [question for question in batch if self.plan.asked(question) > turn]
            prompts = [prompt_ids(self.tokenizer, one, answers[one.question_id]) for one in members]
            start = (first + turn) % len(self.methods)
            calls = {}
            for method in (*self.methods[start:], *self.methods[:start]):
                torch.manual_seed(seed)
                calls[method.label] = _call(method, prompts, self.options)
            history = calls.get(BASELINE, calls[self.methods[0].label])
            where: dict[str, Any] = {"turn": turn, "seed": seed, "repeat": repeat}
            if self.plan.batch_size > 1:
                where["batch"] = [question.question_id for question in members]
                where["batch_of"] = batch[0].question_id  # the same in all turns
            for row, question in enumerate(members):
                answers[question.question_id].append(self._text(history.rows[row]).strip())
                yield from self._entries(question, prompts[row], row, where, calls)

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _entries(
        self,
        question: Question,
        ids: torch.Tensor,
        row: int,
        where: dict[str, Any],
        calls: dict[str, MethodResult],
    ) -> Iterator[dict[str, Any]]:
        """One question's entries, one a method, compared with plain's text if that ran.

        Of a batch's time and forwards a row has its share, so that sums over entries are the run's.
        """
        for order, (label, call) in enumerate(calls.items()):
            tokens = call.rows[row]
            plain = calls[BASELINE].rows[row] if BASELINE in calls and label in self._compared else None
            entry = {
                "question_id": question.question_id,
                "category": question.category,
                "prompt_tokens": ids.shape[1],
                **where,
                "method": label,
                "order": order,
                "seconds": call.seconds / len(call.rows),
                "new_tokens": len(tokens),
                "peak_bytes": call.peak_bytes,
                "output_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
                **_comparison(self.target, ids, self.options, tokens, plain),
                "statistics": call.statistics[row],
            }
            if call.accepted is not None:
                entry["accepted"] = call.accepted[row]
            if label == BASELINE or entry["identical"] is False:
                entry["text"] = self._text(tokens)
            yield entry


def _comparison(
    target: PreTrainedModel,
    ids: torch.Tensor,
    options: dict[str, Any],
    tokens: list[int],
    plain: list[int] | None,
) -> dict[str, Any]:
    """Whether a text is plain's, and if not, where it differs and how far apart the target sees the two tokens.

    The gap is plain's token's score minus the other's. Sampled texts have none: their tokens are draws, not maxima.
    """
    compared: dict[str, Any] = dict.fromkeys(("identical", "first_difference", "gap", "gap_unit", "gap_units"))
    if plain is None:
        return compared
    at = first_difference(plain, tokens)
    compared |= {"identical": at is None, "first_difference": at}
    if at is not None and at < min(len(plain), len(tokens)) and not options["do_sample"]:
        before = torch.cat((ids, torch.tensor([plain[:at]], dtype=ids.dtype)), dim=1).to(target.device)
        gap = difference_gap(target, before, plain[at], tokens[at], at, **options)
        compared |= {"gap": _finite(gap.gap), "gap_unit": gap.unit, "gap_units": _finite(gap.units)}
    return compared


def _finite(value: float) -> float:
    return math.copysign(FORBIDDEN_GAP, value) if math.isinf(value) else value


def _progress(shown: bool) -> Progress:
    """Questions done, time spent and time left, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
