"""The tables in README and cards are those of the stored results, and the README's commands are CI's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from falcon_hf.bench.report import BEGIN, END, render
from falcon_hf.bench.result_file import read_result
from falcon_hf.bench.summary import summarise

ROOT = Path(__file__).parents[1]
CARD = ROOT / "hub_cards" / "falcon-smollm2-135m-instruct"
# In the order of the tables; `falcon-hf report` with these files and --update FILE writes them; README's with --brief.
RESULTS = (
    "mt-bench-float32-greedy",
    "gsm8k-float32-greedy",
    "humaneval-float32-greedy",
    "out-of-domain-float32-greedy",
    "mt-bench-float32-sampled",
    "mt-bench-float32-penalties",
    "mt-bench-bfloat16-greedy",
    "mt-bench-float32-batch4",
    "mt-bench-float32-batch8",
    "mt-bench-bfloat16-batch4",
    "mt-bench-bfloat16-batch8",
)


def results() -> list[Path]:
    return [CARD / "benchmarks" / f"{name}.json" for name in RESULTS]


def test_no_stored_result_is_left_out():
    assert set(results()) == set((CARD / "benchmarks").iterdir())


@pytest.mark.parametrize(
    ("path", "brief"),
    [(ROOT / "README.md", True), (ROOT / "docs" / "results.md", False), (CARD / "README.md", False)],
    ids=["README", "docs", "card"],
)
def test_tables_are_those_of_the_stored_results(path, brief):
    text = path.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == render([read_result(result) for result in results()], brief).strip()


def test_summaries_are_those_of_the_runs():
    for path in results():
        result = read_result(path)
        found = json.loads(json.dumps(summarise(result["runs"], list(result["settings"]["methods"]))))
        assert found == result["summary"], path.name


def test_results_are_complete_and_float32_is_identical():
    for path in results():
        result = read_result(path)
        assert result["complete"]
        if result["settings"]["target"]["dtype"] == "float32":
            for label in result["summary"].keys() - {"plain"}:
                method = result["summary"][label]
                assert method["identical"] == method["compared"] > 0, (path.name, label)


def test_ci_finds_the_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", readme)
    assert command is not None
    assert command[1].endswith("pytest -m 'not slow'")
