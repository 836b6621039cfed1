"""The results of ``falcon-hf bench`` in a drafter's folder: which there are, and whether they are this drafter's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.candidate_generator import config_tree
from ..runtime.configuration_falcon_drafter import FalconDrafterConfig
from ..runtime.machine_trees import MachineTrees
from ..tree_files import describe_tree
from .errors import HubError

BENCHMARKS = "benchmarks"
_AS_IT_IS = ("falcon", "falcon_compiled")  # labels of rows that set nothing of the drafter's config


def result_files(folder: Path, recipe: dict[str, Any]) -> list[Path]:
    """The stored results of a drafter, in the order the recipe's card asks for, else by name.

    Raises:
        HubError: if the recipe names one that is not there, or leaves one out.
    """
    found = {path.name: path for path in sorted((folder / BENCHMARKS).glob("*.json"))}
    order = recipe.get("card", {}).get("results", list(found))
    if sorted(order) != sorted(found):
        raise HubError(
            f"The recipe's card lists the results {', '.join(order)}, and {folder / BENCHMARKS} holds "
            f"{', '.join(found) or 'none'}: list each once."
        )
    return [found[name] for name in order]


def check_result(file: Path, result: dict[str, Any], config: FalconDrafterConfig, weights: str) -> None:
    """Refuse a result that a card would give for this drafter's and is not.

    Args:
        file: where it is stored.
        result: its content.
        config: the drafter's.
        weights: SHA-256 of its weights.

    Raises:
        HubError: if the run is not finished, has no figures of these weights, or drafted with another tree or look-up.
    """
    if not result["complete"]:
        raise HubError(f"{file} is not finished: run its falcon-hf bench command again, or take the file away.")
    methods = result["settings"]["methods"]
    if not any(method.get("weights_sha256") == weights for method in methods.values()):
        raise HubError(f"{file} has no figures of these weights: measure anew, or take the file away.")
    batch = result["settings"].get("batch_size", 1)
    for label in _AS_IT_IS:
        method = methods.get(label, {})
        if method.get("weights_sha256") == weights and not _is_of(method, config, batch):
            raise HubError(
                f"{file}: {label} was measured with another tree or look-up than config.json has: measure anew, or "
                "take the file away."
            )


def _is_of(method: Mapping[str, Any], config: FalconDrafterConfig, batch: int) -> bool:
    """Whether a row drafted as ``config`` says, on one kind of machine or the other."""
    tree = config_tree(config)
    trees = [tree.where(dear).for_rows(batch) for dear in (False, True)] if isinstance(tree, MachineTrees) else [tree]
    described = [describe_tree(each, config.block_size)["tree"] for each in trees]
    noted = method["tree"]
    if isinstance(noted, dict):  # a result of an older version has fewer fields
        described = [{name: each[name] for name in noted if name in each} for each in described]
    fields = method.get("config", {})
    return noted in described and all(getattr(config, name) == value for name, value in fields.items())
