"""What the published INFER4 and INFER5 share: a tracker for each GPU, demand for weights, scaled estimates.

A policy adds its queues and its choice. Requests of a failed action fail: nothing is planned anew.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.published.deadlines import internal_slos_ns
from slosched.core.scheduler.policies.published.loads import PaperLoads
from slosched.core.scheduler.policies.published.tracker import (
    DEFAULT_CLOCK_MHZ,
    FUTURE_NS,
    ExecutorTracker,
    PaperEstimator,
)
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request


class Estimators(Protocol):
    """A model's queue, as far as this file needs it."""

    estimators: dict[int, PaperEstimator]  # by batch size


_Queue = TypeVar("_Queue", bound=Estimators)


def estimators_of(model: Instance) -> dict[int, PaperEstimator]:
    """An estimator for each batch size of `model`, ascending, started from its first worker's profile."""
    assert model.result is not None
    seeds = dict(zip(model.result.batch_sizes, model.result.exec_ns, strict=True))
    return {batch: PaperEstimator(seeds[batch]) for batch in sorted(seeds)}


class Tracked(Generic[_Queue]):
    """Trackers, loads and estimators; `_queues` has an entry for each model that was ever asked for."""

    replans = False

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        assert cluster.config.schedule_ahead_ns is not None
        self._ahead_ns = cluster.config.schedule_ahead_ns
        self._loads = self._make_loads()
        self._queues: dict[int, _Queue] = {}  # by model id
        self._trackers: dict[int, ExecutorTracker] = {}  # by GPU index
        self._timeouts = ExpiryHeap()  # by internal deadline
        self._now_ns = 0

    def _make_loads(self) -> PaperLoads:
        return PaperLoads(self._cluster, ahead_ns=self._ahead_ns)

    def _demand_left(self, request: Request) -> int | None:
        """The request's action ended: its demand for exec time, which is forgotten; None if none is left."""
        raise NotImplementedError

    def _weights_arrived(self, gpu: Gpu, model: Instance) -> None:
        """A load of `model` ended on `gpu`."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- facts

    def _terms(self, request: Request, queue: _Queue) -> tuple[int, int, int]:
        """(internal deadline, demand for exec time, demand for loads) of `request`, all ns."""
        single_ns = queue.estimators[1].estimate_ns()
        exec_slo_ns, weights_slo_ns = internal_slos_ns(
            request.slo_ns,
            single_ns=single_ns,
            transfer_ns=self._loads.transfer_ns(request.instance),
            ahead_ns=self._ahead_ns,
        )
        work_ns = single_ns * self._cluster.config.default_slo_ns
        return request.arrival_ns + exec_slo_ns, work_ns // exec_slo_ns, work_ns // weights_slo_ns

    def gpu_added(self, gpu: Gpu) -> None:
        self._trackers[gpu.index] = ExecutorTracker()
        self._loads.gpu_added(gpu)

    def gpu_removed(self, gpu: Gpu) -> None:
        self._trackers.pop(gpu.index, None)
        self._loads.gpu_removed(gpu)

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        """Weights move only by demand."""

    def settled(self, model: Instance) -> bool:
        return True

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        gpu, model, ok = action.gpu, action.instance, code == Code.OK
        for request in action.requests:
            exec_ns = self._demand_left(request)
            if exec_ns is not None:
                self._loads.add(model, -exec_ns, 0)
        tracker = self._trackers.get(gpu.index)
        if tracker is None:
            return
        if action.requests:
            tracker.done(action.action_id, end_ns, ok=ok)
            if ok:
                tracker.set_clock(gpu.clock_mhz)
                estimator = self._queues[model.model_id].estimators[action.batch_class]
                estimator.add(duration_ns, clock_mhz or DEFAULT_CLOCK_MHZ)
        elif duration_ns > 0 or not ok:
            self._loads.load_done(gpu, model, action.action_id, end_ns, duration_ns, ok=ok)
            if ok and model.model_id in self._queues:
                self._weights_arrived(gpu, model)

    # ----------------------------------------------------------------------------- decisions

    def _commit(
        self,
        gpu: Gpu,
        model: Instance,
        requests: list[Request],
        batch: int,
        *,
        start_ns: int,
        now_ns: int,
    ) -> None:
        """Send `requests`, which left their queues, as a batch of class `batch`."""
        self._loads.used(model)
        estimator = self._queues[model.model_id].estimators[batch]
        duration_ns = estimator.estimate_ns(gpu.clock_mhz or DEFAULT_CLOCK_MHZ)
        action = self._cluster.send_infer(
            gpu,
            requests,
            batch,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=duration_ns,
            latest_ns=max(now_ns + FUTURE_NS, start_ns) + self._ahead_ns,
        )
        self._trackers[gpu.index].add(action.action_id, duration_ns, now_ns)

    def _next_ns(self, waiting: dict[int, bool]) -> int | None:
        """When to plan next; `waiting` says for each GPU index whether anything could be sent there.

        What could have been done by now was done in `plan`: a past time is no reason to wake.
        """
        times = [self._timeouts.next_ns(), self._loads.next_wakeup_ns()]
        for index, waits in waiting.items():
            if waits:
                opens_ns = self._trackers[index].opens_ns(self._ahead_ns)
                times.append(opens_ns if opens_ns > self._now_ns else None)
        return min((ns for ns in times if ns is not None), default=None)
