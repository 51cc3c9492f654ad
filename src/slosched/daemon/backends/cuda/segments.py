"""Runs in segments: a captured program is one chain of nodes, and so are its parts.

A segment is a clone of the graph without the nodes that lie outside. Launched one behind the other, the
segments give the same bytes as the whole graph. Between two of them a run can be interrupted: it then keeps
what it has in the pool that ordinary graphs share, in the active weights and in its buffers, so none of these
may be written until it has ended. `Gate` says when that is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from slosched.clock import Clock
from slosched.daemon.backends.cuda.driver import Driver, Event, Stream
from slosched.daemon.backends.cuda.program import Copies, Cut
from slosched.daemon.backends.cuda.runs import GraphRun
from slosched.messages import Span
from slosched.units import NS_PER_MS

#: A preparation that has waited for this long is next.
_PATIENCE_NS = 50 * NS_PER_MS


class SegmentedRun:
    """The run of `whole`, cut before the nodes `bounds` of its `chain`. `whole` is not needed for it.

    The first segment has `started` and the copy of the weights, the last one `ended`. Raises ValueError if the
    first segment lacks the copy, and OutOfDeviceMemory.
    """

    def __init__(
        self, driver: Driver, whole: GraphRun, chain: Sequence[Any], bounds: Sequence[int]
    ) -> None:
        self.started, self.ended = whole.started, whole.ended
        active = whole.active
        graphs = []
        try:
            for begin, end in pairwise((0, *bounds, len(chain))):
                graphs.append(driver.segment(whole.captured, chain, begin, end, active))
        except BaseException:
            for graph in graphs:
                graph.close()
            raise
        self._first = GraphRun(
            driver,
            graphs[0],
            whole.captured,
            active,
            whole.weights_bytes,
            whole.started,
            whole.ended,
        )
        #: Launches each segment, in order.
        self.launches: list[Callable[[Stream], None]] = [self._first.launch]
        self.launches += [graph.launch for graph in graphs[1:]]
        self._graphs = graphs

    def aim(self, copies: Copies) -> None:
        self._first.aim(copies)

    def launch(self, stream: Stream) -> None:
        """Launch all segments at once."""
        for launch in self.launches:
            launch(stream)

    def close(self) -> None:
        for graph in self._graphs:
            graph.close()


@dataclass(slots=True, eq=False)
class Progress:
    """How far a run in segments has come. `opened` and `begun_ns` are where its present stretch began."""

    cut: Cut
    launched: int = 0  # segments
    in_flight: deque[Event] = field(
        default_factory=deque
    )  # recorded behind each that has not ended
    opened: Event = None
    begun_ns: int = 0
    stretches: list[Span] = field(default_factory=list)  # those that ended in an interruption

    @property
    def all_launched(self) -> bool:
        return self.launched == len(self.cut.segment_ns)


class Gate:
    """Keeps preparations and runs in segments apart: they share the exec stream, a pool and no order.

    The lane sets `open_run` while segments of a run are still to be launched. Then nothing else may be
    launched that writes to the pool. A preparation launches within `alone`; meanwhile the lane begins no run
    in segments and, if the preparation itself launches segments, no ordinary run at all. Each side says what
    it wants before it looks at the other's flag, and gives way if that is set, so they never both go on.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.open_run = False
        self.preparing = False
        self.preparing_segments = False

    @contextmanager
    def alone(self, pause: Callable[[], None], *, segments: bool) -> Iterator[None]:
        """Within it the caller's launches are not mixed with those of a run in segments.

        It calls `pause` while it waits. A run that is interrupted is waited for to its end.
        """
        give_up_ns = self._clock() + _PATIENCE_NS
        self._take(segments)
        try:
            while self.open_run:
                if self._clock() < give_up_ns:  # later the lane begins no other such run
                    self._give_back()
                pause()
                self._take(segments)
            yield
        finally:
            self._give_back()

    def _take(self, segments: bool) -> None:
        self.preparing, self.preparing_segments = True, segments

    def _give_back(self) -> None:
        self.preparing = self.preparing_segments = False

    def admits(self, *, segments: bool) -> bool:
        """Whether an ordinary run may begin, in `segments` or whole. The lane sets `open_run` before."""
        return not (self.preparing_segments or (segments and self.preparing))
