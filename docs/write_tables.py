"""Write all tables of measurements anew from the stored results: ``python docs/write_tables.py``.

``tests/test_readme.py`` holds that the pages have the tables that this writes, and that no stored result is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from falcon_hf.bench.report import render, update_file
from falcon_hf.bench.result_file import read_result
from falcon_hf.cli.publish import render_results
from falcon_hf.hub.publish import prepare
from falcon_hf.hub.recipe_file import read_recipe
from falcon_hf.hub.stored_results import result_files

ROOT = Path(__file__).parents[1]
CARD = ROOT / "hub_cards" / "falcon-smollm2-135m-instruct"
MEASUREMENTS = ROOT / "docs" / "measurements"

# Each in the order of its tables.
# Other methods, other drafters, and other sizes of the tree.
COMPARED = (
    "all-mt-bench-bfloat16-greedy",
    "all-gsm8k-bfloat16-greedy",
    "all-humaneval-bfloat16-greedy",
    "all-mt-bench-bfloat16-sampled",
    "all-gsm8k-bfloat16-sampled",
    "all-humaneval-bfloat16-sampled",
    "all-mt-bench-float32-greedy",
    "all-gsm8k-float32-greedy",
    "all-humaneval-float32-greedy",
    "all-mt-bench-float32-sampled",
    "all-gsm8k-float32-sampled",
    "all-humaneval-float32-sampled",
    "sizes-mt-bench-bfloat16-greedy",
)
# Small drafters, trained alike.
ABLATED = (
    "ablation-mt-bench-bfloat16-greedy",
    "ablation-gsm8k-bfloat16-greedy",
    "ablation-humaneval-bfloat16-greedy",
)
# The drafter before the shipped one, on another machine.
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


@dataclass(frozen=True)
class Page:
    """A page with tables, and the results they show.

    Attributes:
        path: the file, with the two lines that the tables stand between.
        results: the result files, in the order of the tables.
        brief: whether it has one table only.
    """

    path: Path
    results: list[Path]
    brief: bool = False

    def table(self) -> str:
        """What stands between the lines."""
        return render([read_result(path) for path in self.results], self.brief)


def measurements(names: Sequence[str]) -> list[Path]:
    """The files of results that are no card's."""
    return [MEASUREMENTS / f"{name}.json" for name in names]


SHIPPED = result_files(CARD, read_recipe(CARD))
PAGES = {
    "README": Page(ROOT / "README.md", SHIPPED, brief=True),
    "results": Page(ROOT / "docs" / "results.md", SHIPPED),
    "card": Page(CARD / "README.md", SHIPPED),
    "comparison": Page(ROOT / "docs" / "comparison.md", measurements(COMPARED)),
    "ablations": Page(ROOT / "docs" / "ablations.md", measurements(ABLATED)),
    "avx2": Page(ROOT / "docs" / "avx2.md", measurements(EARLIER)),
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        if name != "card":
            update_file(page.path, page.table())
    prepare(CARD, render_results)
