"""Where a captured class is cut into segments, and how many of them are in flight: measured in preparation.

Equal numbers of nodes are not equal times, so groups of nodes are timed first, and those that take long are
halved. Segments are then put together from groups, none longer than tau (but for a group of one node). What
the boundaries cost is measured on the segments themselves: back to back, as with two in flight, and with the
host in between, as with one. choice.py says which cut is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from slosched.daemon.backends.cuda.background import Yielding
from slosched.daemon.backends.cuda.choice import (
    LONG_STEP_NS,
    TAUS_NS,
    TOO_SLOW,
    Aim,
    Choice,
    Wish,
    chosen,
    waiting_ns,
)
from slosched.daemon.backends.cuda.cutting_parts import PartCutter
from slosched.daemon.backends.cuda.driver import Block, Driver, Graph, Stream
from slosched.daemon.backends.cuda.groups import Group, aimed_segment, bounds_of, timed_groups
from slosched.daemon.backends.cuda.program import BufferSet, Class, Copies, Cut
from slosched.daemon.backends.cuda.recorded import RecordedProgram
from slosched.daemon.backends.cuda.runs import GraphRun
from slosched.daemon.backends.cuda.segments import Gate, SegmentedRun
from slosched.daemon.backends.cuda.steps import SteppedRun
from slosched.daemon.backends.cuda.timing import MOST_TIMED, Stopwatch, medians, runs_for

#: Taus that cost more than the best one, after which no longer one is tried.
_WORSE = 2


class Cutter:
    """Cuts classes of programs that run on `stream`. In the background thread."""

    def __init__(
        self, driver: Driver, background: Yielding, stream: Stream, gate: Gate, aim: Aim
    ) -> None:
        self._driver, self._background, self._stream = driver, background, stream
        self._aim, self._ended = aim, driver.event()
        self._watch = Stopwatch(driver, background, stream, gate)
        self._parts = PartCutter(driver, background, stream, self._watch, aim)

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
            groups = self._groups(wholes[0], first, copies, whole_ns)
            cut = self._chosen(wholes[0], groups, wish, copies, whole_ns, made)
            if cut is None:
                return TOO_SLOW
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
        """The same for a program in steps: it is cut between its parts, of which the steps take the same.

        Parts that take longer than the wish says are cut too (cutting_parts.py); if they cannot be, the cut's
        note says why.
        """
        runs = program.stepped_runs(of)
        if not runs:
            return "it is not a CUDA graph"

        @contextmanager
        def made(bounds: tuple[int, ...]) -> Iterator[SteppedRun]:
            runs[0].cut(bounds)
            yield runs[0]

        runs[0].aim(copies)
        times = self._watch.steps(runs[0], whole_ns)
        why_whole = ""
        if wish.part_ns and max(times.parts_ns) > wish.part_ns:
            why_whole = self._parts.cut(program, of, wish, copies, times)
            if not why_whole:
                return ""
            why_whole = f"between its parts alone: {why_whole}"
        groups = [Group(place, place + 1, ns) for place, ns in enumerate(times.all)]
        if times.parts_ns[1] >= LONG_STEP_NS:
            cut = self._at_each_step(groups, wish, made)
        else:
            cut = self._chosen(runs[0], groups, wish, copies, whole_ns, made)
        if cut is None:
            return TOO_SLOW
        program.run_in_steps(of, replace(cut, note=why_whole))
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
            bubble_ns = self._watch.bubble_ns(run.launches, times, times[0] + times[1])
        choice = chosen(bounds, times, bubble_ns, wish, whole_ns=sum(times), aim=self._aim)
        return None if choice is None else choice.cut

    # ----------------------------------------------------------------------------- measuring

    def _groups(
        self, whole: GraphRun, chain: Sequence[Any], copies: Copies, whole_ns: int
    ) -> list[Group]:
        def segment(begin: int, end: int) -> Graph:
            return aimed_segment(self._driver, whole.captured, chain, begin, end, copies)

        longest_ns = TAUS_NS[0] // 2
        return timed_groups(self._watch, segment, len(chain), whole_ns, longest_ns=longest_ns)

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
            if bounds in tried or len(bounds) >= MOST_TIMED:
                continue
            tried.add(bounds)
            with made(bounds) as run:
                run.aim(copies)
                whole.aim(copies)
                alone_ns, times = self._compared(whole, run, whole_ns)
                if bubble_ns is None:  # it is the host's, so one measurement serves all
                    bubble_ns = self._watch.bubble_ns(run.launches, times, whole_ns)
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
