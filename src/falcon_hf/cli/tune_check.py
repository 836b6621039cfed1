"""The check of ``falcon-hf tune``: which settings, and their measurement with a file that is gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..tuning.calibrate import CalibrationPlan, NamedDrafter
from ..tuning.calibration import Calibration
from ..tuning.check import compare, measure, spread_settings, sweep_settings
from ..tuning.check_file import CheckFile
from ..tuning.choice import Prediction
from .prompts import PromptSet


def check_settings(
    calibration: Calibration, best: Prediction, plan: CalibrationPlan, count: int | None, dynamic: bool
) -> list[Prediction]:
    """The settings to measure: ``count`` spread ones, or for None a sweep and the automatic choice ``best``.

    With ``dynamic`` each tuned tree a second time, as a dynamic one, and always the best, which may be a chain or the
    paper's tree as well.
    """
    options = calibration.options()
    if count is not None:
        chosen = spread_settings(options, count, plan.passes, plan.nodes)
    else:
        # The automatic choice is none of the sweep's sizes: it is measured beside them.
        chosen = [replace(best, kind="chosen"), *sweep_settings(options, plan.passes, plan.nodes)]
    twins = [one for place, one in enumerate(chosen) if place == 0 or one.kind == "tuned"]  # the first is the best
    return chosen + [calibration.dynamic(one) for one in twins if dynamic]


def run_check(
    path: Path,
    calibration_path: Path,
    calibration: Calibration,
    target: PreTrainedModel,
    drafters: list[NamedDrafter],
    prompts: PromptSet,
    settings: list[Prediction],
    max_new_tokens: int,
    repeats: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Measure what the file at ``path`` does not hold yet, and complete it; a complete one is returned as it is.

    Raises:
        TuningError: as [`CheckFile`], [`measure`] and [`compare`].
    """
    plan = {
        "calibration_sha256": hashlib.sha256(calibration_path.read_bytes()).hexdigest(),
        "prompts": {"sha256": prompts.sha256, "count": len(prompts.prompts)},
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "settings": [[setting.drafter, setting.tree, setting.lookup] for setting in settings],
    }
    file = CheckFile(path, plan)
    if file.result is not None:
        return file.result
    turns = measure(target, drafters, prompts.prompts, settings, max_new_tokens, repeats, report, file.turns, file.add)
    return file.finish(compare(calibration, settings, turns))
