"""MkDocs hook: the navigation in reading order, and one API page a room, made from the source tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

# In reading order; a page that is not there (yet) is left out, one that is not named here comes last.
PAGES = {
    "index.md": "falcon_hf",
    "how-it-works.md": "How it works",
    "using.md": "Using it",
    "training.md": "Training a drafter",
    "ablations.md": "What pays in a drafter",
    "tuning.md": "Tuning k and the tree",
    "publishing.md": "Publishing a drafter",
    "measuring.md": "Measuring",
    "results.md": "Results",
    "comparison.md": "Methods and trees compared",
    "avx2.md": "On cores with AVX2 alone",
    "open-questions.md": "Open questions",
    "conformance.md": "What works where",
    "faq.md": "Questions",
}
ROOMS = ("runtime", "training", "tuning", "hub", "bench")
SOURCE = Path(__file__).parents[1] / "src" / "falcon_hf"


def rooms() -> list[str]:
    """Packages of falcon_hf that have modules, in reading order; the commands are for the shell, not for import."""
    found = [path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file() and path.name != "cli"]
    return sorted(found, key=lambda name: (ROOMS.index(name) if name in ROOMS else len(ROOMS), name))


def on_config(config: Any) -> Any:
    """Make the navigation."""
    there = {path.name for path in Path(config.docs_dir).glob("*.md")}
    named = [{title: page} for page, title in PAGES.items() if page in there]
    others = sorted(there - {*PAGES, "api.md"})
    reference: list[Any] = [{"Overview": "api.md"}]
    reference += [{f"falcon_hf.{room}": f"api/{room}.md"} for room in rooms()]
    config.nav = [*named, *others, {"API reference": reference}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each room."""
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=room_page(room)))
    return files


def room_page(room: str) -> str:
    """Markdown that mkdocstrings fills in: every public module of a room."""
    parts = [f"# falcon_hf.{room}"]
    for path in sorted((SOURCE / room).rglob("*.py")):
        names = path.relative_to(SOURCE).with_suffix("").parts
        if names[-1] == "__init__":
            names = names[:-1]
        if not any(name.startswith("_") for name in names):
            parts.append(f"::: falcon_hf.{'.'.join(names)}\n    options:\n      show_root_full_path: true")
    return "\n\n".join(parts) + "\n"


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things as transformers' do, [`Thing`]; show them without the brackets."""
    return re.sub(r"\[(<code>[^<]*</code>)\](?!\()", r"\1", html)
