"""Auto-off: notices where drafting loses time, and lets the target decode plainly for a while.

All in host time between the ends of two rounds, so no device sync is added. P is the time of a plain round, one token a
row, timed now and then; a round that drafts and emits n tokens a row loses

    seconds - n P

against plain decoding (gains, if negative). Drafting goes on while the losses so far are within an allowance, a share
of all time spent and a little to start with; then plain rounds follow until the allowance has room for a new trial. So
a hopeless drafter costs that share and no more, however bad it is, and one that has become good again is found out. A
round that took several times as long as such rounds do was held up by something else, and the first of all makes
buffers; neither is held against the drafter. The
books go on from call to call (a drafter has a switch for each target, batch size and tree): a first short text may lose
a few rounds, a hundred of them lose no larger share than one long one.

The text does not depend on it beyond what it depends on any tree: in float32 it is plain decoding's; in half precision
a tie of rounding size may fall otherwise in another tree, so where the times decide, two runs may differ there.

``tests/runtime/test_speculation_switch.py`` holds the bound by simulation.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque

_SHARE = 0.015
# In plain rounds: what may be lost before anything was earned, what a new trial must have room for, and the most that
# earlier gains may pay for later losses.
_START = 1.0
_TRIAL = 2.0
_SAVED = 4.0
# In medians of rounds of its kind: a longer one is booked as this.
_HELD_UP = 3.0
# Plain rounds are timed at these rounds (the very first is not: buffers are made then), and every so many after.
_FIRST_PROBES = (2, 5, 9, 14)
_PROBE_EVERY = 40


class SpeculationSwitch:
    """Says before each round whether to draft; calls in several threads may share one.

    Args:
        enabled: if not, always yes, at no cost.

    Attributes:
        drafts: whether a call's first round is to draft.
    """

    def __init__(self, enabled: bool) -> None:
        self.drafts = True
        self._enabled = enabled
        self._lock = threading.Lock()
        self._resting = False
        self._plain: deque[float] = deque(maxlen=5)
        self._drafted: deque[float] = deque(maxlen=9)
        self._unrated: list[tuple[float, float]] = []  # rounds that drafted, until a plain one was timed
        self._lost = 0.0
        self._spent = 0.0
        self._rounds = 0
        self._next_probe = _FIRST_PROBES[0]

    def record(self, tokens: float, seconds: float, drafted: bool) -> bool:
        """Book a round; says whether the next is to draft.

        Args:
            tokens: emitted a row that had not ended.
            seconds: from the end of the call's round before, or its prefill's.
            drafted: whether the round did.
        """
        if not self._enabled:
            return True
        with self._lock:
            self._book(tokens, seconds, drafted)
            self.drafts = self._decide()
            return self.drafts

    def _book(self, tokens: float, seconds: float, drafted: bool) -> None:
        self._rounds += 1
        if self._rounds > 1:
            kind = self._drafted if drafted else self._plain
            kind.append(seconds)
            seconds = min(seconds, _HELD_UP * statistics.median(kind))
            self._spent += seconds
            if drafted:
                self._unrated.append((seconds, tokens))
        if self._plain:
            plain = statistics.median(self._plain)
            for taken, emitted in self._unrated:
                self._lost = max(self._lost + taken - emitted * plain, -_SAVED * plain)
            self._unrated = []

    def _decide(self) -> bool:
        if self._plain:
            plain = statistics.median(self._plain)
            room = _SHARE * self._spent + _START * plain - self._lost
            self._resting = room < (_TRIAL * plain if self._resting else 0)
        if self._resting:
            return False
        if self._rounds + 1 < self._next_probe:
            return True
        self._next_probe = next((at for at in _FIRST_PROBES if at > self._rounds + 1), self._rounds + _PROBE_EVERY)
        return False
