"""Runs in equal steps (stepped.py): three captured parts, the middle one launched once for each step.

    begin   the event `started`, the copy of the weights, the inputs -> the state
    step    the state -> the state, as often as the model says
    finish  the state -> the output, the event `ended`

The state is memory of the buffer set's own. So nothing of a run lies in the graph pool between two parts, and
the same graph may be launched again and again. A part is to segments what a node is to those of a whole graph
(segments.py): a run can be interrupted between two of them.

Where it should be interrupted within a part too, the part is in pieces: its graph is a chain, and each piece a
graph of some of its nodes. Those of the step are made once, and launched again for each step. Between two
pieces of one part the run keeps things in the graph pool, as between the segments of a whole graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Generic, NamedTuple, Self, TypeVar

from slosched.daemon.backends.cuda.driver import Driver, Graph, Stream
from slosched.daemon.backends.cuda.program import Copies
from slosched.daemon.backends.cuda.runs import GraphRun
from slosched.daemon.backends.cuda.segments import SegmentedRun

Launch = Callable[[Stream], None]
T = TypeVar("T")


class Parts(NamedTuple, Generic[T]):
    """Something of each part of a run."""

    begin: T
    step: T
    finish: T


class Pieces:
    """A captured part in which no copy is aimed: one graph, or several of its nodes, in order."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = graphs
        self.launches: Sequence[Launch] = [graph.launch for graph in graphs]

    @classmethod
    def cut(
        cls, driver: Driver, captured: Any, chain: Sequence[Any], bounds: Sequence[int]
    ) -> Self:
        """The part cut before the nodes `bounds` of its `chain`. Raises OutOfDeviceMemory."""
        graphs: list[Graph] = []
        try:
            for begin, end in pairwise((0, *bounds, len(chain))):
                graphs.append(driver.segment(captured, chain, begin, end, None))
        except BaseException:
            for graph in graphs:
                graph.close()
            raise
        return cls(graphs)

    def close(self) -> None:
        for graph in self._graphs:
            graph.close()


class SteppedRun:
    """A run of `begin`, `steps` times `step`, and `finish`, which records `ended`.

    `captured` is what each part's graph was made of.
    """

    def __init__(
        self,
        begin: GraphRun | SegmentedRun,
        step: Pieces,
        finish: Pieces,
        steps: int,
        captured: Parts[Any],
    ) -> None:
        self.begin, self.step, self.finish = begin, step, finish
        self.steps, self.captured = steps, captured
        self.started, self.ended = begin.started, begin.ended
        first = begin.launches if isinstance(begin, SegmentedRun) else [begin.launch]
        #: Launches each piece of each part, in order.
        self.pieces: Parts[Sequence[Launch]] = Parts(first, step.launches, finish.launches)
        #: Launches each piece of the run, in order: each part, unless it is in pieces.
        self.parts: tuple[Launch, ...] = self._launches_of(steps)
        #: Launches each segment, in order: all parts in one until it is cut.
        self.launches: list[Launch] = [self.launch]

    def _launches_of(self, steps: int) -> tuple[Launch, ...]:
        begin, step, finish = self.pieces
        return (*begin, *[*step] * steps, *finish)

    def cut(self, bounds: Sequence[int]) -> None:
        """Make segments of it that begin with those of its `parts`."""
        self.launches = [
            partial(launch_all, self.parts[begin:end])
            for begin, end in pairwise((0, *bounds, len(self.parts)))
        ]

    def in_pieces(
        self, driver: Driver, chains: Parts[Any], bounds: Parts[tuple[int, ...]]
    ) -> SteppedRun:
        """The same run, whose parts are cut before the nodes `bounds` of their `chains`.

        Parts without bounds are shared. Only of a run whose parts are whole. Raises as SegmentedRun does.
        """
        assert isinstance(self.begin, GraphRun)
        begin: GraphRun | SegmentedRun = self.begin
        step, finish = self.step, self.finish
        try:
            if bounds.begin:
                begin = SegmentedRun(driver, self.begin, chains.begin, bounds.begin)
            if bounds.step:
                step = Pieces.cut(driver, self.captured.step, chains.step, bounds.step)
            if bounds.finish:
                finish = Pieces.cut(driver, self.captured.finish, chains.finish, bounds.finish)
        except BaseException:
            SteppedRun(begin, step, finish, self.steps, self.captured).close(but=self)
            raise
        return SteppedRun(begin, step, finish, self.steps, self.captured)

    def aim(self, copies: Copies) -> None:
        self.begin.aim(copies)

    def launch(self, stream: Stream, *, steps: int = 0) -> None:
        """Launch it all; with `steps`, at most this number of its steps."""
        launch_all(self._launches_of(min(self.steps, steps or self.steps)), stream)

    def close(self, *, but: SteppedRun | None = None) -> None:
        """It runs no more; what it shares with `but` stays."""
        kept = () if but is None else (but.begin, but.step, but.finish)
        for each in (self.begin, self.step, self.finish):
            if each not in kept:
                each.close()


def launch_all(parts: Sequence[Launch], stream: Stream) -> None:
    for launch in parts:
        launch(stream)
