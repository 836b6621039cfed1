"""The report: its tables, and a README that is kept equal to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from falcon_hf.bench.errors import BenchError
from falcon_hf.bench.report import BEGIN, END, render, update_file, with_report
from falcon_hf.bench.summary import summarise

from .test_summary import PHASED, entry

FALCON = {
    "method": "falcon", "drafter": "hub_cards/small", "weights_sha256": "ab" * 32, "block_size": 2, "fusion": "lstm",
    "draft_vocab_size": None, "tree": [[0]], "tree_nodes": 1, "tree_depth": 1,
}  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    """Two questions; Falcon is faster and differs once by a tie, prompt lookup loses."""
    compared = {"identical": True}
    tie = {"identical": False, "first_difference": 17, "gap": 0.0625, "gap_unit": 0.125, "gap_units": 0.5}
    runs = [
        entry("plain", 81, 2.0, 10),
        entry("falcon", 81, 1.0, 10, statistics=PHASED, **compared),
        entry("prompt_lookup", 81, 4.0, 10, **compared),
        entry("plain", 82, 2.0, 10),
        entry("falcon", 82, 1.25, 10, statistics=PHASED, **tie),
        entry("prompt_lookup", 82, 4.0, 10, **compared),
    ]
    settings = {
        "versions": {"falcon_hf": "0.1.0", "transformers": "5.24.0", "torch": "2.13.0", "python": "3.11"},
        "machine": {"cpu": "Some | CPU", "threads": 2, "device": "cpu"},
        "target": {"name": "org/target", "dtype": "bfloat16", "attention": "sdpa", "fingerprint": []},
        "questions": {"file": "mt_bench.jsonl", "sha256": "cd" * 32, "count": 2, "turns": 1},
        "methods": {"plain": {}, "falcon": dict(FALCON), "prompt_lookup": {"tokens": 10}},
        "options": {"do_sample": False, "max_new_tokens": 10},
        "seeds": [0],
        "repeats": 1,
        "warmup": 1,
    }
    summary = summarise(runs, list(settings["methods"]))
    date = "2026-11-24T19:00:00+00:00"
    head = {"format": 1, "complete": True, "date": date, "finished": date}
    return {**head, "settings": settings, "summary": summary, "runs": runs}


def row(report: str, *starts: str) -> list[list[str]]:
    """Cells of the table rows whose first cells are ``starts``."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in report.splitlines() if line[:1] == "|"]
    return [cells for cells in rows if cells[: len(starts)] == list(starts)]


def test_speed_agreement_and_round(result: dict[str, Any]) -> None:
    report = render([result])
    name = "mt_bench, bfloat16, greedy"
    speed, agreement, gap, timed = row(report, name, "falcon")
    assert speed[2:] == ["8.9", "1.80x", "1.70 to 1.90", "1.60 to 2.00", "1.78x", "1.00", "2.00", "44%"]
    assert agreement[2:] == ["1 of 2", "0.0625", "0.0625", "0.5", "0.5"]
    assert gap[2:] == ["82", "0", "17", "0.0625", "0.125", "0.5"]
    assert timed[2:] == [
        "8", "200.0", "50.00 (25.0%)", "100.00 (50.0%)", "25.00 (12.5%)", "15.00 (7.5%)", "10.00 (5.0%)", "25.0%",
    ]  # fmt: skip


def test_plain_is_a_row_without_a_ratio_and_losing_rows_are_kept(result: dict[str, Any]) -> None:
    report = render([result])
    (plain,) = row(report, "mt_bench, bfloat16, greedy", "plain")
    assert plain[2:] == ["5.0", "-", "-", "-", "-", "0.00", "1.00", "0%"]
    loser = row(report, "mt_bench, bfloat16, greedy", "prompt_lookup")[0]
    assert loser[3] == "0.50x"


def test_every_table_is_rectangular(result: dict[str, Any]) -> None:
    result["settings"]["questions"]["file"] = "a|b.jsonl"
    tables = [part.splitlines() for part in render([result]).split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_provenance_line(result: dict[str, Any]) -> None:
    (line,) = [line for line in render([result]).splitlines() if line.startswith("- ")]
    for part in (
        "org/target, bfloat16, sdpa", "Some | CPU, 2 threads", "2 questions of mt_bench.jsonl (sha256 cdcdcdcdcdcd)",
        "10 new tokens", "1 seed, 1 repeat", "`falcon` is hub_cards/small (weights abababababab, k = 2",
        "transformers 5.24.0", "2026-11-24",
    ):  # fmt: skip
        assert part in line
    assert "INCOMPLETE" not in line
    assert "k = 2, tree of 1 nodes, depth 1)" in line
    method = result["settings"]["methods"]["falcon"]
    method |= {"tree": {"kind": "dynamic", "nodes": 1}, "config": {"lookup": None}}
    assert "k = 2, dynamic tree of 1 nodes, depth 1)" in render([result])
    method["config"]["lookup"] = {}
    assert "k = 2, dynamic tree of 1 nodes, depth 1, with look-up)" in render([result])
    result["settings"]["machine"]["cpu_capability"] = "AVX2"
    assert "Some | CPU (AVX2), 2 threads" in render([result])
    result["complete"], result["settings"]["questions"]["count"] = False, 80
    assert "INCOMPLETE: 2 of 80 done" in render([result])


def test_several_results_have_names_of_their_own(result: dict[str, Any]) -> None:
    sampled = copy.deepcopy(result)
    sampled["settings"]["options"] |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    report = render([result, sampled, result])
    for name in (
        "mt_bench, bfloat16, greedy (1)",
        "mt_bench, bfloat16, greedy (2)",
        "mt_bench, bfloat16, temperature 0.7, top_p 0.9",
    ):
        assert len(row(report, name, "falcon")) == 4


def test_a_batchs_size_and_turns_are_in_its_name(result: dict[str, Any]) -> None:
    batched, turned = copy.deepcopy(result), copy.deepcopy(result)
    batched["settings"]["batch_size"] = 4
    turned["settings"]["questions"]["turns"] = 2
    report = render([result, batched, turned])
    assert row(report, "mt_bench, bfloat16, greedy", "plain")
    assert row(report, "mt_bench, bfloat16, greedy, batches of 4", "plain")
    assert row(report, "mt_bench, bfloat16, greedy, up to 2 turns", "plain")


def test_tables_without_content_are_left_out(result: dict[str, Any]) -> None:
    result["runs"] = [run for run in result["runs"] if run["method"] == "prompt_lookup"]
    for run in result["runs"]:
        run["identical"] = None
    result["summary"] = summarise(result["runs"], ["prompt_lookup"])
    report = render([result])
    assert len(row(report, "mt_bench, bfloat16, greedy")) == 1
    assert "identical" not in report
    assert report.count("<details>") == 1  # where it is from
    assert "**" not in report  # no title without its table


def test_nothing_to_report(result: dict[str, Any]) -> None:
    with pytest.raises(BenchError, match="at least one result"):
        render([])
    with pytest.raises(BenchError, match="no finished question"):
        render([{**result, "summary": {}, "runs": []}])


def test_readme_is_updated_between_the_markers_only(tmp_path: Path, result: dict[str, Any]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nEnd.\n", encoding="utf-8")
    report = render([result])
    before = readme.read_text()
    assert update_file(readme, report, check=True)
    assert readme.read_text() == before
    assert update_file(readme, report)
    text = readme.read_text(encoding="utf-8")
    assert text == f"# Title\n\n{BEGIN}\n{report.rstrip()}\n{END}\n\nEnd.\n"
    assert not update_file(readme, report, check=True)
    assert not update_file(readme, report)
    readme.write_text(text.replace("1.80x", "2.80x"), encoding="utf-8")
    assert update_file(readme, report, check=True)


@pytest.mark.parametrize(
    "text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}", f"{BEGIN}\n{END}\n{END}"]
)
def test_markers_must_be_one_pair(tmp_path: Path, text: str) -> None:
    with pytest.raises(BenchError, match="results:begin"):
        with_report(text, "report")
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(BenchError, match=r"README\.md has no place for results"):
        update_file(readme, "report")
    assert readme.read_text(encoding="utf-8") == text


def test_unreadable_readme(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be updated: No such file"):
        update_file(tmp_path / "absent.md", "report")


def test_tasks_are_a_table_of_their_own(result: dict[str, Any]) -> None:
    assert "By task" not in render([result])
    for run in result["runs"]:
        run["category"] = "maths" if run["question_id"] == 81 else "code"
    report = render([result])
    name = "mt_bench, bfloat16, greedy"
    assert row(report, name, "maths", "falcon")[0][3:] == ["1", "10.0", "2.00x", "1.00", "2.00", "44%", "1 of 1"]
    assert row(report, name, "code", "falcon")[0][3:] == ["1", "8.0", "1.60x", "1.00", "2.00", "44%", "0 of 1"]
    assert row(report, name, "code", "plain")[0][5] == "-"


def test_acceptance_by_depth_and_memory(result: dict[str, Any]) -> None:
    name = "mt_bench, bfloat16, greedy"
    for run in result["runs"]:
        run["peak_bytes"] = {"plain": 100, "falcon": 120, "prompt_lookup": 100}[run["method"]] << 20
        if run["method"] == "falcon":
            run["accepted"] = [2, 1, 0, 1]
    result["summary"] = summarise(result["runs"], ["plain", "falcon", "prompt_lookup"])
    report = render([result])
    for title in (
        "**Texts that are plain's",
        "**Rounds that accept a draft",
        "**Where a round's time goes",
        "Peak memory<",
    ):
        assert title in report
    assert [name, "falcon", "75%", "25%"] in row(report, name, "falcon")
    assert [name, "falcon", "120", "+20"] in row(report, name, "falcon")
    assert [name, "plain", "100", "-"] in row(report, name, "plain")


def test_a_method_that_did_not_run_has_a_row_and_a_reason(result: dict[str, Any]) -> None:
    result["failed"] = {"plain_compiled": "no compiler"}
    report = render([result])
    assert row(report, "mt_bench, bfloat16, greedy", "plain_compiled")[0][2:] == ["did not run", *["-"] * 7]
    assert "`plain_compiled` did not run: no compiler" in report


def test_brief_is_speed_and_agreement(result: dict[str, Any]) -> None:
    result["failed"] = {"plain_compiled": "no compiler"}
    brief, full = render([result], brief=True), render([result])
    name = "mt_bench, bfloat16, greedy"
    plain = row(full, name, "plain")[0][2]
    speed, agreement = row(full, name, "falcon")[:2]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in brief.splitlines() if line.startswith(f"| {name}")
    ]
    assert rows[0] == [name, "falcon", plain, *speed[2:6], speed[8], agreement[2]]
    assert [cells[1] for cells in rows] == ["falcon", "prompt_lookup", "plain_compiled"]
    assert rows[-1] == [name, "plain_compiled", plain, "did not run", *["-"] * 5]
    assert len(row(full, name, "falcon")) == 4
    provenance = [line for line in full.splitlines() if line.startswith(f"- {name}")]
    assert provenance
    assert set(provenance) <= set(brief.splitlines())


def test_turns_and_batches_are_named(result: dict[str, Any]) -> None:
    result["settings"]["questions"]["turns"] = 2
    result["settings"]["batch_size"] = 4
    result["runs"][4]["turn"] = 1
    report = render([result])
    assert "up to 2 turns of 2 questions" in report
    assert "batches of 4" in report
    assert row(report, "mt_bench, bfloat16, greedy, batches of 4, up to 2 turns", "falcon", "82, turn 2")
