"""EDF: earliest deadline first, one request at a time. No batches, no execution times.

For each GPU that may be given work (dispatch_windows.py), in order of its predicted start s:

1. of the requests whose model it holds, the one with the earliest deadline is sent;
2. one whose deadline is not after s is answered instead (code 4): a late start is useless;
3. a request whose deadline passes in the queue is answered then.

Work-conserving and optimal for one processor that is never overloaded (Liu and Layland, JACM 1973;
Dertouzos 1974, for jobs that may be preempted). It knows no execution times, so under overload it
starts what can only end late, and nearly everything is late: the known domino effect.

What waits for weights is loaded by demand (placement/); one that loses requests gets more GPUs.
"""

from __future__ import annotations

from bisect import insort

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals, soonest
from slosched.core.scheduler.policies.baselines.queued import Queued, send_single
from slosched.core.scheduler.queues import first_from
from slosched.core.scheduler.slices import ANSWER
from slosched.core.scheduler.state import Gpu, Request
from slosched.units import format_duration


class Edf(Queued):
    """See the head of this file."""

    about = About(type="EDF", rank=11, summary="earliest deadline first, one at a time: a baseline")

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._expiry = ExpiryHeap()  # by deadline

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        if self._takes(request, now_ns):
            insort(request.queue.requests, request)
            self._expiry.push(request.deadline_ns, request)

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._placement.plan(now_ns=now_ns)
        for request in self._expiry.pop_some(now_ns + 1, self._cluster.slices):
            self._time_out(request, now_ns)
        if self._waiting:
            for start_ns, _, gpu in self._windows.open_gpus(now_ns):
                self._serve(gpu, start_ns, now_ns)

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        while ready := [requests[0] for requests in self._resident(gpu)]:
            request = min(ready)
            if request.deadline_ns <= start_ns:
                if self._cluster.slices.spend(ANSWER):
                    self._time_out(request, now_ns)
                    continue
                first = self._first_in_time(gpu, start_ns)
                if first is None:
                    return
                request = first
            self.forget(request)
            send_single(self._cluster, gpu, request, start_ns=start_ns, now_ns=now_ns)
            return

    def _resident(self, gpu: Gpu) -> list[list[Request]]:
        """What waits in each queue whose instance `gpu` holds."""
        waiting = self._waiting.values()
        return [queue.requests for queue in waiting if queue.instance.model_id in gpu.resident]

    def _first_in_time(self, gpu: Gpu, start_ns: int) -> Request | None:
        """More requests are late than one step answers: the first request that is not late."""
        found = ((queue, first_from(queue, start_ns + 1)) for queue in self._resident(gpu))
        return min((queue[at] for queue, at in found if at < len(queue)), default=None)

    def _time_out(self, request: Request, now_ns: int) -> None:
        self.forget(request)
        if request.instance.resident_on:
            self._placement.short_of(request.instance, now_ns=now_ns)
        waited = format_duration(now_ns - request.arrival_ns)
        reason = f"no GPU came free before its deadline: waited {waited} in the queue"
        self._refusals.refuse(request, Code.TIMED_OUT, reason)

    def next_wakeup_ns(self) -> int | None:
        if not self._waiting:
            return None
        return soonest(
            self._windows.next_opening_ns(self._now_ns),
            self._expiry.next_ns(),
            self._placement.next_wakeup_ns(),
        )
