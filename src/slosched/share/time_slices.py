"""A GPU under the driver's time slicing, in virtual time, for processes that keep it busy: graphs.

contention.py knows mean rates, from eager models that leave the GPU to others while they wait for the host. A
process that runs CUDA graphs always has work there, and then the slices themselves decide: one context runs for
`SLICE_NS`, or until it has no work, and a change of context costs `SWITCH_NS`. Two such processes get
SLICE / (2 (SLICE + SWITCH)) = 0.45 of their speed each, and a request of 2.63 ms takes two slices, so it waits
for two of each other process: 2.63 + 4 + 4 x 0.21 = 7.5 ms beside one, 11.9 ms beside two.

An H200 (driver 580) took 7.44 to 7.51 and 12.0 ms, and 238 ms where whisper takes 107 alone. SLICE_NS is the
driver's default; SWITCH_NS follows from the 7.5 ms. So nothing else of the measured mixes went into this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

SLICE_NS = 2_000_000
SWITCH_NS = 210_000


class SharedGpu(Protocol):
    """A GPU on which each job has one request at a time: that of `SliceGpu` and `RateGpu`."""

    def rates_now(self) -> dict[int, float]:
        """The rate of each job that has a request, within 0..1."""

    def advance(self, now_ns: int) -> None:
        """Let time pass until `now_ns`."""

    def begin(self, job: int, number: int, now_ns: int) -> None:
        """Request `number` of `job` starts."""

    def ended(self, job: int) -> bool:
        """True if the request of `job` has ended by now; it then leaves the GPU."""

    def remove(self, job: int) -> None:
        """The request of `job`, if there is one, leaves the GPU."""

    def end_ns(self, job: int) -> int | None:
        """When the request of `job` can have ended, at the soonest. None: it has none."""


class _Turns:
    """Who has the GPU until when, and what is left of each request in ns."""

    __slots__ = ("last", "left", "now_ns", "on", "ready_ns", "until_ns", "waiting")

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.waiting: deque[int] = deque()
        self.on: int | None = None
        self.last: int | None = None  # whose context the GPU has
        self.now_ns = self.ready_ns = self.until_ns = 0

    def copy(self) -> _Turns:
        other = _Turns()
        other.left, other.waiting = dict(self.left), deque(self.waiting)
        other.on, other.last = self.on, self.last
        other.now_ns, other.ready_ns, other.until_ns = self.now_ns, self.ready_ns, self.until_ns
        return other

    def add(self, job: int, work_ns: int) -> None:
        self.left[job] = work_ns
        if self.on is None:
            self._give(job)
            return
        if self.until_ns <= self.now_ns:  # the slice was renewed while no other wanted the GPU
            self.until_ns += -(-(self.now_ns + 1 - self.until_ns) // SLICE_NS) * SLICE_NS
        self.waiting.append(job)

    def remove(self, job: int) -> None:
        self.left.pop(job, None)
        if job in self.waiting:
            self.waiting.remove(job)
        elif self.on == job:
            self._next()

    def _give(self, job: int) -> None:
        self.on = job
        self.ready_ns = self.now_ns + (SWITCH_NS if self.last not in (None, job) else 0)
        self.until_ns = self.ready_ns + SLICE_NS
        self.last = job

    def _next(self) -> None:
        self.on = None
        if self.waiting:
            self._give(self.waiting.popleft())

    def stop_ns(self) -> int | None:
        """When what runs ends, or its slice does."""
        if self.on is None:
            return None
        end_ns = max(self.now_ns, self.ready_ns) + self.left[self.on]
        return min(end_ns, self.until_ns) if self.waiting else end_ns

    def run(self, until_ns: int) -> int | None:
        """Let the running one work until `until_ns`, at most its stop. Returns the job that ended by that."""
        job = self.on
        assert job is not None
        self.left[job] -= max(0, until_ns - max(self.now_ns, self.ready_ns))
        self.now_ns = until_ns
        if not self.left[job]:
            self._next()
            return job
        if self.waiting and until_ns >= self.until_ns:
            self.waiting.append(job)
            self._next()
        return None


class SliceGpu:
    """Requests of several jobs under time slicing; `work(job, number)` is how long one takes alone, in ns."""

    def __init__(self, jobs: Iterable[int], work: Callable[[int, int], int]) -> None:
        self._jobs, self._work = tuple(jobs), work
        self._turns = _Turns()
        self._ended: set[int] = set()
        self._first_end: int | None = None

    def rates_now(self) -> dict[int, float]:
        """The mean rate of each job that runs: equal parts of the time, less what changes cost."""
        active = [job for job in self._jobs if job in self._turns.left and job not in self._ended]
        if len(active) < 2:
            return dict.fromkeys(active, 1.0)
        return dict.fromkeys(active, SLICE_NS / (SLICE_NS + SWITCH_NS) / len(active))

    def advance(self, now_ns: int) -> None:
        turns = self._turns
        while (stop_ns := turns.stop_ns()) is not None and stop_ns <= now_ns:
            ended = turns.run(stop_ns)
            if ended is not None:
                self._ended.add(ended)
                self._first_end = None
        if turns.on is not None:
            turns.run(max(now_ns, turns.now_ns))
        turns.now_ns = max(now_ns, turns.now_ns)

    def begin(self, job: int, number: int, now_ns: int) -> None:
        self.advance(now_ns)
        self._turns.add(job, max(1, self._work(job, number)))
        self._first_end = None

    def ended(self, job: int) -> bool:
        if job not in self._ended:
            return False
        self._ended.remove(job)
        del self._turns.left[job]
        return True

    def remove(self, job: int) -> None:
        self._ended.discard(job)
        self._turns.remove(job)
        self._first_end = None

    def end_ns(self, job: int) -> int | None:
        if job in self._ended:
            return self._turns.now_ns
        if job not in self._turns.left:
            return None
        if self._first_end is None:
            ahead = self._turns.copy()
            while (stop_ns := ahead.stop_ns()) is not None:
                if ahead.run(stop_ns) is not None:
                    break
            self._first_end = ahead.now_ns
        return self._first_end
