"""FIFO: the oldest request first, batched with whatever of its model waits. No deadlines.

The baseline of a server that knows neither execution times nor deadlines: nothing is refused, and
under overload everything is late. When an Infer may be sent, and which weights are loaded, is decided
as for INFER5 (dispatch_windows.py, placement/); models that do not fit together take turns (turns.py).
"""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals, soonest
from slosched.core.scheduler.policies.baselines.queued import Queued, send_batch
from slosched.core.scheduler.policies.baselines.turns import Turns
from slosched.core.scheduler.queues import insert_by_key, take_by_key
from slosched.core.scheduler.state import Gpu, Queue, Request


class Fifo(Queued):
    """See the head of this file."""

    about = About(
        type="FIFO",
        rank=10,
        summary="first come, first served, with batches, no deadlines: a baseline",
    )

    heeds_deadlines = False
    _take = staticmethod(take_by_key)

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._turns = Turns(cluster)

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        if not self._takes(request, now_ns):
            return
        # Arrival order; a request that comes back from a failed action keeps its place.
        insert_by_key(request.queue.requests, request)

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        if self._waiting:
            for start_ns, _, gpu in self._windows.open_gpus(now_ns):
                kept_for = self._turns.kept_for(gpu)
                ready = [
                    queue
                    for queue in self._waiting.values()
                    if queue.instance.model_id in gpu.resident
                    and kept_for in (None, queue.instance)
                ]
                if ready:
                    self._commit(gpu, min(ready, key=_oldest), start_ns, now_ns)
        absent = [q.requests[0] for q in self._waiting.values() if not q.instance.resident_on]
        self._turns.plan(absent, now_ns=now_ns)
        self._placement.plan(now_ns=now_ns)

    def _commit(self, gpu: Gpu, queue: Queue, start_ns: int, now_ns: int) -> None:
        table = gpu.exec_table(queue)
        taken = table.class_for(len(queue.requests))
        requests = queue.requests[:taken]
        del queue.requests[:taken]
        if not queue.requests:
            del self._waiting[queue.queue_id]
        send_batch(self._cluster, gpu, requests, start_ns=start_ns, now_ns=now_ns)

    def next_wakeup_ns(self) -> int | None:
        if not self._waiting:
            return None
        return soonest(
            self._windows.next_opening_ns(self._now_ns), self._placement.next_wakeup_ns()
        )


def _oldest(queue: Queue) -> int:
    return queue.requests[0].key
