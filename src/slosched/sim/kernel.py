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

#: Sequence numbers from here on sort behind all others of their instant, and from the second behind those.
_LATE = 2**61
_LAST = 2**62


class _Halted(Exception):
    """A `run_until` ends. Raised by an event, so that nothing has to be asked after each one."""


class Kernel:
    """The clock and the heap of one simulated world. Times are absolute ns of its true time.

    Callbacks take one argument, given when they are scheduled: a lambda for each event would cost more
    than the event.
    """

    __slots__ = ("_heap", "_run", "_seq", "now_ns")

    def __init__(self, start_ns: int = START_NS) -> None:
        self.now_ns = start_ns
        self._heap: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._seq = 0
        self._run = 0  # how often `run_until` was called: halts of earlier calls have no effect

    @property
    def events(self) -> int:
        """Events that happened so far."""
        return self._seq - len(self._heap)

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
        self._seq = seq = self._seq + 1
        heappush(self._heap, (self.now_ns, -seq, self._halt, self._run))

    def run_until(self, until_ns: int) -> None:
        """Let virtual time pass up to and including `until_ns`, or to the event that calls `stop`."""
        heap = self._heap
        pop = heappop
        self._run += 1
        self._seq = seq = self._seq + 1
        heappush(heap, (max(until_ns, self.now_ns), _LAST + seq, self._halt, self._run))
        try:
            while True:
                self.now_ns, _, do, arg = pop(heap)
                do(arg)
        except _Halted:
            return

    def _halt(self, run: int) -> None:
        if run == self._run:
            raise _Halted
