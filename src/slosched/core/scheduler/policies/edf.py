"""EDF: earliest deadline first, one request at a time. No batches, no execution times.

For each GPU that may be given work (openings.py), in order of its predicted start s:

1. of the requests whose model it holds, the one with the earliest deadline is sent;
2. one whose deadline is not after s is answered instead (code 4): a late start is useless;
3. a request whose deadline passes in the queue is answered then.

Work-conserving and optimal for one processor that is never overloaded (Liu and Layland, JACM 1973;
Dertouzos 1974, for jobs that may be preempted). It knows no execution times, so under overload it
starts what can only end late, and nearly everything is late: the known domino effect.

What waits for weights is loaded by demand (placement.py); one that loses requests gets more GPUs.
"""

from __future__ import annotations

from bisect import insort

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.openings import Openings
from slosched.core.scheduler.placement import Placement
from slosched.core.scheduler.policies.base import (
    LAST_ONE_LOST,
    NOT_OFFERED,
    Refusals,
    is_offered,
)
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request
from slosched.units import format_duration


class Edf:
    """See the head of this file."""

    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._openings = Openings(cluster)
        self._placement = Placement(cluster)
        self._waiting: dict[int, Model] = {}  # models with queued requests
        self._expiry = ExpiryHeap()  # by deadline
        self._now_ns = 0

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.model
        if not is_offered(self._cluster, model):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
            return
        self._placement.asked_for(model, now_ns=now_ns)
        insort(model.queue, request)
        self._waiting[model.model_id] = model
        self._expiry.push(request.deadline_ns, request)

    def forget(self, request: Request) -> None:
        model = request.model
        model.queue.remove(request)
        if not model.queue:
            del self._waiting[model.model_id]

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._placement.plan(now_ns=now_ns)
        while (request := self._expiry.pop_before(now_ns + 1)) is not None:
            self._time_out(request, now_ns)
        if self._waiting:
            for start_ns, _, gpu in self._openings.open_gpus(now_ns):
                self._serve(gpu, start_ns, now_ns)

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        while ready := [m.queue[0] for m in self._waiting.values() if m.model_id in gpu.resident]:
            request = min(ready)
            if request.deadline_ns <= start_ns:
                self._time_out(request, now_ns)
                continue
            self.forget(request)
            table = gpu.exec_table(request.model)
            self._cluster.send_infer(
                gpu,
                (request,),
                table.batches[0],
                now_ns=now_ns,
                start_ns=start_ns,
                duration_ns=table.single.expected_ns,
                latest_ns=request.deadline_ns,
            )
            return

    def _time_out(self, request: Request, now_ns: int) -> None:
        self.forget(request)
        if request.model.resident_on:
            self._placement.short_of(request.model, now_ns=now_ns)
        waited = format_duration(now_ns - request.arrival_ns)
        reason = f"no GPU came free before its deadline: waited {waited} in the queue"
        self._refusals.refuse(request, Code.TIMED_OUT, reason)

    def next_wakeup_ns(self) -> int | None:
        if not self._waiting:
            return None
        times = (self._openings.next_opening_ns(self._now_ns), self._expiry.next_ns())
        return min((ns for ns in times if ns is not None), default=None)

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
