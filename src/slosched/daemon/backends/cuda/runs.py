"""How a batch class runs: as one CUDA graph, weights included, or by plain execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from slosched.daemon.backends.cuda.driver import Driver, Event, Graph, Stream
from slosched.daemon.backends.cuda.program import Copies

_PAD = 256
#: Scratch bytes after the active weights: the copy target of a graph whose weights are already in place.
PAD_BYTES = 3 * _PAD


class Run(Protocol):
    """One buffer set's way to run; `started` and `ended` lie round copies and model."""

    @property
    def started(self) -> Event: ...

    @property
    def ended(self) -> Event: ...

    def aim(self, copies: Copies) -> None: ...

    def launch(self, stream: Stream) -> None: ...

    def close(self) -> None:
        """It runs no more."""


class GraphRun:
    """A captured run: started, a copy of the weights to `active`, the model, ended.

    The copy is aimed at one run of the cache's pages, which is all of an instance's weights nearly
    always; further runs are copied before the launch.
    """

    def __init__(
        self,
        driver: Driver,
        graph: Graph,
        captured: Any,
        active: int,
        weights_bytes: int,
        started: Event,
        ended: Event,
    ) -> None:
        self._driver, self._graph = driver, graph
        #: What the graph was made of, of which segments can be made too.
        self.captured, self.active, self.weights_bytes = captured, active, weights_bytes
        self.started, self.ended = started, ended
        end = active + weights_bytes
        begin = -(-end // _PAD) * _PAD
        self._nothing = (begin + _PAD, begin, _PAD)
        self._aimed: tuple[int, int, int] | None = None
        self._more: Copies = ()

    def aim(self, copies: Copies) -> None:
        first = copies[0] if copies else self._nothing
        if first != self._aimed:
            self._graph.aim(*first)
            self._aimed = first
        self._more = copies[1:]

    def launch(self, stream: Stream) -> None:
        for to, source, nbytes in self._more:
            self._driver.copy(to, source, nbytes, stream)
        self._graph.launch(stream)

    def close(self) -> None:
        self._graph.close()


class PlainRun:
    """`run(stream)` launches the model's kernels one by one, from Python."""

    def __init__(self, driver: Driver, run: Callable[[Stream], None]) -> None:
        self._driver, self._run = driver, run
        self.started, self.ended = driver.event(), driver.event()
        self._copies: Copies = ()

    def aim(self, copies: Copies) -> None:
        self._copies = copies

    def launch(self, stream: Stream) -> None:
        self._driver.record(self.started, stream)
        for to, source, nbytes in self._copies:
            self._driver.copy(to, source, nbytes, stream)
        self._run(stream)
        self._driver.record(self.ended, stream)

    def close(self) -> None:
        pass
