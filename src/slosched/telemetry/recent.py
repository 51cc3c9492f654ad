"""The last minutes of a controller in memory, for the pages that show it while it runs (docs/live.md).

A pure accumulator of constant size. Records go in where the logs are written, at some 0.4 us each, and are
kept as they are; the reader does what costs more (words, JSON). Seconds are those of the records'
clock, and a ring has a place for each of the last `SECONDS`, the last one still open.

A request is counted in the second in which it *arrived*, so that offered and satisfied of a second count the
same requests; refusals and latencies count in the second of the answer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from slosched.codes import ActionType, Code
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.telemetry.histogram import Histogram
from slosched.units import NS_PER_S, NS_PER_US

#: Seconds that are kept of everything about requests, and of how busy each GPU was.
SECONDS = 300
BUSY_SECONDS = 60
#: Requests that were not answered in time, and actions (of all GPUs together), that are kept.
KEPT_MISSES = 100
KEPT_ACTIONS = 8_192
_KEPT_MASK = KEPT_ACTIONS - 1

#: Keys in `misses`: answered but late; and the overflow bucket for rare codes.
LATE = int(Code.OK)
OTHER = -1
_MOST_CODES = 16

#: Buckets of latencies: of 2**16 ns (66 us) up to 67 ms, of 2**20 ns (1 ms) up to 1.07 s, and of 2**24 ns
#: (17 ms) up to 17 s, some thousand each. A shift finds the bucket in a thirtieth of a search's time.
_FINE_NS, _MIDDLE_NS, _COARSE_NS = 1 << 26, 1 << 30, 1 << 34
LATENCY_BOUNDS_NS = tuple(
    end_ns - 1
    for shift, first in ((16, 0), (20, _FINE_NS), (24, _MIDDLE_NS))
    for end_ns in range(first + (1 << shift), (1 << (shift + 10)) + 1, 1 << shift)
)

_EVICT = int(ActionType.EVICT_WEIGHTS)
_CALL = int(ActionType.CALL)
_LOAD = int(ActionType.LOAD_WEIGHTS)


@dataclass(frozen=True, slots=True)
class Series:
    """The last SECONDS seconds, oldest first; the last place is second `second`, which is not over yet.

    Counts of requests. `misses` goes by code, LATE or OTHER. Latencies in us, of requests that were
    answered with an output; None in a second without any, and in the open one.
    """

    second: int
    offered: list[int]
    satisfied: list[int]
    misses: dict[int, list[int]]
    p50_us: list[int | None]
    p99_us: list[int | None]


class _Busy:
    """Busy ns of one executor in the open second, and in each of the last seconds."""

    __slots__ = ("begins_ns", "busy_ns", "ends_ns", "open_ns", "second_of")

    def __init__(self) -> None:
        self.begins_ns = self.ends_ns = 0  # of the open second
        self.open_ns = 0
        # A place belongs to the second that it names. The open second's place is filled when it closes.
        self.second_of = [0] * (BUSY_SECONDS + 1)
        self.busy_ns = [0] * (BUSY_SECONDS + 1)

    def add(self, begin_ns: int, end_ns: int) -> None:
        """Any span: it is split over the seconds that it touches."""
        second = end_ns // NS_PER_S
        start_ns = second * NS_PER_S
        if end_ns >= self.ends_ns:
            self.close()
            self.begins_ns, self.ends_ns = start_ns, start_ns + NS_PER_S
        while begin_ns < start_ns:
            self._add(second, end_ns - start_ns)
            second, end_ns = second - 1, start_ns
            start_ns -= NS_PER_S
        self._add(second, end_ns - begin_ns)

    def close(self) -> None:
        """Put what the open second has so far where `percent` looks."""
        self._add(self.begins_ns // NS_PER_S, self.open_ns)
        self.open_ns = 0

    def _add(self, second: int, busy_ns: int) -> None:
        at = second % (BUSY_SECONDS + 1)
        if self.second_of[at] != second:
            if second < self.second_of[at]:
                return  # too old to have a place
            self.second_of[at], self.busy_ns[at] = second, 0
        self.busy_ns[at] += busy_ns

    def percent(self, now_ns: int, width: int) -> list[int]:
        self.close()
        second = now_ns // NS_PER_S
        places = ((s, s % (BUSY_SECONDS + 1)) for s in range(second - BUSY_SECONDS, second))
        return [
            min(100, round(self.busy_ns[at] * 100 / (NS_PER_S * width)))
            if self.second_of[at] == s
            else 0
            for s, at in places
        ]

    def mean_percent(self, now_ns: int, seconds: int, width: int = 1) -> float:
        self.close()
        second = now_ns // NS_PER_S
        busy_ns = 0
        for s in range(second - seconds, second):
            at = s % (BUSY_SECONDS + 1)
            if self.second_of[at] == s:
                busy_ns += self.busy_ns[at]
        return min(100.0, busy_ns * 100 / (seconds * NS_PER_S * width))


class LastMinutes:
    """What happened lately: `add_request` and `add_action` take the records, the other methods report."""

    def __init__(self) -> None:
        # One place more than seconds: what arrived before the first of them goes there, unread.
        self._offered = [0] * (SECONDS + 1)
        self._missed = [0] * (SECONDS + 1)
        self._misses: dict[int, list[int]] = {LATE: [0] * SECONDS}
        self._p50_us: list[int | None] = [None] * SECONDS
        self._p99_us: list[int | None] = [None] * SECONDS
        self._latency = Histogram(LATENCY_BOUNDS_NS)  # of the open second
        self._second = 0
        self._begins_ns = self._ends_ns = 0
        self._at = 0  # the open second's place
        #: Requests that were refused, given up, failed or late; the newest last.
        self.missed: deque[RequestRecord] = deque(maxlen=KEPT_MISSES)
        self._actions: list[ActionRecord | None] = [None] * KEPT_ACTIONS
        #: Number of the next action; those before it are `actions(first, this)`.
        self.next_action = 0
        self._busy: dict[tuple[int, int], tuple[_Busy, _Busy]] = {}

    # ------------------------------------------------------------------------------ taking in

    def add_request(self, record: RequestRecord) -> None:
        """Count an answered request."""
        departure_ns = record.departure_ns
        arrival_ns = record.arrival_ns
        if departure_ns >= self._ends_ns:
            self._open(departure_ns)
        at = self._at if arrival_ns >= self._begins_ns else self._place(arrival_ns)
        self._offered[at] += 1
        code = record.code
        if not code:
            latency_ns = departure_ns - arrival_ns
            place = latency_ns >> 16 if latency_ns < _FINE_NS else bucket_of(latency_ns)
            self._latency.counts[place] += 1
            if record.deadline_met:
                return
        self._missed[at] += 1
        counts = self._misses.get(code)
        (counts if counts is not None else self._new_miss(code))[self._at] += 1
        self.missed.append(record)

    def add_action(self, record: ActionRecord) -> None:
        """Keep a finished load or inference. Evictions take no time and are not kept."""
        kind = record.action_type
        if kind == _EVICT:
            return
        number = self.next_action
        self._actions[number & _KEPT_MASK] = record
        self.next_action = number + 1
        span = record.exec
        end_ns = span.end_ns
        if not end_ns:
            return  # it did not happen
        gpu = (record.worker_id, record.gpu_id)
        both = self._busy.get(gpu)
        if both is None:
            both = self._busy[gpu] = (_Busy(), _Busy())
        busy = both[kind == _LOAD]
        begin_ns = span.begin_ns
        if kind == _CALL:  # without its suspensions, and so as if it had run at its end
            begin_ns = end_ns - span.duration_ns
        if busy.begins_ns <= begin_ns and end_ns < busy.ends_ns:
            busy.open_ns += end_ns - begin_ns
        else:
            busy.add(max(begin_ns, end_ns - BUSY_SECONDS * NS_PER_S), end_ns)

    def _place(self, arrival_ns: int) -> int:
        second = arrival_ns // NS_PER_S
        return second % SECONDS if second > self._second - SECONDS else SECONDS

    def _new_miss(self, code: int) -> list[int]:
        key = int(code) if len(self._misses) < _MOST_CODES else OTHER
        return self._misses.setdefault(key, [0] * SECONDS)

    def _open(self, now_ns: int) -> None:
        """Close the open second and begin that of `now_ns`, later than it."""
        p50_ns, p99_ns = self._latency.middles(0.5, 0.99)
        self._p50_us[self._at] = None if p50_ns is None else p50_ns // NS_PER_US
        self._p99_us[self._at] = None if p99_ns is None else p99_ns // NS_PER_US
        self._latency = Histogram(LATENCY_BOUNDS_NS)
        second = now_ns // NS_PER_S
        rings = (self._offered, self._missed, *self._misses.values())
        for passed in range(max(self._second, second - SECONDS) + 1, second + 1):
            at = passed % SECONDS
            for ring in rings:
                ring[at] = 0
            self._p50_us[at] = self._p99_us[at] = None
        self._second, self._at = second, second % SECONDS
        self._begins_ns, self._ends_ns = second * NS_PER_S, (second + 1) * NS_PER_S

    # -------------------------------------------------------------------------------- telling

    def series(self, now_ns: int) -> Series:
        """Everything about requests by second, up to the second of `now_ns`."""
        if now_ns >= self._ends_ns:
            self._open(now_ns)
        first = self._at + 1

        def in_order(ring: list[int]) -> list[int]:
            return ring[first:SECONDS] + ring[:first]

        offered = in_order(self._offered)
        return Series(
            second=self._second,
            offered=offered,
            satisfied=[
                all_ - missed for all_, missed in zip(offered, in_order(self._missed), strict=True)
            ],
            misses={code: in_order(ring) for code, ring in self._misses.items()},
            p50_us=self._p50_us[first:] + self._p50_us[:first],
            p99_us=self._p99_us[first:] + self._p99_us[:first],
        )

    def actions(self, first: int, last: int) -> list[ActionRecord]:
        """Actions number `first` up to `last` (not included) that are still kept, in order."""
        first = max(first, self.next_action - KEPT_ACTIONS, 0)
        last = min(last, self.next_action)
        kept = (self._actions[number & _KEPT_MASK] for number in range(first, last))
        return [record for record in kept if record is not None]

    def exec_percent(
        self, worker_id: int, gpu_id: int, now_ns: int, *, width: int = 1
    ) -> list[int]:
        """How busy exec of one GPU was in each of the last BUSY_SECONDS whole seconds, oldest first.

        100 is `width` actions at every moment.
        """
        both = self._busy.get((worker_id, gpu_id))
        return both[0].percent(now_ns, width) if both is not None else [0] * BUSY_SECONDS

    def busy_mean(
        self, worker_id: int, gpu_id: int, now_ns: int, *, seconds: int, width: int = 1
    ) -> tuple[float, float]:
        """Percent of the last `seconds` whole seconds (at most BUSY_SECONDS): exec, weight loads."""
        both = self._busy.get((worker_id, gpu_id))
        if both is None:
            return 0.0, 0.0
        return both[0].mean_percent(now_ns, seconds, width), both[1].mean_percent(now_ns, seconds)


def bucket_of(latency_ns: int) -> int:
    """The place of a latency in LATENCY_BOUNDS_NS."""
    if latency_ns < _FINE_NS:
        return latency_ns >> 16
    # A coarser tier begins where the finer one ends: at the 64th of its own buckets.
    if latency_ns < _MIDDLE_NS:
        return 1024 + (latency_ns >> 20) - 64
    if latency_ns < _COARSE_NS:
        return 1024 + 960 + (latency_ns >> 24) - 64
    return len(LATENCY_BOUNDS_NS)
