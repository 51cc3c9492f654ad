"""The ways to and from the workers: what is learnt of them, and the shortest there is."""

from __future__ import annotations

from collections.abc import Callable

from slosched.core.scheduler.state import Worker, WorkerState


class _Least:
    """The least of one prediction over the workers in use; found anew only when its owner's rose."""

    __slots__ = ("_of", "_owner", "_value_ns", "_workers")

    def __init__(self, workers: dict[int, Worker], of: Callable[[Worker], int]) -> None:
        self._workers = workers
        self._of = of
        self._owner: Worker | None = None
        self._value_ns: int | None = None  # None: to be found anew

    def forget(self) -> None:
        self._value_ns = None

    def moved(self, worker: Worker) -> None:
        value_ns = self._of(worker)
        if self._value_ns is not None and value_ns <= self._value_ns:
            self._value_ns, self._owner = value_ns, worker
        elif worker is self._owner:
            self._value_ns = None

    def value_ns(self) -> int:
        value_ns = self._value_ns
        if value_ns is None:
            used = [w for w in self._workers.values() if w.gpus and w.state is WorkerState.JOINED]
            self._owner = min(used, key=self._of, default=None)
            value_ns = self._value_ns = self._of(self._owner) if self._owner else 0
        return value_ns


class Paths:
    """Predictions of all ways. `on_change` are told of each worker whose own did."""

    def __init__(self, workers: dict[int, Worker]) -> None:
        self.on_change: list[Callable[[Worker], None]] = []
        self._transit = _Least(workers, lambda worker: worker.transit.expected_ns)
        self._returns = _Least(workers, lambda worker: worker.returns.expected_ns)

    def least_transit_ns(self) -> int:
        """The shortest expected way to a worker with GPUs in use; 0 if there is none."""
        return self._transit.value_ns()

    def least_returns_ns(self) -> int:
        """The shortest expected way back."""
        return self._returns.value_ns()

    def learn(self, worker: Worker, *, there_ns: int, back_ns: int) -> None:
        """Take one measurement of the way to `worker` and of the way back."""
        if worker.learn_path(there_ns=there_ns, back_ns=back_ns):
            self._transit.moved(worker)
            self._returns.moved(worker)
            for told in self.on_change:
                told(worker)

    def workers_changed(self) -> None:
        """GPUs came or went."""
        self._transit.forget()
        self._returns.forget()
