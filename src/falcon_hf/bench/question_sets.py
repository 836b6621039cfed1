"""Question sets by name: the usual benchmarks from the Hub, and the sets of this package.

``find_questions`` takes a file, a name of [`NAMES`], or a file of a Hub dataset as ``org/dataset:file.jsonl``. The
package's own prompts (``data/*.jsonl``) were written for this project and are CC0.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

from .errors import BenchError, first_line
from .questions import Question, QuestionSet, read_question_file

OUT_OF_DOMAIN = ("science", "law", "code", "languages")
"""Domains of the set ``out-of-domain``; each is a set of its own, ``out-of-domain/law``."""

_HUB_TIMEOUT = 10.0  # seconds
_MT_BENCH = "HuggingFaceH4/mt_bench_prompts:raw/question.jsonl"
_CODE_PROMPT = "Complete the code I provided.\n\n"  # as EAGLE's evaluation asks it


def find_questions(source: str) -> QuestionSet:
    """The questions that ``source`` names: an existing file first, else a name, else a file of a Hub dataset.

    Raises:
        BenchError: if there is no such set, it cannot be had, or it is not in Spec-Bench format.
    """
    repo, colon, file = source.partition(":")
    local = not colon or len(repo) == 1  # one letter is a drive, C:\own.jsonl
    if Path(source).is_file() or (local and Path(source).suffix in (".jsonl", ".json")):
        return read_question_file(source)
    if source in NAMES:
        return NAMES[source](source)
    if file and not local:
        return _hub_file(source, repo, file)
    raise BenchError(
        f"There is no question file {source!r}, and no set of that name; sets: {', '.join(NAMES)}. "
        "A file of a Hub dataset is org/dataset:file.jsonl."
    )


def _hub_file(name: str, repo: str, file: str) -> QuestionSet:
    """A jsonl file of a Hub dataset, downloaded or from the cache."""
    try:
        path = hf_hub_download(repo, file, repo_type="dataset", etag_timeout=_HUB_TIMEOUT)
    except (HTTPError, EntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        raise BenchError(f"The Hub does not give {file} of the dataset {repo}: {first_line(error)}") from error
    found = read_question_file(path)
    return QuestionSet(name, found.questions, found.sha256, found.size)


def _rows(name: str, repo: str, config: str) -> Any:
    """The test split of a Hub dataset."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BenchError(f"The set {name} needs the package datasets: pip install 'falcon_hf[bench]'.") from error
    try:
        return load_dataset(repo, config, split="test")
    except (HTTPError, OSError, ValueError) as error:
        raise BenchError(
            f"The dataset {repo} cannot be had: {first_line(error)} A file in Spec-Bench format will do as well."
        ) from error


def _mt_bench(name: str) -> QuestionSet:
    repo, _, file = _MT_BENCH.partition(":")
    return _hub_file(name, repo, file)


def _gsm8k(name: str) -> QuestionSet:
    rows = _rows(name, "openai/gsm8k", "main")
    return QuestionSet.of(name, [Question(index, "math", (row["question"],)) for index, row in enumerate(rows)])


def _humaneval(name: str) -> QuestionSet:
    rows = _rows(name, "openai/openai_humaneval", "openai_humaneval")
    return QuestionSet.of(name, [Question(row["task_id"], "code", (_CODE_PROMPT + row["prompt"],)) for row in rows])


def _spec_bench(name: str) -> QuestionSet:
    raise BenchError(
        "Spec-Bench has no dataset on the Hub: take data/spec_bench/question.jsonl from its repository "
        "(hemingkx/Spec-Bench on GitHub) and give its path with --questions."
    )


def _own_set(name: str) -> QuestionSet:
    return QuestionSet.of(name, _of_this_package(name))


def _out_of_domain(name: str) -> QuestionSet:
    domains = OUT_OF_DOMAIN if "/" not in name else (name.partition("/")[2],)
    return QuestionSet.of(name, [question for domain in domains for question in _of_this_package(domain)])


def _of_this_package(stem: str) -> tuple[Question, ...]:
    with resources.as_file(resources.files(__package__) / "data" / f"{stem}.jsonl") as path:
        return read_question_file(path).questions


NAMES: dict[str, Callable[[str], QuestionSet]] = {
    "mt-bench": _mt_bench,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "spec-bench": _spec_bench,
    "everyday": _own_set,
    "repetitive": _own_set,
    "out-of-domain": _out_of_domain,
    **{f"out-of-domain/{domain}": _out_of_domain for domain in OUT_OF_DOMAIN},
}
"""Sets by name."""
