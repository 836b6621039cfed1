"""Who may import whom (CONTRIBUTING, "The rooms"), read from the source: imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import falcon_hf

ROOT = Path(falcon_hf.__file__).parent
# Single files that every room may use.
SHARED = {
    "measured_calls",
    "metrics",
    "drafter_loading",
    "demo_target",
    "tree_files",
    "version",
    "run_names",
    "compiled_decoding",
    "whole_files",
    "chat_template",
}
MAY_IMPORT = {
    "runtime": set[str](),
    "measured_calls": set[str](),
    "metrics": set[str](),
    "demo_target": set[str](),
    "version": set[str](),
    "run_names": set[str](),
    "whole_files": set[str](),
    "chat_template": set[str](),
    "drafter_checks": {"runtime"},
    "drafter_loading": {"runtime", "drafter_checks"},
    "tree_files": {"runtime"},
    "compiled_decoding": {"runtime"},
    **{key: {"runtime", *SHARED} for key in ("training", "tuning", "hub", "bench")},
    "__init__": {"runtime", "hub", "demo_target", "version", "compiled_decoding"},
}
# ``cli`` may import all, and nobody imports it.
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"__init__"}
PURE = ("tree", "tree_shape", "verification")

FILES = sorted(path for path in ROOT.rglob("*.py"))


def imported(path: Path, source: str) -> Iterator[str]:
    """Absolute names of the modules that a file of the package imports, relative imports resolved."""
    package = ("falcon_hf", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*start, *([node.module] if node.module else [])))
            # Of a package, the names may be modules.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def trespasses(path: Path, source: str) -> list[str]:
    """What a file imports of rooms that its own may not import."""
    room = room_of(path)
    found = []
    for name in imported(path, source):
        package, _, rest = name.partition(".")
        if package != "falcon_hf":
            continue
        other = rest.partition(".")[0]
        if not ((ROOT / other).is_dir() or (ROOT / f"{other}.py").is_file()):
            other = "__init__"  # a name of the package itself
        if other != room and other not in MAY_IMPORT[room]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_the_rooms_it_may(path: Path) -> None:
    assert trespasses(path, path.read_text(encoding="utf-8")) == []


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)


def test_tree_and_verification_know_no_transformers() -> None:
    """Nor does anything they import of ours."""
    todo, seen = list(PURE), set[str]()
    while todo:
        name = todo.pop()
        seen.add(name)
        path = ROOT / "runtime" / f"{name}.py"
        for module in imported(path, path.read_text(encoding="utf-8")):
            assert module.partition(".")[0] != "transformers", f"{name}.py imports {module}"
            if module.startswith("falcon_hf.runtime."):
                own = module.split(".")[2]
                todo += [own] if own not in seen else []
    assert set(PURE) < seen, "rejection.py at least is reached"


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("runtime/tree.py", "from ..metrics import spread", ["falcon_hf.metrics.spread"]),
        ("runtime/tree.py", "from .tree_shape import chain\nfrom transformers import Cache", []),
        ("bench/runs.py", "from ..tuning.plan import Profile", ["falcon_hf.tuning.plan.Profile"]),
        ("bench/methods/falcon.py", "from ..errors import BenchError\nfrom ...version import __version__", []),
        ("bench/methods/falcon.py", "from ...hub import cards", ["falcon_hf.hub.cards"]),
        ("hub/find.py", "def f():\n    from falcon_hf.training import laws", ["falcon_hf.training.laws"]),
        ("tuning/plan.py", "import falcon_hf.cli.console", ["falcon_hf.cli.console"]),
        ("tuning/plan.py", "from .. import bench", ["falcon_hf.bench"]),
        ("training/laws.py", "from falcon_hf import FalconDrafter", ["falcon_hf.FalconDrafter"]),
        ("metrics.py", "from .runtime.tree import DraftTree", ["falcon_hf.runtime.tree.DraftTree"]),
        ("cli/tune.py", "from ..bench.errors import BenchError\nfrom ..tuning.errors import TuningError", []),
    ],
)
def test_trespasses_are_seen(file: str, source: str, found: list[str]) -> None:
    assert trespasses(ROOT / file, source) == found
