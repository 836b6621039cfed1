"""Falcon: a drafter in this package's format, with its own tree or another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...drafter_loading import DrafterError, load_drafter
from ...runtime.candidate_generator import tree_shape
from ...runtime.tree_shape import TreeShape
from ..errors import BenchError, first_line
from .base import Method, MethodContext


class Falcon(Method):
    """``generate(assistant_model=drafter)``."""

    name = "falcon"
    settings = {
        "drafter": "folder or Hub repo, --drafter by default",
        "tree": "JSON file of paths, --tree by default, else the drafter's own",
    }
    needs_drafter = True

    def __init__(self, label: str, context: MethodContext, settings: dict[str, str]) -> None:
        super().__init__(label, context, settings)
        source = settings.get("drafter", context.drafter)
        if source is None:
            raise BenchError(f"{label} needs a drafter: pass --drafter PATH_OR_REPO.")
        self.source = source
        folder = drafter_folder(source)
        try:
            self.drafter = load_drafter(folder, self.target.dtype).to(self.target.device)
        except DrafterError as error:
            raise BenchError(first_line(error)) from error
        self.weights_sha256 = weights_sha256(folder)
        tree = read_tree(settings["tree"]) if "tree" in settings else context.tree
        if tree is not None:
            self.drafter.config.tree = tree
        try:
            self.shape = tree_shape(self.drafter)
        except ValueError as error:
            raise BenchError(f"{label}: {first_line(error)}") from error

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
            "block_size": config.block_size,
            "fusion": config.fusion,
            "draft_vocab_size": config.draft_vocab_size,
            "tree": [list(path) for path in self.shape.paths],
            "tree_nodes": self.shape.size - 1,
            "tree_depth": self.shape.depth,
        }

    def statistics(self, new_tokens: int, forwards: int) -> dict[str, float]:
        """What the decoding loop counted and timed itself."""
        counted = self.drafter.last_generation
        assert counted is not None  # generate() has just returned
        return counted.as_dict()


METHOD = Falcon


def _shown(source: str) -> str:
    """A drafter's name for results: a folder below the current one without the way to it."""
    path, here = Path(source).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_dir() and path.is_relative_to(here) else source


def drafter_folder(source: str) -> Path:
    """The local folder of a drafter; a Hub repo's is downloaded or found in the cache.

    Raises:
        BenchError: if there is no such folder and no such repo within reach.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise BenchError(f"The drafter {source} is not a folder here, nor a Hub repo's name (org/name).") from error
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], etag_timeout=5))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BenchError(
            f"The drafter {source} is not a folder here, and the Hub does not give it: {first_line(error)}"
        ) from error


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's safetensors; of several files, read one after the other in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_tree(path: str) -> list[list[int]]:
    """Paths of child ranks, ``[[0], [1], [0, 0]]``, from a JSON file.

    Raises:
        BenchError: if the file cannot be read or holds no tree.
    """
    try:
        paths = json.loads(Path(path).read_text(encoding="utf-8"))
        return [list(kept) for kept in TreeShape.from_paths(paths).paths]
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise BenchError(f"The tree file {path} cannot be used: {reason}") from error
