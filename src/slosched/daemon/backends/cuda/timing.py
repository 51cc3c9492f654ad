"""How long launches take on the GPU, between events, while others may be served: in the background thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from slosched.daemon.backends.cuda.background import Yielding
from slosched.daemon.backends.cuda.driver import Driver, Stream
from slosched.daemon.backends.cuda.segments import Gate
from slosched.daemon.backends.cuda.steps import Launch, SteppedRun
from slosched.units import NS_PER_MS

#: The most launches that are timed one behind the other.
MOST_TIMED = 192
#: How often each is measured; and what takes so long that fewer times must do.
_RUNS, _LONG_NS, _RUNS_OF_LONG = 5, 20 * NS_PER_MS, 3

#: Launches that are made one by one to measure what the host's part costs between them, and how often.
_ONE_BY_ONE, _ONE_BY_ONE_NS, _BUBBLES = 4, NS_PER_MS, 5
#: Steps of a run that are measured, and how long, once they ran twice.
_STEPS, _PARTS_AT_MOST_NS = 16, 1_500 * NS_PER_MS


class StepTimes(NamedTuple):
    """What each piece takes of the first part of a run in `steps` steps, of a step, and of the last, ns."""

    steps: int
    begin: list[int]
    step: list[int]
    finish: list[int]

    @property
    def parts_ns(self) -> tuple[int, int, int]:
        """What each part takes."""
        return sum(self.begin), sum(self.step), sum(self.finish)

    @property
    def whole_ns(self) -> int:
        begin_ns, step_ns, finish_ns = self.parts_ns
        return begin_ns + self.steps * step_ns + finish_ns

    @property
    def all(self) -> list[int]:
        """What each piece of the run takes, in order."""
        return [*self.begin, *self.step * self.steps, *self.finish]


def medians(rows: Sequence[Sequence[int]]) -> list[int]:
    """The median of each column; at least 1."""
    return [max(1, round(median(column))) for column in zip(*rows, strict=True)]


def runs_for(for_ns: int) -> int:
    """How often something that takes `for_ns` is measured."""
    return _RUNS if for_ns < _LONG_NS else _RUNS_OF_LONG


def steps_timed(run: SteppedRun) -> int:
    """How many steps of a run are measured. It has at most MOST_TIMED pieces with one step."""
    begin, step, finish = run.pieces
    room = (MOST_TIMED - len(begin) - len(finish)) // len(step)
    return max(1, min(run.steps, _STEPS, room))


class Stopwatch:
    """Times launches on `stream`. With a `gate` they are not mixed with those of a served run in segments."""

    def __init__(
        self, driver: Driver, background: Yielding, stream: Stream, gate: Gate | None = None
    ) -> None:
        self._driver, self._background = driver, background
        self._stream, self._gate = stream, gate
        self._events = [driver.event() for _ in range(MOST_TIMED + 1)]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it the launches of a run in segments are the only ones."""
        background, gate = self._background, self._gate
        waits = nullcontext() if gate is None else gate.alone(background.pause, segments=True)
        with waits, background.uncut():
            yield

    def once(self, launches: Sequence[Launch], for_ns: int) -> list[int]:
        """What each of at most MOST_TIMED takes when all are launched one behind the other, ns.

        `for_ns` is about what they take together.
        """
        events, driver = self._events, self._driver
        self._background.until_idle(for_ns)
        with self.alone():
            driver.record(events[0], self._stream)
            for launch, event in zip(launches, events[1:], strict=False):
                launch(self._stream)
                driver.record(event, self._stream)
        used = events[: len(launches) + 1]
        while not driver.done(used[-1]):
            self._background.pause()
        return [driver.elapsed_ns(a, b) for a, b in pairwise(used)]

    def one_by_one(self, launches: Sequence[Launch], for_ns: int) -> int:
        """What all take together if each is launched when the one before has ended, ns."""
        events, driver = self._events, self._driver
        self._background.until_idle(for_ns)
        with self.alone():
            driver.record(events[0], self._stream)
            for launch, event in zip(launches, events[1:], strict=False):
                launch(self._stream)
                driver.record(event, self._stream)
                while not driver.done(event):
                    pass
        return driver.elapsed_ns(events[0], events[len(launches)])

    def bubble_ns(self, launches: Sequence[Launch], times: Sequence[int], for_ns: int) -> int:
        """What a boundary costs more when the next segment is launched once the one before has ended."""
        count = max(2, min(_ONE_BY_ONE, len(launches), _ONE_BY_ONE_NS // max(times)))
        costs = []
        for _ in range(_BUBBLES):
            took_ns = self.one_by_one(launches[:count], for_ns)
            costs.append((took_ns - sum(times[:count])) / (count - 1))
        return max(0, round(median(costs)))

    def each(self, launches: Sequence[Launch], for_ns: int) -> list[int]:
        """The median of `once` for each launch."""
        return medians([self.once(launches, for_ns) for _ in range(runs_for(for_ns))])

    def steps(self, run: SteppedRun, for_ns: int, *, most: int = 0) -> StepTimes:
        """The same for each piece of a run in steps: each step takes what the median of those measured took.

        Between the first part and the last, `steps_timed` steps are launched, or at most `most`, and not often
        if that takes long.
        """
        begin, step, finish = run.pieces
        count = min(steps_timed(run), most or run.steps)
        launches = [*begin, *[*step] * count, *finish]
        rows: list[list[int]] = []
        while len(rows) < runs_for(for_ns):
            rows.append(self.once(launches, for_ns))
            for_ns = sum(rows[-1])
            if len(rows) > 1 and len(rows) * for_ns > _PARTS_AT_MOST_NS:
                break
        times, first = medians(rows), len(begin)
        last = first + count * len(step)
        some = [times[at : at + len(step)] for at in range(first, last, len(step))]
        return StepTimes(run.steps, times[:first], medians(some), times[last:])
