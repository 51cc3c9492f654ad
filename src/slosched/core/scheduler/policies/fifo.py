"""FIFO: the oldest request first, batched with whatever of its model waits. No deadlines.

The baseline of a server that knows neither execution times nor deadlines: nothing is refused, and
under overload everything is late. When an Infer may be sent, and which weights are loaded, is decided
as for INFER5 (openings.py, placement.py); models that do not fit together take turns (turns.py).
"""

from __future__ import annotations

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.openings import Openings
from slosched.core.scheduler.placement import Placement
from slosched.core.scheduler.policies.base import (
    LAST_ONE_LOST,
    NOT_OFFERED,
    Refusals,
    is_offered,
)
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request
from slosched.core.scheduler.turns import Turns

_NEVER_NS = 2**62


class Fifo:
    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._openings = Openings(cluster)
        self._placement = Placement(cluster)
        self._turns = Turns(cluster)
        self._waiting: dict[int, Model] = {}  # models with queued requests
        self._now_ns = 0

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.model
        if not is_offered(self._cluster, model):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
            return
        self._placement.asked_for(model, now_ns=now_ns)
        # Arrival order; a request that comes back from a failed action keeps its place.
        position = len(model.queue)
        while position > 0 and model.queue[position - 1].key > request.key:
            position -= 1
        model.queue.insert(position, request)
        self._waiting[model.model_id] = model

    def forget(self, request: Request) -> None:
        request.model.queue.remove(request)
        if not request.model.queue:
            self._waiting.pop(request.model.model_id, None)

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        if self._waiting:
            for start_ns, _, gpu in self._openings.open_gpus(now_ns):
                kept_for = self._turns.kept_for(gpu)
                ready = [
                    model
                    for model in self._waiting.values()
                    if model.model_id in gpu.resident and kept_for in (None, model)
                ]
                if ready:
                    self._commit(gpu, min(ready, key=lambda m: m.queue[0].key), start_ns, now_ns)
        absent = [m.queue[0] for m in self._waiting.values() if not m.resident_on]
        self._turns.plan(absent, now_ns=now_ns)
        self._placement.plan(now_ns=now_ns)

    def _commit(self, gpu: Gpu, model: Model, start_ns: int, now_ns: int) -> None:
        table = gpu.exec_table(model)
        batch_class = table.class_for(len(model.queue))
        requests = model.queue[:batch_class]
        del model.queue[:batch_class]
        if not model.queue:
            del self._waiting[model.model_id]
        self._cluster.send_infer(
            gpu,
            requests,
            batch_class,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=table.estimators[batch_class].expected_ns,
            latest_ns=_NEVER_NS,
        )

    def next_wakeup_ns(self) -> int | None:
        return self._openings.next_opening_ns(self._now_ns) if self._waiting else None

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        """The cluster's own predictions are enough."""

    def gpu_added(self, gpu: Gpu) -> None:
        """Nothing is kept per GPU."""

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)
        for model in list(self._waiting.values()):
            if is_offered(self._cluster, model):
                continue
            for request in list(model.queue):
                self.forget(request)
                self._refusals.refuse(request, Code.CANCELLED, LAST_ONE_LOST)

    def model_loaded(self, model: Model, gpus: list[Gpu], *, now_ns: int) -> None:
        self._placement.model_loaded(model, gpus)

    def settled(self, model: Model) -> bool:
        return self._placement.settled(model)
