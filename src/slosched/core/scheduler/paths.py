"""The latency to and from each worker, as predicted, and the least there is."""

from __future__ import annotations

from slosched.config import LOST_AFTER_NS
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.state import Worker, WorkerState

#: A longer latency than this was a pause of one of the two processes, and would teach something wrong.
_LONGEST_NS = LOST_AFTER_NS
#: A heartbeat counts as this number of measurements where nothing else tells that a path is quick again.
_ALONE = 10
#: It is: what is expected is more than this number of times what the heartbeat took.
_QUICKER = 2


class Paths:
    """Predicted latencies of all workers; a worker whose prediction moves goes into the change feed."""

    def __init__(self, workers: dict[int, Worker], changes: Changes) -> None:
        self._workers, self._changes = workers, changes
        #: The least expected latency to a worker with GPUs in use, and back; 0 if there is none.
        self.least_transit_ns = 0
        self.least_returns_ns = 0
        self._nearest: Worker | None = None  # the worker with the least latency to it,
        self._quickest: Worker | None = None  # and the one with the least latency back
        #: By worker: whether an action was measured since its last heartbeat, and the refusals until then.
        self._measured: dict[int, bool] = {}
        self._refused: dict[int, int] = {}

    def beat(self, worker: Worker, delay_ns: int, *, refused: int) -> None:
        """A heartbeat took `delay_ns`; `refused` requests could not start in time so far.

        It tells what the wire and both loops cost while no Infer does. Without it a path once found slow would
        stay so: nothing would be sent there, and nothing learnt. While requests are refused and nothing is
        sent to the worker, few heartbeats outweigh what a moment's stall has taught; else they count as what
        they are, since a large output takes longer than a heartbeat.
        """
        number = worker.worker_id
        measured, self._measured[number] = self._measured.get(number, False), False
        before, self._refused[number] = self._refused.get(number, refused), refused
        expected_ns = max(worker.transit.expected_ns, worker.returns.expected_ns)
        alone = not measured and refused > before and expected_ns > _QUICKER * delay_ns
        for _ in range(_ALONE if alone else 1):
            self._learn(worker, delay_ns, delay_ns)

    def learn(self, worker: Worker, *, there_ns: int, back_ns: int) -> None:
        """Take one measurement, by an action, of the latency to `worker` and of the latency back."""
        self._measured[worker.worker_id] = True
        self._learn(worker, there_ns, back_ns)

    def _learn(self, worker: Worker, there_ns: int, back_ns: int) -> None:
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
