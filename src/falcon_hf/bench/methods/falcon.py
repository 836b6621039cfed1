"""Falcon: a drafter in this package's format, with its own tree or another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ...drafter_loading import DrafterError, drafter_folder, load_drafter, weights_sha256
from ...runtime.candidate_generator import drafter_tree
from ...runtime.configuration_falcon_drafter import FalconDrafterConfig
from ...runtime.half_precision import drafting_dtype
from ...runtime.statistics import GenerationStatistics
from ...tree_files import describe_tree
from ..draft_trees import named_tree
from ..errors import BenchError, first_line
from .base import Method, MethodContext

# Fields of a drafter's config that say where it is from or how it is loaded, not how it drafts.
_WHENCE = {
    "_name_or_path",
    "target_name_or_path",
    "architectures",
    "auto_map",
    "code_stamp",
    "dtype",
    "transformers_version",
}
# Fields of a drafter's config that a run may set: those that decide how it drafts and is verified. All others belong
# to its weights or to its target, and another value would be another drafter.
FIELDS = {
    "lookup": "{} to continue repeated text too, with a dynamic tree; null not to; a static tree has none",
    "verifier": "follow or rejection",
    "auto_off": "true or false: whether drafting pauses where it does not pay",
}


class Falcon(Method):
    """``generate(assistant_model=drafter)``."""

    name = "falcon"
    settings = {
        "drafter": "folder or Hub repo, --drafter by default",
        "tree": "paper, chainN, dynamicN (N nodes), or a file as for --tree; --tree by default, else the drafter's own",
        **FIELDS,
    }
    needs_drafter = True

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        super().__init__(label, context, settings)
        source = settings.get("drafter", context.drafter)
        if source is None:
            raise BenchError(f"{label} needs a drafter: pass --drafter PATH_OR_REPO.")
        self.source = source
        try:
            folder = drafter_folder(source)
            dtype = drafting_dtype(self.target.device, self.target.dtype)
            self.drafter = load_drafter(folder, dtype).to(self.target.device)
        except DrafterError as error:
            raise BenchError(first_line(error)) from error
        self.weights_sha256 = weights_sha256(folder)
        fields = {name: _value(text) for name, text in settings.items() if name not in ("drafter", "tree")}
        tree = context.tree
        if "tree" in settings:
            tree = named_tree(settings["tree"], self.drafter.config.block_size)
        if tree is not None:
            # The drafter's own look-up needs a dynamic tree.
            fields = {**({} if isinstance(tree, dict) else {"lookup": None}), **fields, "tree": tree}
        self._configure(fields)
        self.draws_as_plain = self.drafter.config.verifier == "follow"
        try:
            self.tree = drafter_tree(self.drafter, self.target, context.batch_size)
        except ValueError as error:
            raise BenchError(f"{label}: {first_line(error)}") from error
        # One row's tree is the largest, and a run's last batch may be one row.
        self.room = drafter_tree(self.drafter, self.target).size

    def _configure(self, fields: dict[str, Any]) -> None:
        """Set fields of the drafter's config, checked as a config of its own.

        Raises:
            BenchError: on a value that the config refuses.
        """
        given = {
            name: getattr(self.drafter.config, name)
            for name in set(FalconDrafterConfig.__annotations__) - {"model_type"}
        }
        try:
            checked = FalconDrafterConfig(**{**given, **fields})
        except (TypeError, ValueError) as error:
            raise BenchError(f"{self.label}: {_reason(error)}") from error
        for name in fields:
            setattr(self.drafter.config, name, getattr(checked, name))

    def arguments(self) -> dict[str, Any]:
        """The drafter."""
        return {"assistant_model": self.drafter}

    def provenance(self) -> dict[str, Any]:
        """Drafter, its weights' hash, tree and shape."""
        config = self.drafter.config
        return {
            **super().provenance(),
            "drafter": _shown(self.source),
            "weights_sha256": self.weights_sha256,
            "drafter_dtype": str(self.drafter.dtype).removeprefix("torch."),
            "block_size": config.block_size,
            "fusion": config.fusion,
            "draft_vocab_size": config.draft_vocab_size,
            **describe_tree(self.tree, config.block_size),
            "config": {name: getattr(config, name) for name in FIELDS},
            "config_sha256": _config_sha256(config),
        }

    def row_statistics(self, new_tokens: int, forwards: int, rows: int, row: int) -> dict[str, float]:
        """What the decoding loop counted and timed itself."""
        whole = self.drafter.last_generation
        assert whole is not None  # generate() has just returned
        if rows == 1:
            return whole.as_dict()
        lengths = whole.accepted_by_round[row]
        counted = {name: value / rows for name, value in whole.as_dict().items()}
        own = GenerationStatistics(row_rounds=len(lengths), accepted=sum(lengths), new_tokens=new_tokens)
        counted |= {"rows": 1, "row_rounds": own.row_rounds, "accepted": own.accepted, "new_tokens": new_tokens}
        return counted | {"tau": own.tau, "tau_with_bonus": own.tau_with_bonus, "alpha": own.alpha}

    def accepted_by_round(self) -> list[list[int]] | None:
        """What the decoding loop counted."""
        whole = self.drafter.last_generation
        assert whole is not None
        return whole.accepted_by_round


METHOD = Falcon


def _shown(source: str) -> str:
    """A drafter's name for results: a folder below the current one without the way to it."""
    path, here = Path(source).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_dir() and path.is_relative_to(here) else source


def _config_sha256(config: FalconDrafterConfig) -> str:
    """Hash of all that decides how a drafter drafts beside its weights, calibration and what the run set included."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _WHENCE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _value(text: str) -> Any:
    """A setting as typed: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _reason(error: BaseException) -> str:
    """The line of an error that says what is wrong: a strict config's first only names the field."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
