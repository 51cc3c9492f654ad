"""Clockwork's executor tracker and estimator (OSDI'20 §5.3; reference code, `Executor` and
`SlidingWindow`), with the published constants."""

from __future__ import annotations

from collections import deque

from slosched.units import NS_PER_MS

DEFAULT_CLOCK_MHZ = 1380
FUTURE_NS = 1 * NS_PER_MS  # no start is predicted sooner than this
LAG_NS = 10 * NS_PER_MS  # after which a stuck head is presumed finished
_WINDOW = 10
_PERCENTILE = 0.99


class PaperEstimator:
    """p99, interpolated, of the last ten durations x clock. The first sample replaces the seed."""

    __slots__ = ("_at_mhz", "_estimate_ns", "_samples", "_work")

    def __init__(self, seed_ns: int) -> None:
        self._samples: deque[int] = deque(maxlen=_WINDOW)
        self._work = float(seed_ns * DEFAULT_CLOCK_MHZ)
        self._at_mhz = DEFAULT_CLOCK_MHZ  # the clock that was asked for last, and its answer
        self._estimate_ns = round(self._work / DEFAULT_CLOCK_MHZ)

    def add(self, duration_ns: int, clock_mhz: int = DEFAULT_CLOCK_MHZ) -> None:
        self._samples.append(duration_ns * clock_mhz)
        ordered = sorted(self._samples)
        position = _PERCENTILE * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        self._work = ordered[low] + (position - low) * (ordered[high] - ordered[low])
        self._estimate_ns = round(self._work / self._at_mhz)

    def estimate_ns(self, clock_mhz: int = DEFAULT_CLOCK_MHZ) -> int:
        if clock_mhz != self._at_mhz:
            self._at_mhz = clock_mhz
            self._estimate_ns = round(self._work / clock_mhz)
        return self._estimate_ns


class ExecutorTracker:
    """Predicts when an executor will be free, from what was sent and what was reported.

    Sizes are kept as duration x clock, so that a change of the clock rescales all that is waiting.
    """

    __slots__ = ("_begin_ns", "_clock_mhz", "_queue", "_total")

    def __init__(self) -> None:
        self._queue: deque[tuple[int, int]] = deque()  # (action id, ns x MHz)
        self._total = 0  # ns x MHz
        self._begin_ns = 0
        self._clock_mhz = DEFAULT_CLOCK_MHZ

    def set_clock(self, clock_mhz: int) -> None:
        """The executor runs at `clock_mhz` from now on; 0 (unknown) is taken for the default."""
        self._clock_mhz = clock_mhz or DEFAULT_CLOCK_MHZ

    def _head_ns(self) -> int:
        return self._queue[0][1] // self._clock_mhz

    def _effective_begin_ns(self, now_ns: int) -> int:
        if self._queue and self._begin_ns + self._head_ns() + LAG_NS < now_ns:
            return now_ns - LAG_NS - self._head_ns()
        return self._begin_ns

    def available_ns(self, now_ns: int) -> int:
        waiting_ns = self._total // self._clock_mhz
        return max(self._effective_begin_ns(now_ns) + waiting_ns, now_ns + FUTURE_NS)

    def opens_ns(self, ahead_ns: int) -> int:
        """When `available_ns(now) < now + ahead_ns` becomes true by the passing of time alone."""
        opens_ns = self._begin_ns + self._total // self._clock_mhz - ahead_ns
        if self._queue:
            opens_ns = min(opens_ns, self._begin_ns + self._head_ns() + LAG_NS)
        return opens_ns + 1

    def add(self, action_id: int, duration_ns: int, now_ns: int) -> None:
        """An action was sent that takes `duration_ns` at the present clock."""
        if not self._queue:
            self._begin_ns = now_ns
        size = duration_ns * self._clock_mhz
        self._queue.append((action_id, size))
        self._total += size

    def done(self, action_id: int, end_ns: int, *, ok: bool) -> None:
        """The action ended at `end_ns` (reported), or failed at `end_ns` (now)."""
        position = next(
            (i for i, (queued, _) in enumerate(self._queue) if queued == action_id), None
        )
        if position is None:
            return
        size = self._queue[position][1]
        del self._queue[position]
        self._total -= size
        if position == 0:
            self._begin_ns = end_ns
        elif ok:
            self._begin_ns += size // self._clock_mhz
