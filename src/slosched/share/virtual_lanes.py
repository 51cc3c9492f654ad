"""Lanes in virtual time: what a GPU does with the requests of several jobs, without one.

`RateGpu` is a GPU on which jobs run beside one another, each at the rate that contention.py gives it (tm,
mps, streams, and one job alone); that of graphs in tm is in time_slices.py. `BoundaryLane` is one on which one
request runs at a time and is interrupted at its boundaries, in the order of core/worker/lane_order.py, which
the live lanes use too (preempt; with `Port`s also the gate across processes). Times are exact: a shell that
steps to each `next_event_ns` sees every end at its instant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from slosched.core.share.interface import Ended, Start, Withdraw
from slosched.core.worker.lane_order import ArmedWork, LingeringOrder
from slosched.core.worker.lanes import PREEMPTIVE_EXEC_LANE
from slosched.share.contention import Party, rates
from slosched.share.time_slices import SharedGpu
from slosched.share_spec import MOST_SEGMENTS, Interruption, Mode

#: How long request `number` of `job` takes alone, in ns.
Work = Callable[[int, int], int]

#: The last of equal segments ends this much before the request at most, since lengths are whole ns.
_ROUNDING_NS = 1_000
#: What is left of a request that has ended but for rounding, in ns.
_NOTHING_NS = 0.5


class Spacing(NamedTuple):
    """Where a request can be interrupted: after `first_ns` (0: `every_ns`), and then after each `every_ns`.

    `every_ns` 0: nowhere. Each boundary costs `cost_ns` more. There is none in the last `last_ns`.
    """

    every_ns: int
    cost_ns: int = 0
    first_ns: int = 0
    last_ns: int = 0

    @property
    def longest_ns(self) -> int:
        return max(self.every_ns, self.first_ns, self.last_ns)

    def segments_ns(self, exec_ns: int) -> list[int]:
        """The times between the boundaries of a request that takes `exec_ns`; empty: it has none.

        Where there are more than MOST_SEGMENTS, equal ones are left out.
        """
        first_ns = self.first_ns or self.every_ns
        bounds = range(first_ns, exec_ns - max(self.last_ns, _ROUNDING_NS), self.every_ns or 1)
        if not self.every_ns or not bounds:
            return []
        equal = min(len(bounds) - 1, MOST_SEGMENTS)
        return [first_ns, *[self.every_ns] * equal, exec_ns - bounds[-1]]


class RateGpu:
    """Requests of several jobs run at once, one of each; a job's rate depends on who else runs."""

    def __init__(
        self, parties: Mapping[int, Party], mode: Mode, work: Work, *, cores: int = 0
    ) -> None:
        self._parties, self._mode, self._work, self._cores = parties, mode, work, cores
        self._left: dict[int, float] = {}
        self._cache: dict[tuple[int, ...], dict[int, float]] = {}
        self._now_ns = 0

    def _rates(self) -> dict[int, float]:
        active = tuple(sorted(self._left))
        known = self._cache.get(active)
        if known is None:
            parties = [self._parties[job] for job in active]
            found = rates(parties, self._mode, cores=self._cores) if active else ()
            known = self._cache[active] = dict(zip(active, found, strict=True))
        return known

    def rates_now(self) -> dict[int, float]:
        """The rate of each job that runs."""
        return self._rates()

    def advance(self, now_ns: int) -> None:
        """Let the requests run until `now_ns`."""
        if now_ns > self._now_ns:
            passed = now_ns - self._now_ns
            for job, rate in self._rates().items():
                self._left[job] -= rate * passed
            self._now_ns = now_ns

    def begin(self, job: int, number: int, now_ns: int) -> None:
        self.advance(now_ns)
        self._left[job] = float(self._work(job, number))

    def ended(self, job: int) -> bool:
        """True if the request of `job` has ended by now; it then leaves the GPU."""
        if self._left.get(job, 1.0) > _NOTHING_NS:
            return False
        del self._left[job]
        return True

    def remove(self, job: int) -> None:
        self._left.pop(job, None)

    def end_ns(self, job: int) -> int | None:
        """When the request of `job` ends, if nothing changes."""
        left = self._left.get(job)
        if left is None:
            return None
        return self._now_ns + max(0, ceil((left - _NOTHING_NS) / self._rates()[job]))


class RateLane:
    """The lane of one job on a GPU that it shares: a process of its own, or a stream. Not preemptive."""

    preemptive = False

    def __init__(self, gpu: SharedGpu, job: int, *, takes: int = 1) -> None:
        self._gpu, self._job = gpu, job
        self.takes = takes
        self._held: list[Start] = []
        self._started_ns = 0
        self._failed: list[Ended] = []
        self._dead: tuple[str, bool] | None = None

    def start(self, start: Start, *, now_ns: int) -> None:
        if self._dead is not None:
            self._failed.append(_failure(start, now_ns, now_ns, *self._dead))
            return
        self._held.append(start)
        if len(self._held) == 1:
            self._run(now_ns)

    def _run(self, now_ns: int) -> None:
        self._started_ns = now_ns
        self._gpu.begin(self._job, self._held[0].number, now_ns)

    def withdraw(self, withdraw: Withdraw) -> bool:
        for start in self._held[1:]:
            if start.number == withdraw.number and start.job == withdraw.job:
                self._held.remove(start)
                return True
        return False

    def poll(self, *, now_ns: int) -> Sequence[Ended]:
        self._gpu.advance(now_ns)
        ends, self._failed = self._failed, []
        if self._held and self._gpu.ended(self._job):
            start = self._held.pop(0)
            ends.append(
                Ended(
                    job=start.job,
                    number=start.number,
                    started_ns=self._started_ns,
                    ended_ns=now_ns,
                )
            )
            if self._held:
                self._run(now_ns)
        return ends

    def next_event_ns(self) -> int | None:
        return 0 if self._failed else self._gpu.end_ns(self._job)

    def pass_time(self, until_ns: int | None) -> bool:
        return True

    def kill(self, reason: str, now_ns: int, *, out_of_memory: bool = False) -> None:
        """The job's process ends: what it holds fails, and so does all that comes."""
        self._gpu.advance(now_ns)
        self._gpu.remove(self._job)
        self._dead = (reason, out_of_memory)
        held, self._held = self._held, []
        for start in held:
            self._failed.append(_failure(start, self._started_ns, now_ns, reason, out_of_memory))


def _failure(start: Start, started_ns: int, at_ns: int, reason: str, out_of_memory: bool) -> Ended:
    return Ended(
        job=start.job,
        number=start.number,
        started_ns=started_ns,
        ended_ns=at_ns,
        reason=reason,
        fatal=True,
        out_of_memory=out_of_memory,
    )


# --------------------------------------------------------------------------------- boundaries


@dataclass(slots=True, eq=False)
class _Work(ArmedWork):
    start: Start
    left_ns: int
    spacing: Spacing
    armed_ns: int = 0
    begun_ns: int = -1
    since_ns: int = 0  # when it last went on
    wanted_ns: int = 0  # when the first one came that goes first at the next boundary
    stopped_ns: int = -1  # since when it is interrupted; -1: it is not
    by: int = -1
    ran_ns: int = 0
    paused_ns: int = 0
    pauses: list[Interruption] = field(default_factory=list)

    def passed(self, ran_ns: int) -> int:
        """The number of boundaries that it has behind it after `ran_ns`."""
        first_ns = self.spacing.first_ns or self.spacing.every_ns
        return 0 if ran_ns < first_ns else 1 + (ran_ns - first_ns) // self.spacing.every_ns

    def next_boundary(self, ran_ns: int) -> int:
        """How long it will have run at its next boundary: behind the segment that it has begun."""
        first_ns = self.spacing.first_ns or self.spacing.every_ns
        return first_ns + self.passed(ran_ns) * self.spacing.every_ns


class BoundaryLane:
    """One request runs at a time; due work of a higher priority goes first at its boundaries.

    `boundaries` is by job: a request of n boundaries takes n times their cost longer than alone, as segments
    do. What has begun a segment, also by being resumed, is interrupted behind it. `latency_ns` passes between
    the stop of one request and the first work of the one that interrupts it: of the gate, which two processes
    pass through shared memory. An end is known `notice_ns` later, while the lane already goes on.
    """

    preemptive = True

    def __init__(
        self,
        work: Work,
        boundaries: Mapping[int, Spacing],
        *,
        latency_ns: int = 0,
        notice_ns: int = 0,
    ) -> None:
        self._work, self._boundaries, self._latency_ns = work, boundaries, latency_ns
        self._notice_ns = notice_ns
        self._order: LingeringOrder[_Work] = LingeringOrder(PREEMPTIVE_EXEC_LANE)
        self._stop_ns: int | None = None  # the next boundary that matters, or the end
        self._ends: list[Ended] = []
        self._dead: dict[int, tuple[str, bool]] = {}

    @property
    def takes(self) -> int:
        return len(self._boundaries) + 2

    @property
    def runs(self) -> int | None:
        """The job whose request runs."""
        return self._order.running[0].start.job if self._order.running else None

    def start(self, start: Start, *, now_ns: int) -> None:
        self._pass(now_ns)
        if start.job in self._dead:
            self._ends.append(_failure(start, now_ns, now_ns, *self._dead[start.job]))
            return
        every_ns, cost_ns, first_ns, last_ns = self._boundaries[start.job]
        alone_ns = self._work(start.job, start.number)
        left_ns = alone_ns + (alone_ns // every_ns * cost_ns if every_ns else 0)
        spacing = Spacing(every_ns + cost_ns, 0, first_ns, last_ns) if every_ns else Spacing(0)
        work = _Work(start, left_ns, spacing, now_ns)
        work.linger_ns, work.patient = start.linger_ns, start.patient
        self._order.arm(work, start_ns=start.due_ns, now_ns=now_ns, priority=start.priority)
        if self._order.first(now_ns) is work:
            self._run(work, now_ns)
        else:
            self._look(now_ns)

    def _look(self, now_ns: int) -> None:
        """Have what runs stop at its next boundary, if armed work goes first."""
        if not self._order.running:
            return
        runs = self._order.running[0]
        rival = self._order.rival(runs, now_ns)
        if rival is None or not runs.spacing.every_ns:
            return
        end_ns = runs.since_ns + runs.left_ns
        if self._stop_ns is not None and now_ns <= self._stop_ns < end_ns:
            return  # it stops already
        ran_ns = runs.ran_ns + now_ns - runs.since_ns
        boundary_ns = now_ns + runs.next_boundary(ran_ns) - ran_ns
        if boundary_ns < end_ns and boundary_ns <= end_ns - runs.spacing.last_ns:
            runs.wanted_ns, runs.by = rival.armed_ns, rival.start.job
            self._stop_ns = boundary_ns

    def _run(self, work: _Work, now_ns: int) -> None:
        order = self._order
        others = bool(order.armed) and any(each.stopped_ns >= 0 for each in order.armed)
        order.begin(work)
        if work.begun_ns < 0:
            work.begun_ns = now_ns
            if others:
                work.left_ns += self._latency_ns
        elif work.stopped_ns >= 0:
            work.paused_ns += now_ns - work.stopped_ns
            work.pauses.append(
                Interruption(
                    job=work.start.job,
                    by=work.by,
                    wanted_ns=work.wanted_ns,
                    started_ns=work.stopped_ns,
                    resumed_ns=now_ns,
                    boundary=work.passed(work.ran_ns),
                )
            )
            work.stopped_ns = -1
        work.since_ns = now_ns
        self._stop_ns = now_ns + work.left_ns
        self._look(now_ns)

    def _pass(self, now_ns: int) -> None:
        """Handle each boundary and end up to `now_ns`."""
        while (stop_ns := self._next_ns()) is not None and stop_ns <= now_ns:
            if not self._order.running:  # it has lingered for long enough
                first = self._order.first(stop_ns)
                assert first is not None
                self._run(first, stop_ns)
                continue
            assert self._stop_ns is not None
            at_ns, runs = self._stop_ns, self._order.running[0]
            ran_ns = at_ns - runs.since_ns
            self._stop_ns = None
            if ran_ns >= runs.left_ns:
                self._ends.append(self._end_of(runs, at_ns))
                following = self._order.end(runs, at_ns)
                if following is not None:
                    self._run(following, at_ns)
                continue
            runs.left_ns -= ran_ns
            runs.ran_ns += ran_ns
            runs.since_ns = at_ns
            if self._order.boundary(runs, at_ns):  # the other one was withdrawn
                self._stop_ns = at_ns + runs.left_ns
                continue
            runs.stopped_ns = at_ns
            first = self._order.first(at_ns)
            assert first is not None
            runs.by = first.start.job
            self._run(first, at_ns)

    def _next_ns(self) -> int | None:
        """When something runs no longer, or waits no longer."""
        if self._order.running or not self._order.armed:
            return self._stop_ns
        return self._order.lingers_until_ns or None

    def _end_of(self, work: _Work, at_ns: int) -> Ended:
        return Ended(
            job=work.start.job,
            number=work.start.number,
            started_ns=work.begun_ns,
            ended_ns=at_ns,
            device_ns=at_ns - work.begun_ns - work.paused_ns,
            paused_ns=work.paused_ns,
            pauses=tuple(work.pauses),
        )

    def withdraw(self, withdraw: Withdraw) -> bool:
        for work in self._order.armed:
            if (work.start.job, work.start.number) == (withdraw.job, withdraw.number):
                if work.begun_ns >= 0:
                    return False
                self._order.disarm(work)
                return True
        return False

    def poll(self, *, now_ns: int) -> Sequence[Ended]:
        self._pass(now_ns)
        known_ns = now_ns - self._notice_ns
        ends = [each for each in self._ends if each.ended_ns <= known_ns]
        self._ends = [each for each in self._ends if each.ended_ns > known_ns]
        return ends

    def next_event_ns(self) -> int | None:
        next_ns = self._next_ns()
        if not self._ends:
            return next_ns
        known_ns = min(each.ended_ns for each in self._ends) + self._notice_ns
        return known_ns if next_ns is None else min(known_ns, next_ns)

    def pass_time(self, until_ns: int | None) -> bool:
        return True

    def kill(self, job: int, reason: str, now_ns: int, *, out_of_memory: bool = False) -> None:
        """The model of `job` can run no more: what the lane holds of it fails, and so does all that comes."""
        self._pass(now_ns)
        self._dead[job] = (reason, out_of_memory)
        order = self._order
        for work in [each for each in (*order.running, *order.armed) if each.start.job == job]:
            begun_ns = work.begun_ns if work.begun_ns >= 0 else now_ns
            self._ends.append(_failure(work.start, begun_ns, now_ns, reason, out_of_memory))
            if work in order.armed:
                order.disarm(work)
                continue
            self._stop_ns = None
            following = order.end(work, now_ns)
            # What follows may be of the same job; it fails in this loop, so another may start then.
            if following is not None and following.start.job != job:
                self._run(following, now_ns)
        first = order.first(now_ns)
        if first is not None:
            self._run(first, now_ns)


class Port:
    """One process's side of a gate: a lane of one job over a `BoundaryLane` that all share.

    The gate knows the jobs' own priorities; a process runs one request at a time.
    """

    preemptive = False
    takes = 1

    def __init__(
        self, lane: BoundaryLane, job: int, priority: int, arrived: dict[int, list[Ended]]
    ) -> None:
        self._lane, self._job, self._priority, self._arrived = lane, job, priority, arrived

    def start(self, start: Start, *, now_ns: int) -> None:
        self._lane.start(
            Start(start.job, start.number, self._priority, start.due_ns), now_ns=now_ns
        )

    def withdraw(self, withdraw: Withdraw) -> bool:
        return self._lane.withdraw(withdraw)

    def poll(self, *, now_ns: int) -> Sequence[Ended]:
        for ended in self._lane.poll(now_ns=now_ns):
            self._arrived.setdefault(ended.job, []).append(ended)
        return self._arrived.pop(self._job, ())

    def next_event_ns(self) -> int | None:
        return 0 if self._job in self._arrived else self._lane.next_event_ns()

    def pass_time(self, until_ns: int | None) -> bool:
        return True
