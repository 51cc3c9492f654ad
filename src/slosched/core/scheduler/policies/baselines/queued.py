"""What the baselines share: refusing what no GPU offers, loading weights by demand, sending a choice.

FIFO and EDF are `Queued` and a rule. REJECT and AIMD assign requests to GPUs first (assigned.py).
`send_single` and `send_batch` commit what a rule has chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.dispatch_windows import DispatchWindows
from slosched.core.scheduler.policies.base import (
    LAST_ONE_LOST,
    NOT_OFFERED,
    Refusals,
    is_offered,
)
from slosched.core.scheduler.policies.placements import make_placement
from slosched.core.scheduler.queues import take_by_due
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Queue, Request

#: The latest start of a batch that is worth running however late.
NEVER_NS = 2**62


class Waiting(Protocol):
    """A policy's requests: the next one of a queue, and how one leaves."""

    def head(self, queue: Queue) -> Request | None: ...

    def forget(self, request: Request) -> None: ...


class LoadedByDemand:
    """The part of a baseline that decides nothing: dispatch windows, placement, what no GPU offers."""

    replans = True
    #: Whether a request is given up when its deadline has passed.
    heeds_deadlines = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._windows = DispatchWindows(cluster)
        self._placement = make_placement(cluster, heeds_deadlines=self.heeds_deadlines)
        self._now_ns = 0

    def _takes(self, request: Request, now_ns: int) -> bool:
        """Note that `request` came; False if it was refused, because no GPU could ever serve it."""
        if not is_offered(self._cluster, request.instance):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
            return False
        self._placement.asked_for(request, now_ns=now_ns)
        return True

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        self._placement.model_loaded(model, gpus)

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        self._placement.asked_for(request, now_ns=now_ns)

    def settled(self, model: Instance) -> bool:
        return self._placement.settled(model)


class Queued(LoadedByDemand):
    """A policy that keeps requests in their queues."""

    #: Takes a request out of its queue, whose order the subclass chose.
    _take = staticmethod(take_by_due)

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._waiting: dict[int, Queue] = {}  # queues with requests, by queue id

    def _takes(self, request: Request, now_ns: int) -> bool:
        if not super()._takes(request, now_ns):
            return False
        self._waiting[request.queue.queue_id] = request.queue
        return True

    def head(self, queue: Queue) -> Request | None:
        """The first request that waits in `queue`."""
        return queue.requests[0] if queue.requests else None

    def forget(self, request: Request) -> None:
        queue = request.queue
        self._take(queue.requests, request)
        if not queue.requests:
            del self._waiting[queue.queue_id]

    def gpu_added(self, gpu: Gpu) -> None:
        """Nothing is kept per GPU."""

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)
        self._cluster.slices.begin(
            answer_unoffered(self._cluster, self, self._refusals, list(self._waiting.values()))
        )


def answer_unoffered(
    cluster: Cluster, requests: Waiting, refusals: Refusals, queues: Sequence[Queue]
) -> Work:
    """A GPU was lost: answer the requests of each of `queues` that no other GPU offers, in slices."""
    for queue in queues:
        yield 1
        while not is_offered(cluster, queue.instance) and (request := requests.head(queue)):
            requests.forget(request)
            refusals.refuse(request, Code.CANCELLED, LAST_ONE_LOST)
            yield ANSWER


def send_single(
    cluster: Cluster, gpu: Gpu, request: Request, *, start_ns: int, now_ns: int
) -> None:
    """Commit `request` alone; the worker refuses it once its deadline has passed."""
    table = gpu.exec_table(request.queue)
    cluster.send_infer(
        gpu,
        (request,),
        table.batches[0],
        now_ns=now_ns,
        start_ns=start_ns,
        duration_ns=table.single.expected_ns,
        latest_ns=request.deadline_ns,
    )


def send_batch(
    cluster: Cluster, gpu: Gpu, requests: Sequence[Request], *, start_ns: int, now_ns: int
) -> None:
    """Commit `requests` of one model in the smallest class that holds them, however late."""
    table = gpu.exec_table(requests[0].queue)
    batch_class = table.class_for(len(requests))
    cluster.send_infer(
        gpu,
        requests,
        batch_class,
        now_ns=now_ns,
        start_ns=start_ns,
        duration_ns=table.estimators[batch_class].expected_ns,
        latest_ns=NEVER_NS,
    )
