"""The tables in README, cards and docs are those of the stored results, and the README's commands are CI's."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from falcon_hf.bench.report import BEGIN, END
from falcon_hf.bench.result_file import read_result
from falcon_hf.bench.summary import summarise
from falcon_hf.tuning.check_file import is_check

ROOT = Path(__file__).parents[1]
write_tables = runpy.run_path(str(ROOT / "docs" / "write_tables.py"))
PAGES = write_tables["PAGES"]
STORED = sorted({path for page in PAGES.values() for path in page.results})


def test_no_stored_result_is_left_out():
    kept = {*write_tables["MEASUREMENTS"].iterdir(), *(write_tables["CARD"] / "benchmarks").iterdir()}
    checks = {path for path in write_tables["MEASUREMENTS"].iterdir() if is_check(path)}
    assert set(STORED) == kept - checks
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    for path in checks:
        assert f"<!-- from: falcon-hf report {path.relative_to(ROOT)} -->" in pages


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_stored_results(name):
    text = PAGES[name].path.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == PAGES[name].table().strip()


def test_summaries_are_those_of_the_runs():
    for path in STORED:
        result = read_result(path)
        found = json.loads(json.dumps(summarise(result["runs"], list(result["settings"]["methods"]))))
        assert found == result["summary"], path.name


def test_results_are_complete_and_float32_is_identical():
    for path in STORED:
        result = read_result(path)
        assert result["complete"]
        if result["settings"]["target"]["dtype"] == "float32":
            for label in result["summary"].keys() - {"plain"}:
                method = result["summary"][label]
                assert method["identical"] == method["compared"], (path.name, label)
                assert method["compared"] > 0 or "tree" not in result["settings"]["methods"][label], (path.name, label)


def test_the_readmes_sentence_is_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    three = r"([\d.]+), ([\d.]+) and ([\d.]+)"
    said = re.search(
        rf"In bfloat16 Falcon is {three} times as fast .*?compiled\s{three} times, "
        rf"where plain .*? is {three} times as fast\. "
        rf"Each forward of the\starget gives {three} tokens\. None of these 240 questions was slower",
        readme,
        flags=re.DOTALL,
    )
    assert said is not None
    folder = write_tables["CARD"] / "benchmarks"
    stored = [folder / f"{name}-bfloat16-greedy.json" for name in ("mt-bench", "gsm8k", "humaneval")]
    sets = [read_result(path)["summary"] for path in stored]
    methods = ("falcon", "falcon_compiled", "plain_compiled")
    speeds = [f"{one[method]['speed_ratio']['median']:.2f}" for method in methods for one in sets]
    assert list(said.groups()) == speeds + [f"{one['falcon']['tau_with_bonus']:.1f}" for one in sets]
    assert all(one[method]["speed_ratio"]["min"] > 1 for one in sets for method in methods[:2])


def test_ci_finds_the_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", readme)
    assert command is not None
    assert command[1].endswith("pytest -m 'not slow'")
