"""What a training says on the terminal: a bar for features and one for laws, and an evaluation's lines."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from falcon_hf.cli import training_progress
from falcon_hf.cli.training_progress import evaluation_lines, feature_bar


class Bar:
    """Stands for rich's; notes what happens to it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.did: list[Any] = []
        bars.append(self)

    def add_task(self, _: str, total: int) -> int:
        self.did.append(("total", total))
        return 0

    def start(self) -> None:
        self.did.append("start")

    def update(self, _: int, completed: int) -> None:
        self.did.append(completed)

    def stop(self) -> None:
        self.did.append("stop")


bars: list[Bar] = []


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    bars.clear()
    monkeypatch.setattr(training_progress, "Progress", Bar)


def test_features_and_laws_have_a_bar_each() -> None:
    with feature_bar(Console()) as update:
        for call in ((4, 8), (8, 8), (1, 2), (2, 2)):
            update(*call)
    assert [bar.did for bar in bars] == [[("total", 8), "start", 4, 8, "stop"], [("total", 2), "start", 1, 2, "stop"]]


def test_a_bar_that_is_left_goes() -> None:
    def cut_off() -> None:
        with feature_bar(Console()) as update:
            update(4, 8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert bars[0].did[-1] == "stop"
    with feature_bar(Console()):
        pass
    assert len(bars) == 1  # one that never ran would write an empty line


def test_an_evaluations_lines() -> None:
    tops = {"top1": 0.5, "top3": 0.75, "top10": 0.875}
    logs = {"eval_loss": 1.5, "eval_tau_with_bonus": 2.25}
    logs |= {f"eval_pass1_position{place}_{name}": value for place in (1, 2) for name, value in tops.items()}
    logs |= {f"eval_corrected_position2_{name}": value + 0.1 for name, value in tops.items()}
    assert evaluation_lines(logs) == [
        "held out: loss 1.5000, 2.250 tokens a round (simulated)",
        "  pass 1, top 1 / 3 / 10 in % a position: 50.0 / 75.0 / 87.5; 50.0 / 75.0 / 87.5",
        "  pass 1 corrected for the token before, from position 2 on: 60.0 / 85.0 / 97.5",
    ]
