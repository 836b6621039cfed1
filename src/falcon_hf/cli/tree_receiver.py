"""``tune --apply``: the drafter in a folder, which gets the best tree of those that are its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..runtime.machine_trees import is_by_machine
from ..tuning.calibrate import NamedDrafter
from ..tuning.choice import Prediction
from ..tuning.drafter_tree import drafter_config, write_drafter_tree
from ..tuning.errors import TuningError


class TreeReceiver:
    """The drafter that is to get a tree: one of those measured, for another one's ranks and k are not its own.

    Args:
        folder: of ``--apply``.
        sources: the drafters measured.
        beside: keep its dynamic tree for machines of the other kind, beside which there can be a dynamic one only.

    Attributes:
        name: which of the drafters it is.
        words: what was given it, and for which machines; None before.

    Raises:
        TuningError: if the folder is none of the drafters', or has no tree to be kept ``beside``.
    """

    def __init__(self, folder: Path, sources: list[str], beside: bool) -> None:
        config = drafter_config(folder)
        if beside and not isinstance(config.get("tree"), dict):
            raise TuningError(f"--beside keeps a dynamic tree for machines of the other kind, and {folder} has none.")
        same = [source for source in sources if Path(source).is_dir() and Path(source).resolve() == folder.resolve()]
        if not same:
            raise TuningError(
                f"--apply {folder} is none of the drafters measured ({', '.join(sources)}): a tree fits the drafter it "
                "was found for. Give its folder with --drafter."
            )
        self.name = same[0]
        self.words: str | None = None
        self._folder, self._beside = folder, beside

    def draws_siblings(self, drafters: list[NamedDrafter]) -> bool:
        """Whether it has the verifier 'rejection', which takes static trees alone."""
        return any(named.name == self.name and named.drafter.config.verifier == "rejection" for named in drafters)

    def refuse_rejection(self, drafters: list[NamedDrafter]) -> None:
        """See that it could sample with a dynamic tree, which it may get.

        Raises:
            TuningError: if it could not.
        """
        if self.draws_siblings(drafters):
            raise TuningError(
                f"The drafter in {self.name} has the verifier 'rejection', which takes no dynamic tree when sampling: "
                'set "verifier": "follow" in its config.json, or leave out --dynamic.'
            )

    def require_one_of(self, settings: list[Prediction]) -> None:
        """See that one of the settings to be measured could be given it.

        Raises:
            TuningError: if none could.
        """
        if not any(self._takes(one.drafter, one.dynamic is not None) for one in settings):
            raise TuningError(
                f"None of the {len(settings)} settings to measure is one of {self._folder}, which is to get the "
                "fastest of its own: raise --settings, or give that --drafter alone."
            )

    def give(self, tree: Any, lookup: dict[str, Any] | None, dear: bool) -> None:
        """Write a tree and its look-up, as ``write_drafter_tree`` does."""
        now = write_drafter_tree(self._folder, tree, lookup, dear=dear, beside=self._beside)
        kind = "dynamic with look-up" if isinstance(now, dict) else "static"
        where = ", on machines of this kind" if is_by_machine(now) else ""
        self.words = f"The best tree, {kind}, is now the tree of {self._folder}{where}."

    def give_fastest(self, measured: Iterable[dict[str, Any]], dear: bool) -> None:
        """Write the fastest of ``measured`` settings, as a check's result has them, that it takes."""
        own = [entry for entry in measured if self._takes(entry["drafter"], isinstance(entry["tree"], dict))]
        fastest = max(own, key=lambda entry: float(entry["measured"]["tokens_per_second"]))
        self.give(fastest["tree"], fastest["lookup"], dear)

    def _takes(self, drafter: str, dynamic: bool) -> bool:
        return drafter == self.name and (dynamic or not self._beside)
