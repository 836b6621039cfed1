"""What one generation did: rounds, acceptance, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass
class GenerationStatistics:
    """Counts and times of one call of ``generate()``; ``drafter.last_generation`` holds the last call's.

    Times are host times in seconds. On an accelerator work is queued, so a phase's time is that of its launches and
    waits; on a CPU it is the work itself.

    Attributes:
        rows: rows of the batch.
        rounds: verification forwards of the target; the prefill is not one.
        row_rounds: rounds counted once a row that had not ended; the same as ``rounds`` for one row.
        plain_rounds: rounds without drafts because drafting was losing, or to time them (``auto_off``).
        drafted: nodes verified, roots not counted.
        accepted: drafted tokens that were emitted.
        new_tokens: tokens emitted, the prefill's first included.
        prefill_seconds, draft_seconds, verify_seconds, walk_seconds, cache_seconds: phases; the walk includes
            processors, the choice of tokens, stopping criteria and the streamer.
        total_seconds: the whole decoding, prefill included.
        accepted_by_round: for each row, the accepted drafts of each of its rounds; not in [`as_dict`].
    """

    rows: int = 1
    rounds: int = 0
    row_rounds: int = 0
    plain_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    walk_seconds: float = 0.0
    cache_seconds: float = 0.0
    total_seconds: float = 0.0
    accepted_by_round: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted_by_round = self.accepted_by_round or [[] for _ in range(self.rows)]

    @property
    def tau(self) -> float:
        """Acceptance length tau of the paper: accepted drafts per round and row."""
        return self.accepted / self.row_rounds if self.row_rounds else 0.0

    @property
    def tau_with_bonus(self) -> float:
        """Tokens per round and row, the target's own included (Spec-Bench's figure): 1 for plain decoding."""
        return (self.new_tokens - self.rows) / self.row_rounds if self.row_rounds else 0.0

    @property
    def alpha(self) -> float:
        """Acceptance rate alpha of the paper: accepted drafts over all new tokens."""
        return self.accepted / self.new_tokens if self.new_tokens else 0.0

    @property
    def other_seconds(self) -> float:
        """Everything but prefill, draft and verify: walk, cache and rest."""
        return self.total_seconds - self.prefill_seconds - self.draft_seconds - self.verify_seconds

    def count(self, paths: list[list[int]], tree_size: int, drafted: bool = True) -> None:
        """Count one round from the visited nodes of each row (none for a row that had ended)."""
        walked = [path for path in paths if path]
        self.rounds += 1
        self.plain_rounds += not drafted
        self.row_rounds += len(walked)
        self.drafted += (tree_size - 1) * len(walked)
        self.accepted += sum(len(path) - 1 for path in walked)
        for lengths, path in zip(self.accepted_by_round, paths, strict=True):
            if path:
                lengths.append(len(path) - 1)

    def as_dict(self) -> dict[str, float]:
        """All counts, times and derived figures, ready for JSON."""
        derived = ("tau", "tau_with_bonus", "alpha", "other_seconds")
        fields = asdict(self) | {name: getattr(self, name) for name in derived}
        del fields["accepted_by_round"]
        return fields

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the ``with`` body to ``<phase>_seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            name = f"{phase}_seconds"
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)
