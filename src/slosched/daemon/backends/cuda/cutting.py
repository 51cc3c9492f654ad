"""Where a captured class is cut into segments, and how many of them are in flight: measured in preparation.

Equal numbers of nodes are not equal times, so groups of nodes are timed first, and those that take long are
halved. Segments are then put together from groups, none longer than tau (but for a group of one node). What
the boundaries cost is measured on the segments themselves: back to back, as with two in flight, and with the
host in between, as with one. A run may be slower than the whole graph by at most `SLOWER`; within that, the tau
and the number in flight are taken that cost the least:

    (1 - S) slower + S waiting / SLO

where S is the part of the GPU time that urgent requests are expected to take (their rate times their exec
time), SLO is theirs (`Aim`), `slower` is the part by which the run is slower, and `waiting` is the mean time
from a random moment of the run until it can be interrupted. So both terms are parts of the GPU time: what the
boundaries take from the long model, and what urgent requests lose as far as waiting uses up their SLOs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from slosched.daemon.backends.cuda.background import Yielding
from slosched.daemon.backends.cuda.driver import Block, Driver, Graph, Stream
from slosched.daemon.backends.cuda.program import BufferSet, Class, Copies, Cut
from slosched.daemon.backends.cuda.recorded import RecordedProgram
from slosched.daemon.backends.cuda.runs import GraphRun
from slosched.daemon.backends.cuda.segments import Gate, SegmentedRun
from slosched.daemon.backends.cuda.steps import SteppedRun
from slosched.daemon.backends.cuda.timing import MOST_TIMED, Stopwatch, medians, runs_for
from slosched.units import NS_PER_MS, NS_PER_US

#: How much slower a run in segments may be than the whole graph; and where a boundary costs the GPU so much
#: that useful segments would exceed it.
SLOWER, SLOWER_WHERE_COSTLY, COSTLY_NS = 0.02, 0.03, 6 * NS_PER_US
#: The lengths of segments that are tried, shortest first.
TAUS_NS = tuple(us * NS_PER_US for us in (130, 180, 260, 370, 520, 740, 1_050, 1_500, 3_000))
#: Steps that take this long are segments, without a comparison with the whole run, which takes seconds.
LONG_STEP_NS = 3_000 * NS_PER_US
#: A model with a class that takes longer is cut, unless its table says a boundary: then one of four boundaries.
CUT_FROM_NS = 1_000 * NS_PER_US
BOUNDARIES = 4

_GROUPS, _MOST_GROUPS, _ROUNDS = 48, MOST_TIMED, 3
_TOO_SLOW = f"boundaries would slow it down by more than {SLOWER:.0%}"
#: `started` and the copy of the weights belong to the first segment, the copy of the output and `ended` to
#: the last.
_HEAD, _TAIL = 2, 2
#: Taus that cost more than the best one, after which no longer one is tried.
_WORSE = 2
#: How often it is measured what a boundary costs with the host in between.
_RUNS = 5
#: Segments that are launched one by one to measure what a boundary costs with the host in between.
_ONE_BY_ONE, _ONE_BY_ONE_NS = 4, 1_000 * NS_PER_US


class Wish(NamedTuple):
    """What the worker's file says of a model; 0: it is chosen by measurement."""

    boundary_ns: int = 0
    in_flight: int = 0
    urgent: bool = False

    @property
    def cut_from_ns(self) -> int:
        """Classes that take longer are cut."""
        return BOUNDARIES * self.boundary_ns or CUT_FROM_NS


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes from `begin` to `end` of a chain, and what they take."""

    begin: int
    end: int
    ns: int


def bounds_of(groups: Sequence[Group], tau_ns: int) -> tuple[int, ...]:
    """The nodes before which to cut, so that no segment of several groups takes longer than `tau_ns`."""
    bounds: list[int] = []
    length_ns = 0
    for group in groups:
        if length_ns and length_ns + group.ns > tau_ns:
            bounds.append(group.begin)
            length_ns = 0
        length_ns += group.ns
    return tuple(bounds)


def halved(groups: Sequence[Group], longest_ns: int) -> list[tuple[int, int]]:
    """The places (begin, end) of `groups`, those halved that take longer than `longest_ns` and can be."""
    places: list[tuple[int, int]] = []
    last = groups[-1].end - _TAIL
    for group in groups:
        middle = min(max((group.begin + group.end) // 2, _HEAD), last)
        if group.ns > longest_ns and group.begin < middle < group.end:
            places += [(group.begin, middle), (middle, group.end)]
        else:
            places.append((group.begin, group.end))
    return places


@dataclass(frozen=True, slots=True)
class Aim:
    """What is expected of urgent requests: their part of the GPU time (0 to 1), and their SLO."""

    share: float = 0.5
    slo_ns: int = 10 * NS_PER_MS

    def loss(self, slower: float, wait_ns: float) -> float:
        """What boundaries cost; see the head of this file."""
        return (1 - self.share) * slower + self.share * wait_ns / self.slo_ns


class Choice(NamedTuple):
    """A cut, and what its boundaries cost."""

    loss: float
    cut: Cut


def waiting_ns(segment_ns: Sequence[int], in_flight: int) -> float:
    """The mean time from a random moment of a run until those of its segments have ended that are in flight."""
    whole_ns = sum(segment_ns)
    waits = 0.0
    for place, ns in enumerate(segment_ns):
        waits += ns * (ns / 2 + sum(segment_ns[place + 1 : place + in_flight]))
    return waits / whole_ns


def chosen(
    bounds: tuple[int, ...],
    times: Sequence[int],
    bubble_ns: int,
    wish: Wish,
    *,
    whole_ns: int,
    aim: Aim,
) -> Choice | None:
    """How segments that took `times` back to back are best run; None if they are too slow.

    A boundary costs `bubble_ns` more with one in flight. A boundary that was asked for is had in any case.
    """
    behind_ns = (sum(times) - whole_ns) / len(bounds)
    most = SLOWER_WHERE_COSTLY if behind_ns >= COSTLY_NS else SLOWER
    found: list[Choice] = []
    for in_flight, bubble in ((1, bubble_ns), (2, 0)):
        asked = wish.in_flight in (0, in_flight)
        forced = wish.boundary_ns and in_flight == (wish.in_flight or 2)
        slower = (behind_ns + bubble) * len(bounds) / whole_ns
        if asked and (forced or slower <= most):
            cut = Cut(bounds, tuple(times), in_flight, bubble)
            found.append(Choice(aim.loss(slower, waiting_ns(times, in_flight)), cut))
    return min(found, key=lambda choice: choice.loss, default=None)


class Cutter:
    """Cuts classes of programs that run on `stream`. In the background thread."""

    def __init__(
        self, driver: Driver, background: Yielding, stream: Stream, gate: Gate, aim: Aim
    ) -> None:
        self._driver, self._background, self._stream = driver, background, stream
        self._aim, self._ended = aim, driver.event()
        self._watch = Stopwatch(driver, background, stream, gate)

    def cut(
        self, program: RecordedProgram, of: Class, wish: Wish, weights: Block, *, whole_ns: int
    ) -> str:
        """Make a captured class run in segments; returns why it does not, empty if it does.

        `weights` are those that it is measured with; `whole_ns` is its exec time. Raises OutOfDeviceMemory.
        """
        copies = [(program.active, weights.address, program.weights_bytes)]
        if program.steps:
            return self._cut_steps(program, of, wish, copies, whole_ns)
        wholes = program.whole_runs(of)
        chains = [self._driver.chain(whole.captured) for whole in wholes]
        first = chains[0] if chains else None
        if first is None or any(each is None or len(each) != len(first) for each in chains):
            return "its graph is not one chain"

        @contextmanager
        def made(bounds: tuple[int, ...]) -> Iterator[SegmentedRun]:
            run = SegmentedRun(self._driver, wholes[0], first, bounds)
            try:
                yield run
            finally:
                run.close()

        try:
            groups = self._groups(wholes[0], first, whole_ns)
            cut = self._chosen(wholes[0], groups, wish, copies, whole_ns, made)
            if cut is None:
                return _TOO_SLOW
            runs: list[SegmentedRun] = []
            for whole, chain in zip(wholes, chains, strict=True):
                assert chain is not None
                runs.append(SegmentedRun(self._driver, whole, chain, cut.bounds))
        except ValueError as error:
            return str(error)
        if not self._same(program.sets(of), wholes, runs, copies):
            for run in runs:
                run.close()
            return "its segments answer otherwise than the whole graph"
        program.run_in_segments(of, cut, runs)
        return ""

    def _cut_steps(
        self, program: RecordedProgram, of: Class, wish: Wish, copies: Copies, whole_ns: int
    ) -> str:
        """The same for a program in steps: it is cut between its parts, of which the steps take the same."""
        runs = program.stepped_runs(of)
        if not runs:
            return "it is not a CUDA graph"

        @contextmanager
        def made(bounds: tuple[int, ...]) -> Iterator[SteppedRun]:
            runs[0].cut(bounds)
            yield runs[0]

        runs[0].aim(copies)
        parts_ns = self._watch.parts(runs[0].parts, whole_ns)
        groups = [Group(place, place + 1, ns) for place, ns in enumerate(parts_ns)]
        if parts_ns[1] >= LONG_STEP_NS:
            cut = self._at_each_step(groups, wish, made)
        else:
            cut = self._chosen(runs[0], groups, wish, copies, whole_ns, made)
        if cut is None:
            return _TOO_SLOW
        program.run_in_steps(of, cut)
        return ""

    def _at_each_step(
        self,
        groups: Sequence[Group],
        wish: Wish,
        made: Callable[[tuple[int, ...]], AbstractContextManager[SteppedRun]],
    ) -> Cut | None:
        """The cut where steps are so long that boundaries cost next to nothing: nothing is run whole for it."""
        bounds = bounds_of(groups, wish.boundary_ns or TAUS_NS[0])
        if not bounds:
            return None
        times = [
            sum(group.ns for group in groups[begin:end])
            for begin, end in pairwise((0, *bounds, len(groups)))
        ]
        with made(bounds) as run:
            bubble_ns = self._bubble_ns(run.launches, times, times[0] + times[1])
        choice = chosen(bounds, times, bubble_ns, wish, whole_ns=sum(times), aim=self._aim)
        return None if choice is None else choice.cut

    # ----------------------------------------------------------------------------- measuring

    def _groups(self, whole: GraphRun, chain: Sequence[Any], whole_ns: int) -> list[Group]:
        """Groups of nodes with their times, the long ones halved."""
        size = max(1, -(-len(chain) // _GROUPS))
        last = len(chain) - max(size, _TAIL)
        places = list(pairwise((0, *range(max(size, _HEAD), last + 1, size), len(chain))))
        made: dict[tuple[int, int], Graph] = {}
        try:
            for turn in range(_ROUNDS):
                for place in places:
                    if place not in made:
                        made[place] = self._driver.segment(
                            whole.captured, chain, *place, whole.active
                        )
                times = self._watch.each([made[place].launch for place in places], whole_ns)
                boundary_ns = max(0, sum(times) - whole_ns) // len(places)
                groups = [
                    Group(*place, max(1, ns - boundary_ns))
                    for place, ns in zip(places, times, strict=True)
                ]
                finer = halved(groups, TAUS_NS[0] // 2)
                if finer == places or len(finer) > _MOST_GROUPS or turn == _ROUNDS - 1:
                    break
                places = finer
            return groups
        finally:
            for graph in made.values():
                graph.close()

    def _chosen(
        self,
        whole: GraphRun | SteppedRun,
        groups: Sequence[Group],
        wish: Wish,
        copies: Copies,
        whole_ns: int,
        made: Callable[[tuple[int, ...]], AbstractContextManager[SegmentedRun | SteppedRun]],
    ) -> Cut | None:
        """The cut with the least loss; `made` makes a run in segments for as long as it is measured."""
        bubble_ns: int | None = None
        best: Choice | None = None
        worse = 0
        tried: set[tuple[int, ...]] = set()
        for tau_ns in (wish.boundary_ns,) if wish.boundary_ns else TAUS_NS:
            bounds = bounds_of(groups, tau_ns)
            if not bounds:
                break
            if bounds in tried or len(bounds) >= _MOST_GROUPS:
                continue
            tried.add(bounds)
            with made(bounds) as run:
                run.aim(copies)
                whole.aim(copies)
                alone_ns, times = self._compared(whole, run, whole_ns)
                if bubble_ns is None:  # it is the host's, so one measurement serves all
                    bubble_ns = self._bubble_ns(run.launches, times, whole_ns)
            choice = chosen(bounds, times, bubble_ns, wish, whole_ns=alone_ns, aim=self._aim)
            if choice is None:
                continue
            if best is None or choice.loss < best.loss:
                best, worse = choice, 0
            else:
                worse += 1
            # Longer segments mean fewer boundaries and longer waiting: past the best they cost more and more.
            if worse == _WORSE or self._aim.loss(0.0, waiting_ns(times, 1)) >= best.loss:
                break
        return best.cut if best is not None else None

    def _compared(
        self, whole: GraphRun | SteppedRun, run: SegmentedRun | SteppedRun, whole_ns: int
    ) -> tuple[int, list[int]]:
        """What the whole graph takes, and each segment, ns, as if the GPU's clock were the same for both.

        They run by turns: a GPU that becomes warmer, and slower, within a second would hide what boundaries
        cost, which is about as much.
        """
        wholes = [sum(self._watch.once([whole.launch], whole_ns))]
        segments, longer = [], []
        for _ in range(runs_for(whole_ns)):
            segments.append(self._watch.once(run.launches, whole_ns))
            wholes.append(sum(self._watch.once([whole.launch], whole_ns)))
            longer.append(sum(segments[-1]) - (wholes[-1] + wholes[-2]) / 2)
        times = medians(segments)
        return max(1, sum(times) - round(median(longer))), times

    def _bubble_ns(
        self, launches: Sequence[Callable[[Stream], None]], times: Sequence[int], for_ns: int
    ) -> int:
        """What a boundary costs more when the next segment is launched once the one before has ended."""
        count = max(2, min(_ONE_BY_ONE, len(launches), _ONE_BY_ONE_NS // max(times)))
        costs = []
        for _ in range(_RUNS):
            took_ns = self._watch.one_by_one(launches[:count], for_ns)
            costs.append((took_ns - sum(times[:count])) / (count - 1))
        return max(0, round(median(costs)))

    # -------------------------------------------------------------------------- right answers

    def _same(
        self,
        sets: Sequence[BufferSet],
        wholes: Sequence[GraphRun],
        runs: Sequence[SegmentedRun],
        copies: Copies,
    ) -> bool:
        """True if segments answer byte for byte as the whole graphs do.

        A graph that does not repeat its own answers is therefore not cut.
        """
        return all(
            self._answer(buffers, whole, copies) == self._answer(buffers, run, copies)
            for buffers, whole, run in zip(sets, wholes, runs, strict=True)
        )

    def _answer(
        self,
        buffers: BufferSet,
        run: GraphRun | SegmentedRun,
        copies: Copies,
    ) -> bytes:
        driver, stream, ended = self._driver, self._stream, self._ended
        host = buffers.staged_out.host
        assert host is not None
        nbytes = buffers.row_out * buffers.batch
        with self._watch.alone():
            run.aim(copies)
            run.launch(stream)
            driver.copy(buffers.staged_out.address, buffers.output, nbytes, stream)
            driver.record(ended, stream)
        while not driver.done(ended):
            self._background.pause()
        return host[:nbytes].tobytes()
