"""The requests of one job that wait for the lane: those of an open loop by its arrivals, or of a closed one.

A queue holds no backlog. The requests of a job start in the order in which they arrive, so the next one is all
that has to be known: an overloaded open loop takes no memory however long it lasts, and nothing is dropped.
What has arrived and never starts is counted when the job is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

import msgspec

from slosched.share_spec import Arriving, Clients

#: Arrivals that are counted as left over at most.
MOST_LEFT = 1_000_000
#: Failures in a row after which a job's model is taken to be broken.
MOST_FAILURES = 100


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one job asks of the lane. Times are in ns.

    `arrivals`: times after the job's start for an open loop (workloads.job_arrivals.arrivals_of); it is read
    lazily and may be endless. `slo_ns` 0: the requests have no deadline. `count` 0: until the duration is
    over; else until that number has started, if this is sooner. `expected_ns`: how long a request runs, which
    is learnt from the requests that end; `boundary_ns`: the longest time between two boundaries.
    """

    job: int
    clients: Clients = Clients()
    arrivals: Iterable[int] = ()
    priority: int = 0
    slo_ns: int = 0
    count: int = 0
    start_after_ns: int = 0
    expected_ns: int = 0
    boundary_ns: int = 0


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """A request that has arrived. `deadline_ns` 0: it has none."""

    job: int
    place: int  # of its job among those of the brain
    number: int
    arrived_ns: int
    deadline_ns: int


class JobQueue:
    """What waits of one job, and when the job is over.

    Times are absolute from `begin` on. A request starts if it arrives before the end of the duration and the
    lane has room for it before then; below `least_jobs` requests the end does not count.
    """

    def __init__(self, load: Load, place: int, least_jobs: int) -> None:
        self.load, self.place = load, place
        self.expected_ns = load.expected_ns
        self.ended = self.failed = self.out = 0
        self.reason = ""
        self.fatal = self.out_of_memory = False
        self._open = load.clients.arriving is not Arriving.CLOSED
        self._arrivals: Iterator[int] = iter(())
        self._ready: list[
            int
        ] = []  # a closed loop's: when each client that waits has its next request
        self._next: Waiting | None = None
        self._returned: list[Waiting] = []
        self._number = self._row = 0
        self._least = least_jobs
        self._at_ns = self.until_ns = 0
        self._stopped = False
        self._left: int | None = None

    def begin(self, at_ns: int, until_ns: int) -> None:
        self._at_ns, self.until_ns = at_ns + self.load.start_after_ns, until_ns
        if self._open:
            self._arrivals = iter(self.load.arrivals)
        else:
            self._ready = [self._at_ns] * self.load.clients.concurrency
        self._advance()

    def end(self, now_ns: int) -> None:
        """No more requests start."""
        self._stopped = True
        self.until_ns = min(self.until_ns, now_ns)

    # ----------------------------------------------------------------------- the next request

    def _advance(self) -> None:
        """Find the next request: that of the open loop's next arrival, or of the client that is ready first."""
        if self._next is not None:
            return
        if self._open:
            after_ns = next(self._arrivals, None)
            if after_ns is None:
                return
            arrived_ns = self._at_ns + after_ns
        elif self._ready:
            arrived_ns = heappop(self._ready)
        else:
            return
        slo_ns = self.load.slo_ns
        deadline_ns = arrived_ns + slo_ns if slo_ns else 0
        self._next = Waiting(self.load.job, self.place, self._number, arrived_ns, deadline_ns)
        self._number += 1

    def _first(self) -> Waiting | None:
        return self._returned[0] if self._returned else self._next

    def _started(self) -> int:
        return self.ended + self.failed + self.out

    def _closed(self, now_ns: int) -> bool:
        """True if no request may start any more."""
        load = self.load
        if self._stopped or (load.count and self._started() >= load.count):
            return True
        return now_ns >= self.until_ns and self._started() - self.failed >= self._least

    def late(self, now_ns: int) -> bool:
        """True if a request that the lane holds and has not begun is no longer to begin."""
        return self._stopped or (
            now_ns >= self.until_ns and self._started() - self.failed > self._least
        )

    def head(self, now_ns: int) -> Waiting | None:
        """The request that may start now."""
        first = self._first()
        if first is None or first.arrived_ns > now_ns or self._closed(now_ns):
            return None
        return first

    def next_ns(self, now_ns: int) -> int | None:
        """When something changes without an end: the next arrival, or the end of the duration."""
        if self.over(now_ns):
            return None
        times = [self.until_ns] if now_ns < self.until_ns else []
        first = self._first()
        if first is not None and first.arrived_ns > now_ns and not self._closed(now_ns):
            times.append(first.arrived_ns)
        return min(times, default=None)

    def follows_within(self, linger_ns: int) -> bool:
        """True if the client of a request that starts now has its next one within `linger_ns` of the end."""
        load = self.load
        if self._open or load.clients.think_ns > linger_ns:
            return False
        return not load.count or self._started() < load.count

    def take(self) -> Waiting:
        """The request of `head` goes to the lane."""
        self.out += 1
        if self._returned:
            return self._returned.pop(0)
        taken = self._next
        assert taken is not None
        self._next = None
        self._advance()
        return taken

    def give_back(self, waiting: Waiting) -> None:
        """The lane has not begun `waiting`: it waits again, in front of those that arrived later."""
        self.out -= 1
        self._returned.append(waiting)
        self._returned.sort(key=lambda each: each.number)

    # ----------------------------------------------------------------------- ends

    def finished(self, ended_ns: int, ran_ns: int) -> None:
        """A request ended as it should."""
        self.out -= 1
        self.ended += 1
        self._row = 0
        # A moving mean of the last eight or so: least slack needs no more than that.
        self.expected_ns += (ran_ns - self.expected_ns) // 8 if self.expected_ns else ran_ns
        self._again(ended_ns)

    def has_failed(self, ended_ns: int, reason: str, *, fatal: bool, out_of_memory: bool) -> None:
        """A request failed. The job is over where its model can run no further one, or never succeeds."""
        self.out -= 1
        self.failed += 1
        self._row += 1
        self.reason, self.fatal, self.out_of_memory = reason, fatal, out_of_memory
        if fatal or self._row >= MOST_FAILURES:
            self.fatal = True
            self.end(ended_ns)
        self._again(ended_ns)

    def _again(self, ended_ns: int) -> None:
        """The client of a closed loop thinks, and has its next request."""
        if self._open or self._stopped:
            return
        ready_ns = ended_ns + self.load.clients.think_ns
        first = self._next
        if first is not None and ready_ns < first.arrived_ns:
            # A request that came out of the heap too early changes its date with the sooner one.
            heappush(self._ready, first.arrived_ns)
            self._next, self._number = None, self._number - 1
        heappush(self._ready, ready_ns)
        self._advance()

    # ----------------------------------------------------------------------- the end

    def over(self, now_ns: int) -> bool:
        """True if no request of the job runs, and none will start."""
        if self.out:
            return False
        return self._closed(now_ns) or self._first() is None

    def left(self, now_ns: int) -> int:
        """Requests that arrived before the end and never started: all of them once the job is over.

        Before that those that are known: the next one. At most MOST_LEFT are counted.
        """
        if self._left is not None:
            return self._left
        if self.load.count and self._started() >= self.load.count:
            return 0  # what would arrive behind the last one is not a request
        until_ns = min(now_ns, self.until_ns)
        left = len(self._returned)
        if self._next is not None and self._next.arrived_ns < until_ns:
            left += 1
            if self._open and self.over(now_ns):
                for after_ns in self._arrivals:
                    if self._at_ns + after_ns >= until_ns or left >= MOST_LEFT:
                        break
                    left += 1
        left += sum(ready_ns < until_ns for ready_ns in self._ready)
        if self.over(now_ns):
            self._left = left
        return left
