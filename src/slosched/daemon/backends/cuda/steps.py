"""Runs in equal steps (stepped.py): three captured parts, the middle one launched once for each step.

    begin   the event `started`, the copy of the weights, the inputs -> the state
    step    the state -> the state, as often as the model says
    finish  the state -> the output, the event `ended`

The state is memory of the buffer set's own. So nothing of a run lies in the graph pool between two parts, and
the same graph may be launched again and again. A part is to segments what a node is to those of a whole graph
(segments.py): a run can be interrupted between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from slosched.daemon.backends.cuda.driver import Event, Graph, Stream
from slosched.daemon.backends.cuda.program import Copies
from slosched.daemon.backends.cuda.runs import GraphRun

Launch = Callable[[Stream], None]


class SteppedRun:
    """A run of `begin`, `steps` times `step`, and `finish`, which records `ended`."""

    def __init__(
        self, begin: GraphRun, step: Graph, finish: Graph, steps: int, ended: Event
    ) -> None:
        self._begin, self._later, self._steps = begin, (step, finish), steps
        self.started, self.ended = begin.started, ended
        #: Launches each part, in order.
        self.parts: tuple[Launch, ...] = (begin.launch, *[step.launch] * steps, finish.launch)
        #: Launches each segment, in order: all parts in one until it is cut.
        self.launches: list[Launch] = [self.launch]

    def cut(self, bounds: Sequence[int]) -> None:
        """Make segments of it that begin with the parts `bounds`."""
        self.launches = [
            partial(launch_all, self.parts[begin:end])
            for begin, end in pairwise((0, *bounds, len(self.parts)))
        ]

    def aim(self, copies: Copies) -> None:
        self._begin.aim(copies)

    def launch(self, stream: Stream, *, steps: int = 0) -> None:
        """Launch it all; with `steps`, at most this number of its steps."""
        left_out = max(0, self._steps - steps) if steps else 0
        launch_all((*self.parts[: -1 - left_out], self.parts[-1]), stream)

    def close(self) -> None:
        self._begin.close()
        for graph in self._later:
            graph.close()


def launch_all(parts: Sequence[Launch], stream: Stream) -> None:
    for launch in parts:
        launch(stream)
