"""What the simple policies share: requests queued at their models, weights loaded by demand.

`QueuedByModel` is the part of a policy that decides nothing: who waits, whom nobody can serve any more,
what placement must hear. FIFO and EDF are this and a rule. `send_single` and `send_batch` commit what a
rule has chosen.
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
from slosched.core.scheduler.queues import take_by_deadline
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request

#: The latest start of what is worth doing however late.
NEVER_NS = 2**62


class Queues(Protocol):
    """Of a policy: whose turn it is to be answered, and how it leaves the queue."""

    def head(self, model: Model) -> Request | None: ...

    def forget(self, request: Request) -> None: ...


class QueuedByModel:
    """Queues and placement of a policy that keeps requests at their models."""

    replans = True
    #: Whether a request is given up when its deadline has passed.
    heeds_deadlines = True
    #: Takes a request out of its model's queue, whose order the subclass chose.
    _take = staticmethod(take_by_deadline)

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._windows = DispatchWindows(cluster)
        self._placement = make_placement(cluster, heeds_deadlines=self.heeds_deadlines)
        self._waiting: dict[int, Model] = {}  # models with queued requests
        self._now_ns = 0

    def _takes(self, request: Request, now_ns: int) -> bool:
        """Note that `request` came; False if it was refused, because no GPU could ever serve it."""
        if not is_offered(self._cluster, request.model):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
            return False
        self._placement.asked_for(request, now_ns=now_ns)
        self._waiting[request.model.model_id] = request.model
        return True

    def head(self, model: Model) -> Request | None:
        """The first request that waits for `model`."""
        return model.queue[0] if model.queue else None

    def forget(self, request: Request) -> None:
        model = request.model
        self._take(model.queue, request)
        if not model.queue:
            del self._waiting[model.model_id]

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)

    def gpu_added(self, gpu: Gpu) -> None:
        """Nothing is kept per GPU."""

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)
        self._cluster.slices.begin(
            answer_unoffered(self._cluster, self, self._refusals, list(self._waiting.values()))
        )

    def model_loaded(self, model: Model, gpus: list[Gpu], *, now_ns: int) -> None:
        self._placement.model_loaded(model, gpus)

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        self._placement.asked_for(request, now_ns=now_ns)

    def settled(self, model: Model) -> bool:
        return self._placement.settled(model)


def answer_unoffered(
    cluster: Cluster, queues: Queues, refusals: Refusals, models: Sequence[Model]
) -> Work:
    """A GPU was lost: what waits for those of `models` that no other could serve is answered, in slices."""
    for model in models:
        yield 1
        while not is_offered(cluster, model) and (request := queues.head(model)) is not None:
            queues.forget(request)
            refusals.refuse(request, Code.CANCELLED, LAST_ONE_LOST)
            yield ANSWER


def send_single(
    cluster: Cluster, gpu: Gpu, request: Request, *, start_ns: int, now_ns: int
) -> None:
    """Commit `request` alone; the worker refuses it once its deadline has passed."""
    table = gpu.exec_table(request.model)
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
    table = gpu.exec_table(requests[0].model)
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
