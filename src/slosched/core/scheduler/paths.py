"""The latency to and from each worker, as predicted, and the least there is."""

from __future__ import annotations

from slosched.config import LOST_AFTER_NS
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.state import Worker, WorkerState

#: A longer latency than this was a pause of one of the two processes, and would teach something wrong.
_LONGEST_NS = LOST_AFTER_NS


class Paths:
    """Predicted latencies of all workers; a worker whose prediction moves goes into the change feed."""

    def __init__(self, workers: dict[int, Worker], changes: Changes) -> None:
        self._workers, self._changes = workers, changes
        #: The least expected latency to a worker with GPUs in use, and back; 0 if there is none.
        self.least_transit_ns = 0
        self.least_returns_ns = 0
        self._nearest: Worker | None = None  # the worker with the least latency to it,
        self._quickest: Worker | None = None  # and the one with the least latency back

    def learn(self, worker: Worker, *, there_ns: int, back_ns: int) -> None:
        """Take one measurement of the latency to `worker` and of the latency back."""
        transit, returns = worker.transit, worker.returns
        moved = 0 <= there_ns < _LONGEST_NS and transit.add(there_ns)
        if 0 <= back_ns < _LONGEST_NS and returns.add(back_ns):
            moved = True
        if not moved:
            return
        transit_ns, returns_ns = transit.expected_ns, returns.expected_ns
        if worker.gpus and transit_ns <= self.least_transit_ns:
            self.least_transit_ns, self._nearest = transit_ns, worker
        elif worker is self._nearest:
            self._find_nearest()
        if worker.gpus and returns_ns <= self.least_returns_ns:
            self.least_returns_ns, self._quickest = returns_ns, worker
        elif worker is self._quickest:
            self._find_quickest()
        self._changes.path(worker)

    def workers_changed(self) -> None:
        """GPUs came or went."""
        self._find_nearest()
        self._find_quickest()

    def _used(self) -> list[Worker]:
        return [w for w in self._workers.values() if w.gpus and w.state is WorkerState.JOINED]

    def _find_nearest(self) -> None:
        worker = min(self._used(), key=lambda w: w.transit.expected_ns, default=None)
        self._nearest = worker
        self.least_transit_ns = worker.transit.expected_ns if worker else 0

    def _find_quickest(self) -> None:
        worker = min(self._used(), key=lambda w: w.returns.expected_ns, default=None)
        self._quickest = worker
        self.least_returns_ns = worker.returns.expected_ns if worker else 0
