"""What joining a running batch at a step would bring: a simulation of the heavy stage alone, in virtual time.

A batch of a program in equal steps (`Stepped`) is formed when its run starts. With joining, a request enters
a running batch at a boundary between two steps, and leaves when its own steps are done (iteration-level
scheduling: Orca, OSDI'22). `simulate` serves the same arrivals under one of three rules:

- AT_START: a GPU that is free takes the largest batch that is in time, the earliest deadlines first.
- JOINING: at each boundary waiting requests join, the earliest deadlines first, while all aboard stay in time.
- WITH_ROOM: as JOINING, but a request joins only if it would be in time in a batch of `room_size` as well. With
  JOINING alone, requests that have waited too long keep others from joining them, so that an overload makes
  batches small.

A rule knows the step times exactly, so no answer is late: a request that cannot be in time is refused. A
request goes to the least crowded GPU that can take it. The model has no cost of a change of the batch (memory,
copies of state between the buffers of CUDA graphs of two classes), no noise and no messages. That rows of one
batch are at different steps costs nothing either: the number of the step is a part of each row's state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from math import ceil, fsum, inf

from slosched.errors import InvalidConfig, UnknownName
from slosched.gpu_profile import ModelProfile
from slosched.units import NS_PER_S

AT_START, JOINING, WITH_ROOM = "at start", "joining", "joining with room"
RULES = (AT_START, JOINING, WITH_ROOM)


@dataclass(frozen=True)
class StepTimes:
    """Times of a program of `steps` equal steps, by batch size: size 1 first.

    `step_ns` is the time of a step. `tail_ns` is all that a run has beside its steps; it is paid for those
    that leave together, after their last step, and others aboard wait for it.
    """

    steps: int
    step_ns: tuple[int, ...]
    tail_ns: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidConfig(f"a program needs at least one step, not {self.steps}")
        if not self.step_ns or len(self.step_ns) != len(self.tail_ns):
            raise InvalidConfig("step_ns and tail_ns need one time for each batch size from 1 up")
        if min(self.step_ns) < 1 or min(self.tail_ns) < 0:
            raise InvalidConfig("step_ns must be above 0, and tail_ns at least 0")

    @classmethod
    def of(cls, model: ModelProfile, steps: int) -> StepTimes:
        """From a profile, sizes between the listed ones interpolated. Raises InvalidConfig.

        A profile with `steps` of its own says how long a step takes, and `steps` must be the same; without them
        the whole exec time is divided by `steps`, rounded up.
        """
        if model.steps not in (0, steps):
            raise InvalidConfig(f"model {model.name!r} has {model.steps} steps, not {steps}")
        whole = model.interpolated()
        sizes = range(1, max(whole.exec_ns) + 1)
        if not model.steps:
            step_ns = tuple(ceil(whole.exec_ns[size] / max(steps, 1)) for size in sizes)
            return cls(steps, step_ns, (0,) * len(step_ns))
        step_ns = tuple(whole.step_ns[size] for size in sizes)
        tail_ns = tuple(whole.exec_ns[size] - steps * whole.step_ns[size] for size in sizes)
        return cls(steps, step_ns, tail_ns)

    @property
    def largest(self) -> int:
        """The largest batch size."""
        return len(self.step_ns)

    def run_ns(self, size: int) -> int:
        """How long a batch of `size` takes that stays the same from start to end."""
        return self.steps * self.step_ns[size - 1] + self.tail_ns[size - 1]

    def slowed(self, light_share: float) -> StepTimes:
        """The same with pauses, after each step, that take `light_share` of the GPU's time."""
        if not 0 <= light_share < 1:
            raise InvalidConfig(f"light_share must be at least 0 and below 1, not {light_share}")
        factor = 1 / (1 - light_share)
        return StepTimes(
            self.steps,
            tuple(ceil(ns * factor) for ns in self.step_ns),
            tuple(ceil(ns * factor) for ns in self.tail_ns),
        )


@dataclass(frozen=True)
class Stage:
    """The heavy stage on `gpus` GPUs. `slo_ns` is the time that a request has from its arrival at this stage.

    A light stage that goes first takes `light_share` of each GPU's time, as pauses between steps.
    """

    times: StepTimes
    slo_ns: int
    gpus: int = 1
    light_share: float = 0.0

    def __post_init__(self) -> None:
        if self.slo_ns < 1 or self.gpus < 1:
            raise InvalidConfig("a stage needs an SLO above 0 and at least one GPU")


@dataclass(frozen=True)
class Capacity:
    """The most answers/s of a GPU that runs full batches of one size, within the SLO, and the light stage of
    their requests; `light_share` is what the latter then takes of its time. 0 where no size is in time."""

    per_s: float
    size: int
    light_share: float


def capacity(times: StepTimes, slo_ns: int, light_ns: float = 0.0) -> Capacity:
    """`light_ns` is the GPU time of the light stage for each heavy answer."""
    best = Capacity(0.0, 0, 0.0)
    for size in range(1, times.largest + 1):
        run_ns = times.run_ns(size)
        cost_ns = run_ns / size + light_ns
        share = light_ns / cost_ns
        if run_ns <= slo_ns * (1 - share) and NS_PER_S / cost_ns > best.per_s:
            best = Capacity(NS_PER_S / cost_ns, size, share)
    return best


def room_size(times: StepTimes, slo_ns: int, gpus: int) -> int:
    """The largest batch size that is in time behind a wait for a place, one of which comes free each time that
    one of all the GPUs' requests leaves; at least 1. Sizes beyond it may be in time as well."""
    return max(
        (
            size
            for size in range(1, times.largest + 1)
            if times.run_ns(size) * (1 + 1 / (size * gpus)) <= slo_ns
        ),
        default=1,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: when the request arrived, began its first step and ended, and on which GPU."""

    arrival_ns: int
    start_ns: int
    end_ns: int
    gpu: int


@dataclass(frozen=True, slots=True)
class Span:
    """Steps of a GPU with the same batch: `steps` of them from `start_ns` on, and what ends behind them."""

    gpu: int
    start_ns: int
    end_ns: int
    steps: int
    size: int


@dataclass(frozen=True)
class Served:
    """What became of the requests that arrived from `since_ns` on; `busy_ns` is GPU time without pauses, from
    the first request."""

    offered: int
    slo_ns: int
    busy_ns: int
    all_answers: int
    answers: tuple[Answer, ...]

    @property
    def in_time(self) -> float:
        """Requests answered within the SLO over those offered."""
        met = sum(each.end_ns - each.arrival_ns <= self.slo_ns for each in self.answers)
        return met / self.offered if self.offered else 1.0

    @property
    def mean_ns(self) -> float:
        """Mean latency of answers; NaN without any."""
        latencies = [each.end_ns - each.arrival_ns for each in self.answers]
        return fsum(latencies) / len(latencies) if latencies else float("nan")

    @property
    def p99_ns(self) -> float:
        """The nearest-rank 99th percentile of latency of answers; NaN without any."""
        latencies = sorted(each.end_ns - each.arrival_ns for each in self.answers)
        return float(latencies[ceil(0.99 * len(latencies)) - 1]) if latencies else float("nan")

    @property
    def gpu_ns(self) -> float:
        """GPU time for each answer; NaN without any."""
        return self.busy_ns / self.all_answers if self.all_answers else float("nan")


def simulate(
    stage: Stage,
    arrivals_ns: Sequence[int],
    rule: str,
    *,
    since_ns: int = 0,
    on_span: Callable[[Span], None] | None = None,
) -> Served:
    """Serve requests that arrive at `arrivals_ns`, ascending; those before `since_ns` are not counted.

    `on_span` gets every stretch of steps as it begins. Raises UnknownName for a rule that does not exist,
    InvalidConfig for arrivals that do not ascend.
    """
    if rule not in RULES:
        raise UnknownName("rule", rule, list(RULES))
    if any(a > b for a, b in pairwise(arrivals_ns)):
        raise InvalidConfig("arrivals must ascend; sort them")
    run = _Run(stage, arrivals_ns, rule, on_span)
    run.all()
    return Served(
        offered=len(arrivals_ns) - bisect_left(arrivals_ns, since_ns),
        slo_ns=stage.slo_ns,
        busy_ns=sum(gpu.busy_ns for gpu in run.gpus),
        all_answers=len(run.answers),
        answers=tuple(each for each in run.answers if each.arrival_ns >= since_ns),
    )


@dataclass(slots=True)
class _Group:
    """Requests that joined at the same boundary, and so leave together: after `leaves` steps of the GPU."""

    leaves: int
    start_ns: int
    arrivals_ns: list[int]  # ascending

    @property
    def size(self) -> int:
        return len(self.arrivals_ns)


class _Gpu:
    """`done` counts all steps up to the last boundary, `next_done` up to the next one, at `next_ns`."""

    __slots__ = ("aboard", "busy_ns", "done", "index", "next_done", "next_ns", "size")

    def __init__(self, index: int) -> None:
        self.index = index
        self.aboard: deque[_Group] = deque()  # the first leaves first
        self.size = self.done = self.next_done = self.next_ns = self.busy_ns = 0

    @property
    def next_size(self) -> int:
        """Requests that are still aboard behind the next boundary."""
        first = self.aboard[0] if self.aboard else None
        return self.size - (first.size if first and first.leaves <= self.next_done else 0)


class _Run:
    """The event loop: arrivals, and the boundaries of the GPUs at which something may change."""

    def __init__(
        self,
        stage: Stage,
        arrivals_ns: Sequence[int],
        rule: str,
        on_span: Callable[[Span], None] | None,
    ) -> None:
        self.gpus = [_Gpu(index) for index in range(stage.gpus)]
        self.answers: list[Answer] = []
        self._pure = stage.times
        self._times = stage.times.slowed(stage.light_share)
        self._slo_ns = stage.slo_ns
        self._rule, self._on_span = rule, on_span
        self._arrivals_ns = arrivals_ns
        self._waiting: list[int] = []  # times of arrival, ascending; so are the deadlines
        self._boundaries: list[tuple[int, int]] = []  # (time, index of the GPU)
        size = room_size(self._times, stage.slo_ns, stage.gpus) if rule == WITH_ROOM else 1
        #: A request that could not run this long before its deadline is refused.
        self._least_ns = max(self._times.run_ns(1), self._times.run_ns(size))

    def all(self) -> None:
        place, count = 0, len(self._arrivals_ns)
        while place < count or self._boundaries:
            now_ns = self._arrivals_ns[place] if place < count else self._boundaries[0][0]
            if self._boundaries:
                now_ns = min(now_ns, self._boundaries[0][0])
            while place < count and self._arrivals_ns[place] == now_ns:
                self._waiting.append(now_ns)
                place += 1
            at_boundary: list[_Gpu] = []
            while self._boundaries and self._boundaries[0][0] == now_ns:
                gpu = self.gpus[heappop(self._boundaries)[1]]
                self._end_steps(gpu, now_ns)
                at_boundary.append(gpu)
            self._decide(at_boundary, now_ns)

    def _decide(self, at_boundary: list[_Gpu], now_ns: int) -> None:
        """Let requests join where that is possible now, and start the next steps."""
        # Those whose deadline comes before they could be done are refused.
        del self._waiting[: bisect_left(self._waiting, now_ns + self._least_ns - self._slo_ns)]
        can_take = at_boundary
        if self._waiting:
            idle = [gpu for gpu in self.gpus if not gpu.size and gpu not in at_boundary]
            can_take = sorted(at_boundary + idle, key=lambda gpu: (gpu.size, gpu.index))
            for gpu in idle:
                gpu.next_ns = now_ns
            free = sum(not gpu.size for gpu in can_take)
            take = self._start if self._rule == AT_START else self._join
            for gpu in can_take:
                if not self._waiting:
                    break
                # Requests for each of the free GPUs, so that none of them stays idle.
                take(gpu, now_ns, min(self._times.largest, ceil(len(self._waiting) / max(1, free))))
                free -= free > 0
        for gpu in can_take:
            if gpu.size:
                self._start_steps(gpu, now_ns)

    # ------------------------------------------------------------------------------------ rules

    def _start(self, gpu: _Gpu, now_ns: int, most: int) -> None:
        """The largest batch that is in time, of those that fit into it the earliest deadlines."""
        for size in range(most, 0, -1):
            ends_ns = now_ns + self._times.run_ns(size)
            first = bisect_left(self._waiting, ends_ns - self._slo_ns)
            if len(self._waiting) - first >= size:
                chosen = self._waiting[first : first + size]
                del self._waiting[first : first + size]
                self._board(gpu, chosen, now_ns)
                return

    def _join(self, gpu: _Gpu, now_ns: int, most: int) -> None:
        """Let requests join, the earliest deadlines first, while all aboard stay in time."""
        others = [each for each in self.gpus if each is not gpu]
        crowds = {each.index: each.next_size for each in others}
        chosen: list[int] = []
        left: list[int] = []  # of those looked at
        place = 0
        while place < len(self._waiting) and len(chosen) < min(
            most, self._times.largest - gpu.size
        ):
            new, arrival_ns = len(chosen) + 1, self._waiting[place]
            ends_ns = self._joined_end_ns(gpu.aboard, gpu.size, gpu.done, now_ns, new)
            if ends_ns > (chosen[0] if chosen else arrival_ns) + self._slo_ns:
                if ends_ns == inf or chosen:
                    break  # another one aboard would be late
                left.append(arrival_ns)
            elif other := self._better(others, crowds, gpu.size + new, arrival_ns):
                left.append(arrival_ns)
                crowds[other.index] += 1
            else:
                chosen.append(arrival_ns)
            place += 1
        if chosen:
            self._waiting[:place] = left
            self._board(gpu, chosen, now_ns)

    def _better(
        self, others: Sequence[_Gpu], crowds: dict[int, int], size: int, arrival_ns: int
    ) -> _Gpu | None:
        """The least crowded of `others`, if it is less crowded than a GPU with `size` aboard even with this
        request, and takes it at its next boundary with all in time. `crowds` count those that wait for it."""
        if not others:
            return None
        least = min(others, key=lambda each: crowds[each.index])
        if crowds[least.index] + 1 >= size:
            return None
        stays = [group for group in least.aboard if group.leaves > least.next_done]
        done, at_ns, aboard = least.next_done, least.next_ns, least.next_size
        new = crowds[least.index] + 1 - aboard
        ends_ns = self._joined_end_ns(stays, aboard, done, at_ns, new)
        return least if ends_ns <= arrival_ns + self._slo_ns else None

    def _joined_end_ns(
        self, aboard: Iterable[_Group], size: int, done: int, at_ns: int, new: int
    ) -> float:
        """When `new` requests end that join the `size` ones aboard at the boundary at `at_ns`, after `done`
        steps of the GPU, if none joins later; inf if one that is aboard would be late."""
        step_ns, tail_ns = self._times.step_ns, self._times.tail_ns
        leaves = done + self._times.steps
        for group in aboard:
            at_ns += (group.leaves - done) * step_ns[size + new - 1] + tail_ns[group.size - 1]
            if at_ns > group.arrivals_ns[0] + self._slo_ns:
                return inf
            done, size = group.leaves, size - group.size
        return at_ns + (leaves - done) * step_ns[new - 1] + tail_ns[new - 1]

    # ------------------------------------------------------------------------------------ steps

    def _board(self, gpu: _Gpu, arrivals_ns: list[int], now_ns: int) -> None:
        gpu.aboard.append(_Group(gpu.done + self._times.steps, now_ns, arrivals_ns))
        gpu.size += len(arrivals_ns)

    def _start_steps(self, gpu: _Gpu, now_ns: int) -> None:
        """Run to the next boundary at which a request may join, or leaves."""
        first, size = gpu.aboard[0], gpu.size
        steps = first.leaves - gpu.done if self._rule == AT_START else 1
        ends = first.size if first.leaves == gpu.done + steps else 0
        gpu.busy_ns += _time_ns(self._pure, size, steps, ends)
        gpu.next_done = gpu.done + steps
        gpu.next_ns = now_ns + _time_ns(self._times, size, steps, ends)
        heappush(self._boundaries, (gpu.next_ns, gpu.index))
        if self._on_span is not None:
            self._on_span(Span(gpu.index, now_ns, gpu.next_ns, steps, size))

    def _end_steps(self, gpu: _Gpu, now_ns: int) -> None:
        gpu.done = gpu.next_done
        while gpu.aboard and gpu.aboard[0].leaves == gpu.done:
            group = gpu.aboard.popleft()
            gpu.size -= group.size
            self.answers += [
                Answer(at_ns, group.start_ns, now_ns, gpu.index) for at_ns in group.arrivals_ns
            ]


def _time_ns(times: StepTimes, size: int, steps: int, ends: int) -> int:
    """The time of `steps` steps of `size` requests, `ends` of which are then answered."""
    return steps * times.step_ns[size - 1] + (times.tail_ns[ends - 1] if ends else 0)
