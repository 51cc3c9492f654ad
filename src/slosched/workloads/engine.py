"""A running workload: its streams merged in time order. The same for live and simulated runs.

Pure: it knows no clock. `next_ns` says when something is due; the driver calls `take` then, at
the scheduled time or late, and `answered` for each answer. Times are ns after the start of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace

from slosched.errors import InvalidConfig
from slosched.workloads.base import Arrival, Workload


class Engine:
    """One run of `workload`. `duration_ns` ends it sooner, or ends one that would never end.

    Requests due at the same time go out in the order of their streams. Raises InvalidConfig for a
    workload without an end when `duration_ns` is not given.
    """

    def __init__(
        self, workload: Workload, *, seed: int = 0, duration_ns: int | None = None
    ) -> None:
        if seed < 0:
            raise InvalidConfig(f"a seed must be at least 0, not {seed}")
        if duration_ns is not None and duration_ns <= 0:
            raise InvalidConfig("the duration must be above 0")
        own_ns = workload.duration_ns
        ends = [end_ns for end_ns in (own_ns, duration_ns) if end_ns is not None]
        if not ends:
            raise InvalidConfig(
                f"{workload.name} never ends by itself: say how long it should run (--duration 60s)"
            )
        self.end_ns = min(ends)
        self.steps = workload.steps()
        self.groups = workload.groups
        self._streams = tuple(workload.streams(seed))
        # Heap of time and stream in one integer, ordered as the pair would be: with thousands of
        # streams an arrival costs a dozen comparisons, and those of tuples are twice as dear.
        self._bits = len(self._streams).bit_length()
        self._due: list[int] = []
        for index, stream in enumerate(self._streams):
            self._due.extend(at_ns << self._bits | index for at_ns in stream.first())
        heapify(self._due)
        self._seq = 0
        self._step = 0
        self._step_ends_ns = self._end_of_step()

    def _end_of_step(self) -> int:
        following = self._step + 1
        return self.steps[following].start_ns if following < len(self.steps) else self.end_ns

    def next_ns(self) -> int | None:
        """When the next request is due. None: not before one is answered, or never again."""
        if not self._due:
            return None
        at_ns = self._due[0] >> self._bits
        return at_ns if at_ns < self.end_ns else None

    def take(self) -> Arrival:
        """The next request, in time order. Only after `next_ns` gave a time."""
        due = self._due
        bits = self._bits
        at_ns = due[0] >> bits
        index = due[0] & ((1 << bits) - 1)
        stream = self._streams[index]
        while at_ns >= self._step_ends_ns and self._step + 1 < len(self.steps):
            self._step += 1
            self._step_ends_ns = self._end_of_step()
        step = self.steps[self._step]
        slo_factor, slo_ns = stream.slo(step)
        instance = stream.instance()
        following_ns = stream.after_send(at_ns)
        if following_ns is None:
            heappop(due)
        else:
            heapreplace(due, following_ns << bits | index)
        seq = self._seq
        self._seq = seq + 1
        return Arrival(
            at_ns,
            seq,
            stream.user_id,
            instance,
            slo_factor,
            slo_ns,
            step.index,
            index,
            next(stream.lengths) if stream.lengths is not None else 0,
        )

    def answered(self, arrival: Arrival, *, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        """`arrival` was answered at `at_ns`; returns when the request that waited for it is due."""
        due_ns = self._streams[arrival.stream].after_answer(at_ns, ok, deadline_ns)
        if due_ns is None or due_ns >= self.end_ns:
            return None
        heappush(self._due, due_ns << self._bits | arrival.stream)
        return due_ns

    def group(self, arrival: Arrival) -> int:
        """Which of `groups` the request belongs to."""
        return self._streams[arrival.stream].group


def open_loop_arrivals(
    workload: Workload, *, seed: int = 0, duration_ns: int | None = None
) -> Iterator[Arrival]:
    """Every request of a workload without closed loops, in time order (nothing is answered)."""
    engine = Engine(workload, seed=seed, duration_ns=duration_ns)
    while engine.next_ns() is not None:
        yield engine.take()
