"""What each round of a generation did: which tokens were drafted and accepted, drafted and rejected, the target's own.

    with GenerationTrace(drafter) as trace:
        out = target.generate(**inputs, assistant_model=drafter)
    trace.show(tokenizer, out)           # in a terminal
    trace.html(tokenizer, out)           # in a notebook: IPython.display.HTML(...)

Recording copies each round's tree to the host: a device sync a round, only while tracing.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from rich.console import Console
from rich.text import Text

from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.tree import DraftTree
from .errors import TuningError

Kind = Literal["prompt", "accepted", "rejected", "target"]

_STYLES: dict[Kind, str] = {
    "prompt": "dim", "accepted": "bold green", "rejected": "strike red", "target": "yellow",
}  # fmt: skip
_CSS: dict[Kind, str] = {
    "prompt": "color:#888",
    "accepted": "background:#c8e6c9;color:#000",
    "rejected": "background:#ffcdd2;color:#000;text-decoration:line-through",
    "target": "background:#fff3c4;color:#000",
}


@dataclass(frozen=True)
class TracedRound:
    """One round: the tree's tokens and parents, and the visited nodes, root first, one list a batch row."""

    tokens: list[list[int]]
    parents: list[list[int]]
    paths: list[list[int]]


@dataclass(frozen=True)
class Segment:
    """Tokens of one kind in one round; round 0 is the prefill."""

    round: int
    kind: Kind
    tokens: tuple[int, ...]


class GenerationTrace:
    """Records the rounds of ``generate()`` calls made in the ``with`` block; the last call's are kept.

    Attributes:
        rounds: one a round.
    """

    def __init__(self, drafter: FalconDrafter) -> None:
        self.drafter = drafter
        self.rounds: list[TracedRound] = []
        self._before: Any = None

    def __enter__(self) -> GenerationTrace:
        """Start to record.

        Raises:
            TuningError: if something else is recording this drafter.
        """
        if self.drafter.on_round is not None:
            raise TuningError("This drafter's rounds are being recorded already.")
        self.rounds = []
        self.drafter.on_round = self._record
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.drafter.on_round = None

    def _record(self, tree: DraftTree, paths: list[list[int]]) -> None:
        if self.drafter.last_generation is not self._before:  # a call has ended since: these rounds are another's
            self.rounds, self._before = [], self.drafter.last_generation
        tokens: list[list[int]] = tree.tokens.tolist()
        self.rounds.append(TracedRound(tokens, tree.parents.tolist(), [list(path) for path in paths]))

    def segments(self, output: Any, row: int = 0) -> list[Segment]:
        """The text of one row, with the rejected tokens in their places.

        A round's rejected tokens are the likeliest path that the tree went on with where the walk ended.

        Args:
            output: what ``generate()`` returned, ids ``[B, L]`` or an output object.
            row: of the batch.

        Raises:
            TuningError: if nothing was recorded.
        """
        ids: torch.Tensor = getattr(output, "sequences", output)
        own = [(number, one) for number, one in enumerate(self.rounds, start=1) if one.paths[row]]
        if not own:
            raise TuningError("No round was recorded: call generate() with this drafter inside the with block.")
        emitted = 1 + sum(len(one.paths[row]) for _, one in own)
        width = 1 + max(sum(len(one.paths[r]) for one in self.rounds) for r in range(len(own[0][1].paths)))
        start = ids.shape[1] - width  # shorter rows are filled up with padding
        text: list[int] = ids[row].tolist()
        found = [Segment(0, "prompt", tuple(text[:start])), Segment(0, "target", (text[start],))]
        at = start + 1
        for number, one in own:
            path, tokens, parents = one.paths[row], one.tokens[row], one.parents[row]
            accepted = tuple(tokens[node] for node in path[1:])
            at += len(path)
            last = text[at - 1]
            if last in (tokens[node] for node, parent in enumerate(parents) if parent == path[-1]):
                # The text ended here, with a token that was drafted.
                found.append(Segment(number, "accepted", (*accepted, last)))
                continue
            rejected = tuple(tokens[node] for node in _likeliest_below(parents, path[-1]))
            found += [Segment(number, "accepted", accepted), Segment(number, "rejected", rejected)]
            found.append(Segment(number, "target", (last,)))
        assert at == start + emitted
        return [segment for segment in found if segment.tokens]

    def text(self, tokenizer: Any, output: Any, row: int = 0, prompt: bool = False) -> Text:
        """The row as coloured text for rich."""
        whole = Text()
        for segment, words in self._shown(tokenizer, output, row, prompt):
            whole.append(words, style=_STYLES[segment.kind])
        return whole

    def show(self, tokenizer: Any, output: Any, row: int = 0, console: Console | None = None) -> None:
        """Write the row, coloured, and what the colours mean."""
        console = console or Console(highlight=False)
        console.print(self.text(tokenizer, output, row), soft_wrap=True)
        console.print(
            Text.assemble(
                "\n", ("accepted", _STYLES["accepted"]), " draft, ", ("rejected", _STYLES["rejected"]), " draft, ",
                ("the target's own", _STYLES["target"]), " token",
            )
        )  # fmt: skip

    def html(self, tokenizer: Any, output: Any, row: int = 0, prompt: bool = True) -> str:
        """The row as HTML; a hover says which round a token is of."""
        spans = [
            f'<span style="{_CSS[segment.kind]}" title="round {segment.round}, {segment.kind}">'
            f"{html.escape(words)}</span>"
            for segment, words in self._shown(tokenizer, output, row, prompt)
        ]
        return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</div>'

    def _shown(self, tokenizer: Any, output: Any, row: int, prompt: bool) -> Iterator[tuple[Segment, str]]:
        """Each segment with what it adds to the text before it: a token alone may lack its space, or be half a sign."""
        before: tuple[int, ...] = ()
        known = ""
        for segment in self.segments(output, row):
            text = tokenizer.decode(before + segment.tokens)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(known, text, strict=False)))
            words = text[same:]  # from where half a sign has become a whole one, if it has
            if prompt or segment.kind != "prompt":
                yield segment, words
            if segment.kind != "rejected":
                before, known = before + segment.tokens, text


def _likeliest_below(parents: list[int], node: int) -> list[int]:
    """The path from below ``node`` that takes the first child each time: siblings are ordered by rank."""
    path = []
    while node in parents:
        node = parents.index(node)
        path.append(node)
    return path
