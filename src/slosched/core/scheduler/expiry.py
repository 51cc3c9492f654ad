"""Which queued request runs out of time first: a heap that skips requests that left the queue.

An entry is skipped when it surfaces and its request is no longer queued. With long deadlines entries
would not surface for hours, so the heap is rebuilt whenever most of it is dead: amortised, that costs
less than one comparison per request.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from slosched.core.scheduler.slices import ANSWER, Slices
from slosched.core.scheduler.state import Request, RequestState

_REBUILD_FROM = 4096
#: Entries that each `push` moves while the heap is rebuilt, and each look at it.
_MOVED, _MOVED_AT_A_LOOK = 4, 1_000
#: With more dead entries in a row most are dead: the heap is rebuilt.
_DEAD_AT_ONCE = 64

_Entry = tuple[int, int, Request]


class ExpiryHeap:
    """Requests by the time at which each becomes hopeless (ns).

    A rebuild moves the old heap's last leaves to a new one, some at a time: at once it would take
    milliseconds. Until it is done the first entry is that of one of the two.
    """

    __slots__ = ("_new", "_old", "_rebuild_at")

    def __init__(self) -> None:
        #: Heaps of (time, key, request); some have left the queue.
        self._new: list[_Entry] = []
        self._old: list[_Entry] = []
        self._rebuild_at = _REBUILD_FROM

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def push(self, when_ns: int, request: Request) -> None:
        heappush(self._new, (when_ns, request.key, request))
        if self._old:
            self._move(_MOVED)
        elif len(self._new) >= self._rebuild_at:
            self._old, self._new = self._new, self._old

    def _move(self, count: int) -> None:
        new, old = self._new, self._old
        for _ in range(min(count, len(old))):
            entry = old.pop()  # a leaf: what stays is a heap
            if entry[2].state is RequestState.QUEUED:
                heappush(new, entry)
        if not old:
            self._rebuild_at = max(_REBUILD_FROM, 2 * len(new))

    def first_ns(self) -> int | None:
        """The time of the first entry, even if its request has left the queue: a cheap lower bound."""
        heap = self._first()
        return heap[0][0] if heap else None

    def _first(self) -> list[_Entry]:
        """The heap whose first entry is the first of all; empty if both are."""
        new, old = self._new, self._old
        return old if old and (not new or old[0] < new[0]) else new

    def next_ns(self) -> int | None:
        """When the first request that is still queued runs out of time; or an earlier time while many
        entries of requests that left the queue are being cleared away.
        """
        heap, dead = self._first(), 0
        while heap and heap[0][2].state is not RequestState.QUEUED:
            if dead == _DEAD_AT_ONCE:
                self._clear()
                heap = self._first()
                break
            heappop(heap)
            dead += 1
            heap = self._first()
        return heap[0][0] if heap else None

    def _clear(self) -> None:
        """Go on with a rebuild, or begin one."""
        if not self._old:
            self._old, self._new = self._new, self._old
        self._move(_MOVED_AT_A_LOOK)

    def pop_some(self, limit_ns: int, slices: Slices) -> Iterator[Request]:
        """Take out queued requests whose time is before `limit_ns`, as many as this step may answer."""
        while (due_ns := self.next_ns()) is not None and due_ns < limit_ns:
            heap = self._first()
            if heap[0][2].state is not RequestState.QUEUED or not slices.spend(ANSWER):
                return
            yield heappop(heap)[2]

    def pop_before(self, limit_ns: int) -> Request | None:
        """Take out the first queued request whose time is before `limit_ns`."""
        while (due_ns := self.next_ns()) is not None and due_ns < limit_ns:
            request = heappop(self._first())[2]
            if request.state is RequestState.QUEUED:
                return request
        return None
