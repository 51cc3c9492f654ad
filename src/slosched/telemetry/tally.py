"""What the controller counts of every request and action: plain integers, and nothing that grows with them.

Everything that shows numbers reads this: /metrics, `slosched status --watch`, the console's lines. The
readers derive, name and format.

Counters only ever grow while the process lives, whatever becomes of workers, clients and models.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from typing import Any

from slosched.codes import ActionType
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.telemetry.call_tally import CallTally
from slosched.telemetry.cascade_tally import CascadeTally
from slosched.telemetry.histogram import Histogram
from slosched.units import NS_PER_MS, NS_PER_S

_INFER = int(ActionType.INFER)

#: Durations are also counted as if the GPU had run at this clock throughout (MHz; INFER5's default).
NORM_CLOCK_MHZ = 1380

#: Upper bounds of the latency histogram's buckets: the usual SLOs are among them.
LATENCY_BOUNDS_NS: tuple[int, ...] = tuple(
    int(ms * NS_PER_MS)
    for ms in (
        0.1,
        0.25,
        0.5,
        0.75,
        1,
        1.5,
        2,
        2.5,
        3,
        4,
        5,
        6,
        7.5,
        10,
        12.5,
        15,
        20,
        25,
        30,
        40,
        50,
        60,
        75,
        100,
        125,
        150,
        200,
        250,
        300,
        400,
        500,
        750,
        1000,
        1500,
        2500,
        5000,
        10000,
    )
)

_ERRORS_MS = (0.001, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
#: The same of the errors of predictions, which have a sign: actual less predicted.
ERROR_BOUNDS_NS: tuple[int, ...] = tuple(
    int(ms * NS_PER_MS) for ms in (*(-ms for ms in reversed(_ERRORS_MS)), 0, *_ERRORS_MS)
)

#: Requests of a batch.
BATCH_BOUNDS: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Lane:
    """Actions of one kind on one GPU that ended with code 0. Times in ns, clocks in MHz.

    The totals are since the controller started; the extremes since `forget_extremes`.
    """

    __slots__ = (
        "clock_greatest",
        "clock_least",
        "clocked",
        "count",
        "e2e_greatest",
        "e2e_ns",
        "exec_ns",
        "greatest",
        "least",
        "norm_greatest",
        "norm_ns",
        "requests",
    )

    def __init__(self) -> None:
        self.count = self.requests = self.exec_ns = self.e2e_ns = 0
        #: At the reference clock. Kept apart only once an action reported a clock.
        self.clocked = False
        self.norm_ns: float = 0
        self.forget_extremes()

    def forget_extremes(self) -> None:
        self.least: float = math.inf
        self.greatest = self.e2e_greatest = -1
        self.norm_greatest: float = -1
        self.clock_least: float = math.inf
        self.clock_greatest = 0

    def add_clocks(self, exec_ns: int, before_mhz: int, after_mhz: int) -> None:
        """Count an exec as if at the reference clock, before it is counted; 0 MHz: not known."""
        if not self.clocked:
            # Earlier actions reported no clock, and count unscaled.
            self.clocked = True
            self.norm_ns, self.norm_greatest = self.exec_ns, self.greatest
        seen = [mhz for mhz in (before_mhz, after_mhz) if mhz > 0]
        norm_ns = exec_ns * (sum(seen) / len(seen) / NORM_CLOCK_MHZ if seen else 1.0)
        self.norm_ns += norm_ns
        self.norm_greatest = max(self.norm_greatest, norm_ns)
        if seen:
            self.clock_least = min(self.clock_least, *seen)
            self.clock_greatest = max(self.clock_greatest, *seen)


class Tally:
    """Fed with every record that the scheduler gives out."""

    __slots__ = (
        "batch_sizes",
        "calls",
        "cascades",
        "completion_errors",
        "exec_errors",
        "failures",
        "greatest_ns",
        "in_time",
        "lanes",
        "least_ns",
        "models",
        "refused_at_arrival",
        "served",
        "unserved",
    )

    def __init__(self) -> None:
        self.in_time = 0
        #: Answered in the very step in which they arrived, and not with code 0: never admitted.
        self.refused_at_arrival = 0
        #: Latencies from arrival: of answers with code 0, and of all others.
        self.served = Histogram(LATENCY_BOUNDS_NS)
        self.unserved = Histogram(LATENCY_BOUNDS_NS)
        #: Extremes of `served` since `forget_extremes`.
        self.least_ns: float = math.inf
        self.greatest_ns = -1
        #: By model id: requests answered, and of these in time.
        self.models: dict[int, list[int]] = {}
        #: By (worker, GPU, kind of action).
        self.lanes: dict[tuple[int, int, int], Lane] = {}
        #: Actions that ended with another code than 0, by (kind, code).
        self.failures: dict[tuple[int, int], int] = {}
        #: Inferences that ended with code 0: requests aboard, and actual less predicted.
        self.batch_sizes = Histogram(BATCH_BOUNDS)
        self.exec_errors = Histogram(ERROR_BOUNDS_NS)
        self.completion_errors = Histogram(ERROR_BOUNDS_NS)
        self.cascades = CascadeTally()
        self.calls = CallTally()

    @property
    def answered(self) -> int:
        return self.served.count + self.unserved.count

    def forget_extremes(self) -> None:
        """Begin the next interval of all least and greatest values."""
        self.least_ns, self.greatest_ns = math.inf, -1
        for lane in self.lanes.values():
            lane.forget_extremes()

    # Both of these are on the controller's hot path, so `Histogram.add` is written out.

    def add_request(self, record: RequestRecord) -> None:
        """Count one answered request."""
        latency_ns = record.departure_ns - record.arrival_ns
        model = self.models.get(record.model_id)
        if model is None:
            model = self.models[record.model_id] = [0, 0]
        model[0] += 1
        if record.code == 0:
            served = self.served
            served.counts[bisect_left(LATENCY_BOUNDS_NS, latency_ns)] += 1
            served.total += latency_ns
            if latency_ns < self.least_ns:
                self.least_ns = latency_ns
            if latency_ns > self.greatest_ns:
                self.greatest_ns = latency_ns
            if record.deadline_met:
                self.in_time += 1
                model[1] += 1
            return
        self.unserved.add(latency_ns)
        if latency_ns == 0:
            self.refused_at_arrival += 1

    def add_action(self, record: ActionRecord) -> None:
        """Count one action that ended, well or not."""
        kind = record.action_type
        if record.code != 0:
            failed = (int(kind), int(record.code))
            self.failures[failed] = self.failures.get(failed, 0) + 1
            return
        key = (record.worker_id, record.gpu_id, kind)
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key[0], key[1], int(kind)] = Lane()
        span = record.exec
        exec_ns = span.duration_ns
        e2e_ns = record.result_received_ns - record.sent_ns
        if lane.clocked or record.gpu_clock_mhz > 0 or record.gpu_clock_before_mhz > 0:
            lane.add_clocks(exec_ns, record.gpu_clock_before_mhz, record.gpu_clock_mhz)
        lane.count += 1
        lane.requests += record.batch_size
        lane.exec_ns += exec_ns
        lane.e2e_ns += e2e_ns
        if exec_ns < lane.least:
            lane.least = exec_ns
        if exec_ns > lane.greatest:
            lane.greatest = exec_ns
        if e2e_ns > lane.e2e_greatest:
            lane.e2e_greatest = e2e_ns
        if kind == _INFER:
            sizes, execs, ends = self.batch_sizes, self.exec_errors, self.completion_errors
            size = record.batch_size
            sizes.counts[bisect_left(BATCH_BOUNDS, size)] += 1
            sizes.total += size
            error_ns = exec_ns - record.expected_duration_ns
            execs.counts[bisect_left(ERROR_BOUNDS_NS, error_ns)] += 1
            execs.total += error_ns
            error_ns = span.end_ns - record.expected_complete_ns
            ends.counts[bisect_left(ERROR_BOUNDS_NS, error_ns)] += 1
            ends.total += error_ns

    def report(self) -> dict[str, Any]:
        """The counters that `status` shows, as plain lists; two of them differ by what happened in between.

        Times in ns. A histogram is its counts, one more than it has bounds. `cascades` and
        `functions` are there once one was served.
        """
        cascades, functions = self.cascades.report(), self.calls.report()
        return {
            "in_time": self.in_time,
            "refused_at_arrival": self.refused_at_arrival,
            "latency_bounds_ns": list(LATENCY_BOUNDS_NS),
            "latency_served": self.served.counts.copy(),
            "error_bounds_ns": list(ERROR_BOUNDS_NS),
            "exec_errors": self.exec_errors.counts.copy(),
            "completion_errors": self.completion_errors.counts.copy(),
            "batches": self.batch_sizes.count,
            "loads": self._done(ActionType.LOAD_WEIGHTS),
            "loads_failed": self._failed(ActionType.LOAD_WEIGHTS),
            "evictions": self._done(ActionType.EVICT_WEIGHTS),
            "evictions_failed": self._failed(ActionType.EVICT_WEIGHTS),
            "infers_failed": self._failed(ActionType.INFER),
            **({"cascades": cascades} if cascades else {}),
            **({"functions": functions} if functions else {}),
        }

    def _done(self, kind: ActionType) -> int:
        return sum(lane.count for key, lane in self.lanes.items() if key[2] == kind)

    def _failed(self, kind: ActionType) -> int:
        return sum(n for (failed, _), n in self.failures.items() if failed == kind)


class Recent:
    """The share in time of what was answered lately: since the oldest of the last few looks.

    `note` is called at a steady pace; each look is kept for `window_ns`.
    """

    def __init__(self, tally: Tally, *, window_ns: int = 60 * NS_PER_S) -> None:
        self._tally = tally
        self._window_ns = window_ns
        self._looks: deque[tuple[int, int, int]] = deque([(0, 0, 0)])  # when, answered, in time

    def note(self, now_ns: int) -> None:
        self._looks.append((now_ns, self._tally.answered, self._tally.in_time))
        while len(self._looks) > 1 and self._looks[1][0] <= now_ns - self._window_ns:
            self._looks.popleft()

    def satisfaction(self) -> float | None:
        """In time of answered, 0 to 1; None when nothing was answered in the window."""
        _, answered, in_time = self._looks[0]
        asked = self._tally.answered - answered
        return (self._tally.in_time - in_time) / asked if asked else None
