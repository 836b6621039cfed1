"""The tables in README, cards and docs are those of the stored results, and the README's commands are CI's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from falcon_hf.bench.report import BEGIN, END, render
from falcon_hf.bench.result_file import read_result
from falcon_hf.bench.summary import summarise
from falcon_hf.tuning.check_file import is_check

ROOT = Path(__file__).parents[1]
CARD = ROOT / "hub_cards" / "falcon-smollm2-135m-instruct"
# In the order of the tables; `falcon-hf report` with these files and --update FILE writes them; README's with --brief.
RESULTS = (
    "mt-bench-bfloat16-greedy",
    "gsm8k-bfloat16-greedy",
    "humaneval-bfloat16-greedy",
    "out-of-domain-bfloat16-greedy",
    "mt-bench-float32-greedy",
    "gsm8k-float32-greedy",
    "humaneval-float32-greedy",
    "out-of-domain-float32-greedy",
    "mt-bench-bfloat16-sampled",
    "mt-bench-float32-sampled",
    "mt-bench-float32-penalties",
    "mt-bench-bfloat16-batch4",
)
# Those of docs/comparison.md, of other methods and of other drafters too.
MEASUREMENTS = ROOT / "docs" / "measurements"
COMPARED = (
    "all-mt-bench-bfloat16-greedy",
    "all-gsm8k-bfloat16-greedy",
    "all-humaneval-bfloat16-greedy",
    "all-mt-bench-bfloat16-sampled",
    "all-gsm8k-bfloat16-sampled",
    "all-humaneval-bfloat16-sampled",
    "all-mt-bench-float32-greedy",
    "all-gsm8k-float32-greedy",
    "all-mt-bench-float32-sampled",
    "native-mt-bench-bfloat16-greedy",
)

# Those of docs/ablations.md: small drafters, trained alike.
ABLATED = ("ablation-mt-bench-bfloat16-greedy", "ablation-gsm8k-bfloat16-greedy")

# Those of docs/avx2.md: the drafter before the shipped one, on another machine.
EARLIER = (
    "earlier-mt-bench-float32-greedy",
    "earlier-gsm8k-float32-greedy",
    "earlier-humaneval-float32-greedy",
    "earlier-mt-bench-bfloat16-greedy",
    "earlier-mt-bench-float32-batch4",
    "earlier-mt-bench-float32-batch8",
    "earlier-all-mt-bench-float32-greedy",
    "earlier-all-gsm8k-float32-greedy",
    "earlier-all-humaneval-float32-greedy",
    "earlier-repetitive-float32-greedy",
    "earlier-random-weights-float32-greedy",
)


def results() -> list[Path]:
    return [CARD / "benchmarks" / f"{name}.json" for name in RESULTS]


def compared() -> list[Path]:
    return [MEASUREMENTS / f"{name}.json" for name in COMPARED]


def earlier() -> list[Path]:
    return [MEASUREMENTS / f"{name}.json" for name in EARLIER]


def ablated() -> list[Path]:
    return [MEASUREMENTS / f"{name}.json" for name in ABLATED]


def test_no_stored_result_is_left_out():
    assert set(results()) == set((CARD / "benchmarks").iterdir())
    checks = {path for path in MEASUREMENTS.iterdir() if is_check(path)}
    assert set(compared() + earlier() + ablated()) == set(MEASUREMENTS.iterdir()) - checks
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    for path in checks:
        assert f"<!-- from: falcon-hf report {path.relative_to(ROOT)} -->" in pages


@pytest.mark.parametrize(
    ("path", "brief", "stored"),
    [
        (ROOT / "README.md", True, results()),
        (ROOT / "docs" / "results.md", False, results()),
        (CARD / "README.md", False, results()),
        (ROOT / "docs" / "comparison.md", False, compared()),
        (ROOT / "docs" / "avx2.md", False, earlier()),
        (ROOT / "docs" / "ablations.md", False, ablated()),
    ],
    ids=["README", "docs", "card", "comparison", "avx2", "ablations"],
)
def test_tables_are_those_of_the_stored_results(path, brief, stored):
    text = path.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == render([read_result(result) for result in stored], brief).strip()


def test_summaries_are_those_of_the_runs():
    for path in results() + compared() + earlier() + ablated():
        result = read_result(path)
        found = json.loads(json.dumps(summarise(result["runs"], list(result["settings"]["methods"]))))
        assert found == result["summary"], path.name


def test_results_are_complete_and_float32_is_identical():
    for path in results() + compared() + earlier() + ablated():
        result = read_result(path)
        assert result["complete"]
        if result["settings"]["target"]["dtype"] == "float32":
            for label in result["summary"].keys() - {"plain"}:
                method = result["summary"][label]
                assert method["identical"] == method["compared"], (path.name, label)
                assert method["compared"] > 0 or "tree" not in result["settings"]["methods"][label], (path.name, label)


def test_ci_finds_the_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", readme)
    assert command is not None
    assert command[1].endswith("pytest -m 'not slow'")
