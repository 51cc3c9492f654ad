"""Newest first: under overload some requests are in time, while first come, first served is late with all."""

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals, soonest
from slosched.core.scheduler.policies.baselines.queued import Queued, send_batch
from slosched.core.scheduler.queues import insert_by_key, take_by_key
from slosched.core.scheduler.state import Gpu, Request


class NewestFirst(Queued):
    """Serves the newest request that waits, with as many as fit into its batch; the oldest run out of time."""

    about = About(type="NEWEST", summary="newest first, in batches: an example", interface=1)

    _take = staticmethod(take_by_key)  # queues are in the order of arrival

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._expiry = ExpiryHeap()

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        if self._takes(request, now_ns):  # else no GPU could ever serve it, and it is answered
            insert_by_key(request.queue.requests, request)
            self._expiry.push(request.deadline_ns, request)

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        for request in self._expiry.pop_some(now_ns + 1, self._cluster.slices):
            self.forget(request)
            self._refusals.refuse(request, Code.TIMED_OUT, "newer requests went first")
        for start_ns, _, gpu in self._windows.open_gpus(now_ns):
            self._serve(gpu, start_ns, now_ns)
        self._placement.plan(now_ns=now_ns)  # which weights go where

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        ready = [q for q in self._waiting.values() if q.instance.model_id in gpu.resident]
        if not ready:
            return
        queue = max(ready, key=lambda each: each.requests[-1].key)
        taken = gpu.exec_table(queue).class_for(len(queue.requests))
        batch = queue.requests[-taken:]
        for request in batch:
            self.forget(request)
        send_batch(self._cluster, gpu, batch, start_ns=start_ns, now_ns=now_ns)

    def next_wakeup_ns(self) -> int | None:
        if not self._waiting:
            return None
        return soonest(
            self._windows.next_opening_ns(self._now_ns),
            self._expiry.next_ns(),
            self._placement.next_wakeup_ns(),
        )
