"""A run: every method answers every question, in turn, so that a slow minute of the machine hits all alike.

The order of the methods rotates from question to question and from repeat to repeat. Each call starts from the same
seed, so that a method that draws as plain decoding does must give plain's very text. The result is written after each
question and a run that was cut off goes on (see ``result_file.py``).
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
from .provenance import describe_target, file_sha256, machine, versions
from .questions import Question, prompt_ids
from .result_file import ResultFile
from .summary import FORBIDDEN_GAP

logger = logging.getLogger(__name__)

_WARMUP_TOKENS = 16


@dataclass(frozen=True)
class RunPlan:
    """What to run.

    Attributes:
        questions: in this order.
        question_file: where they come from; its name and hash go into the result.
        options: of ``generate()``, JSON values; ``do_sample`` is False unless given.
        seeds: one call a seed; only sampling can use more than one.
        repeats: times the whole set is run.
        warmup: untimed short calls of each method before the run.

    Raises:
        BenchError: on an impossible value.
    """

    questions: Sequence[Question]
    question_file: Path
    options: dict[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    repeats: int = 1
    warmup: int = 1

    def __post_init__(self) -> None:
        if not self.questions:
            raise BenchError("A run needs at least one question.")
        if self.repeats < 1 or self.warmup < 0:
            raise BenchError("repeats must be at least 1, and warmup at least 0.")
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


def run(
    target: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[Method],
    plan: RunPlan,
    output: Path,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Run ``plan`` and write ``output`` as it goes; a complete result of the same settings is returned as it is.

    Returns:
        The content of the result file.

    Raises:
        BenchError: if ``output`` holds something else or cannot be written, the tokenizer has no chat template, or
            ``generate()`` refuses the options.
    """
    result = ResultFile(output, settings(target, methods, plan))
    if result.content["complete"]:
        logger.info("%s is complete; nothing to run.", output)
        return result.content
    prompts = [prompt_ids(tokenizer, question) for question in plan.questions]
    options = dict(plan.generate_options)
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    done = result.done
    result.write()  # now rather than after the first question: an output that cannot be written is known at once
    _warm_up(methods, prompts[0], options, plan)
    steps = plan.repeats * len(plan.seeds) * len(plan.questions)
    with _progress(show_progress) as progress:
        task = progress.add_task("Benchmark", total=steps)
        for repeat, seed, index in _steps(plan):
            question = plan.questions[index]
            if (question.question_id, seed, repeat) not in done:
                turn = (index + repeat) % len(methods)
                calls = {}
                for method in (*methods[turn:], *methods[:turn]):
                    torch.manual_seed(seed)
                    calls[method.label] = _call(method, prompts[index], options)
                where = {"question_id": question.question_id, "category": question.category}
                where |= {"prompt_tokens": prompts[index].shape[1], "seed": seed, "repeat": repeat}
                result.add(_entries(target, prompts[index], options, where, calls))
            progress.advance(task)
    result.finish()
    return result.content


def settings(target: PreTrainedModel, methods: Sequence[Method], plan: RunPlan) -> dict[str, Any]:
    """Everything that must be equal for two runs to be one, and that a reader needs to repeat it."""
    return {
        "versions": versions(),
        "machine": machine(target.device),
        "target": describe_target(target),
        "questions": {
            "file": plan.question_file.name,
            "sha256": file_sha256(plan.question_file),
            "count": len(plan.questions),
            "turns": 1,
        },
        "methods": {method.label: method.provenance() for method in methods},
        "options": plan.generate_options,
        "seeds": list(plan.seeds),
        "repeats": plan.repeats,
        "warmup": plan.warmup,
    }


def _steps(plan: RunPlan) -> Iterator[tuple[int, int, int]]:
    """(repeat, seed, question index) of each step."""
    for repeat in range(plan.repeats):
        for seed in plan.seeds:
            for index in range(len(plan.questions)):
                yield repeat, seed, index


def _warm_up(methods: Sequence[Method], ids: torch.Tensor, options: dict[str, Any], plan: RunPlan) -> None:
    """Short calls, so that first-call costs are in no figure; and the first sign of options that do not work."""
    short = options
    if isinstance(options.get("max_new_tokens"), int):
        short = {**options, "max_new_tokens": min(options["max_new_tokens"], _WARMUP_TOKENS)}
        short.pop("min_new_tokens", None)
    for method in methods:
        for _ in range(plan.warmup):
            _call(method, ids, short)


def _call(method: Method, ids: torch.Tensor, options: dict[str, Any]) -> MethodResult:
    try:
        return method.generate(ids, options)
    except (ValueError, TypeError) as error:  # what generate() raises on options
        raise BenchError(f"{method.label} cannot run with these options: {first_line(error)}") from error


def _entries(
    target: PreTrainedModel,
    ids: torch.Tensor,
    options: dict[str, Any],
    where: dict[str, Any],
    calls: dict[str, MethodResult],
) -> list[dict[str, Any]]:
    """One question's entries, one a method, compared with plain's text if that ran."""
    entries = []
    for order, (label, call) in enumerate(calls.items()):
        entry = {
            **where,
            "method": label,
            "order": order,
            "seconds": call.seconds,
            "new_tokens": len(call.tokens),
            "output_sha256": hashlib.sha256(json.dumps(call.tokens).encode()).hexdigest(),
            **_comparison(target, ids, options, call.tokens, calls.get(BASELINE) if label != BASELINE else None),
            "statistics": call.statistics,
        }
        entries.append(entry)
    return entries


def _comparison(
    target: PreTrainedModel,
    ids: torch.Tensor,
    options: dict[str, Any],
    tokens: list[int],
    plain: MethodResult | None,
) -> dict[str, Any]:
    """Whether a text is plain's, and if not, where it differs and how far apart the target sees the two tokens.

    The gap is plain's token's score minus the other's. Sampled texts have none: their tokens are draws, not maxima.
    """
    compared: dict[str, Any] = dict.fromkeys(("identical", "first_difference", "gap", "gap_unit", "gap_units"))
    if plain is None:
        return compared
    at = first_difference(plain.tokens, tokens)
    compared |= {"identical": at is None, "first_difference": at}
    if at is not None and at < min(len(plain.tokens), len(tokens)) and not options["do_sample"]:
        before = torch.cat((ids, torch.tensor([plain.tokens[:at]], dtype=ids.dtype)), dim=1).to(target.device)
        gap = difference_gap(target, before, plain.tokens[at], tokens[at], **options)
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
