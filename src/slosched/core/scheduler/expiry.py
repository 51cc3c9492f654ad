"""Which queued request runs out of time first: a heap that forgets those that left the queue.

An entry is skipped when it surfaces and its request is no longer queued. With long deadlines entries
would not surface for hours, so the heap is rebuilt whenever most of it is dead: amortised, that costs
less than one comparison per request.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from slosched.core.scheduler.slices import ANSWER, Slices
from slosched.core.scheduler.state import Request, RequestState

_REBUILD_FROM = 4096
#: With more dead entries in a row most are dead: to look at each once is cheaper than to take it off.
_DEAD_AT_ONCE = 64


class ExpiryHeap:
    """Requests by the time at which each becomes hopeless (ns)."""

    __slots__ = ("_rebuild_at", "entries")

    def __init__(self) -> None:
        #: (time, key, request), a heap; some have left the queue. For a first look.
        self.entries: list[tuple[int, int, Request]] = []
        self._rebuild_at = _REBUILD_FROM

    def __len__(self) -> int:
        return len(self.entries)

    def push(self, when_ns: int, request: Request) -> None:
        heappush(self.entries, (when_ns, request.key, request))
        if len(self.entries) >= self._rebuild_at:
            self._rebuild()

    def _rebuild(self) -> None:
        self.entries = [e for e in self.entries if e[2].state is RequestState.QUEUED]
        heapify(self.entries)
        self._rebuild_at = max(_REBUILD_FROM, 2 * len(self.entries))

    def next_ns(self) -> int | None:
        """When the first request that is still queued runs out of time."""
        entries, dead = self.entries, 0
        while entries and entries[0][2].state is not RequestState.QUEUED:
            if dead == _DEAD_AT_ONCE:
                self._rebuild()
                entries = self.entries
                break
            heappop(entries)
            dead += 1
        return entries[0][0] if entries else None

    def pop_some(self, limit_ns: int, slices: Slices) -> Iterator[Request]:
        """Take out queued requests whose time is before `limit_ns`: as many as this step may answer."""
        while (due_ns := self.next_ns()) is not None and due_ns < limit_ns and slices.spend(ANSWER):
            yield heappop(self.entries)[2]

    def pop_before(self, limit_ns: int) -> Request | None:
        """Take out the first queued request whose time is before `limit_ns`."""
        entries = self.entries
        while entries and entries[0][0] < limit_ns:
            request = heappop(entries)[2]
            if request.state is RequestState.QUEUED:
                return request
            self.next_ns()  # takes off what is dead behind it
            entries = self.entries
        return None
