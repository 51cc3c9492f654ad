"""Virtual time: one heap of events with the total order (time, lane, sequence).

A run is a function of its arguments because of that order alone: what is due at one instant happens in
the order in which it was asked for, except that `at_end_of` comes after everything else of its instant.
That is how a shell handles all that is due at a time and then decides once, as the live ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from slosched.units import NS_PER_S

#: An arbitrary date; 0 would hide mistakes with relative times.
START_NS = 1_000_000_000 * NS_PER_S

#: Sequence numbers from here on sort behind all others of their instant.
_LATE = 2**62


class Kernel:
    """The clock and the heap of one simulated world. Times are absolute ns of its true time.

    Callbacks take one argument, given when they are scheduled: a lambda for each event would cost more
    than the event.
    """

    __slots__ = ("_heap", "_seq", "_stopped", "events", "now_ns")

    def __init__(self, start_ns: int = START_NS) -> None:
        self.now_ns = start_ns
        self.events = 0  # that happened so far
        self._heap: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._seq = 0
        self._stopped = False

    def at(self, when_ns: int, do: Callable[[Any], None], arg: Any = None) -> None:
        """Call `do(arg)` at `when_ns`; a time that has passed is now."""
        self._seq = seq = self._seq + 1
        now_ns = self.now_ns
        heappush(self._heap, (when_ns if when_ns > now_ns else now_ns, seq, do, arg))

    def at_end_of(self, when_ns: int, do: Callable[[Any], None], arg: Any = None) -> None:
        """Call `do(arg)` at `when_ns`, after all else that is due at that instant."""
        self._seq = seq = self._seq + 1
        now_ns = self.now_ns
        heappush(self._heap, (when_ns if when_ns > now_ns else now_ns, _LATE + seq, do, arg))

    def next_ns(self) -> int | None:
        """When the next event is due; None: there is none."""
        return self._heap[0][0] if self._heap else None

    def stop(self) -> None:
        """End the `run_until` that is going on, after the current event."""
        self._stopped = True

    def run_until(self, until_ns: int) -> None:
        """Let virtual time pass up to and including `until_ns`, or to the event that calls `stop`."""
        heap = self._heap
        self._stopped = False
        events = 0
        try:
            while heap and heap[0][0] <= until_ns:
                self.now_ns, _, do, arg = heappop(heap)
                events += 1
                do(arg)
                if self._stopped:
                    return
        finally:
            self.events += events
        self.now_ns = until_ns
