"""REJECT: admission control at arrival, one request at a time. No batches, no reordering.

1. A request is assigned at its arrival to the GPU that holds its model and can start it soonest, behind
   everything assigned there before it.
2. It is admitted if it will be done by its deadline there, as predicted, and else answered at once
   (code 8) with the prediction. On an idle GPU that is what is likely, also where the weights must be
   loaded first, behind others what the estimators' margins promise (as INFER5 does, and for the same
   reason: what is never tried is never found to be fast again).
3. Each GPU works its line off in the order of admission, starting when dispatch_windows.py says.

Where nothing holds the model, the load that placement/ would send counts into the prediction, and
the request is assigned when the weights have arrived. It is assigned anew, by the same rule, when its GPU is
lost or gives its model up. An admitted request whose deadline passes before it starts, because
something took longer than predicted, is answered then (code 4).

This is the baseline of a server that promises only what it can keep, but does not batch: its capacity
is that of batch 1, whatever the load.
"""

from __future__ import annotations

from collections import OrderedDict

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals, soonest
from slosched.core.scheduler.policies.baselines.assigned import AssignedToGpus
from slosched.core.scheduler.policies.baselines.queued import send_single
from slosched.core.scheduler.policies.baselines.unassigned_requests import AN_ASSIGNMENT
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.slices import ANSWER
from slosched.core.scheduler.state import Gpu, Request
from slosched.units import format_duration


class _Line:
    """The requests assigned to one GPU, in order of admission, and their predicted exec time."""

    __slots__ = ("_exec_ns", "backlog_ns", "requests")

    def __init__(self) -> None:
        self.requests: OrderedDict[int, Request] = OrderedDict()  # by key
        self._exec_ns: dict[int, int] = {}  # by key
        self.backlog_ns = 0

    def first(self) -> Request | None:
        return next(iter(self.requests.values()), None)

    def add(self, request: Request, exec_ns: int) -> None:
        self.requests[request.key] = request
        self._exec_ns[request.key] = exec_ns
        self.backlog_ns += exec_ns

    def remove(self, request: Request) -> None:
        del self.requests[request.key]
        self.backlog_ns -= self._exec_ns.pop(request.key)


class Reject(AssignedToGpus[_Line]):
    """See the head of this file."""

    about = About(
        type="REJECT",
        rank=12,
        summary="admits at arrival what it can do in time, one at a time: a baseline",
    )

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._expiry = ExpiryHeap()  # by deadline

    def _new_queue(self) -> _Line:
        return _Line()

    # ------------------------------------------------------------------------------ admission

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        if not self._takes(request, now_ns):
            return
        gpu, start_ns, end_ns = self._soonest(request, now_ns)
        if end_ns > request.deadline_ns:
            self._reject(request, gpu, start_ns, end_ns, now_ns, again=request.attempts > 0)
            return
        append(request.queue.requests, request)
        self._expiry.push(request.deadline_ns, request)
        self._assign(request, gpu)

    def _soonest(self, request: Request, now_ns: int) -> tuple[Gpu, int, int]:
        """(GPU, start, end at the controller) where `request` can start soonest. It is offered."""
        model = request.instance
        options = [
            (self._cluster.earliest_start_ns(gpu, now_ns) + self._backlog_ns(gpu), gpu.index, gpu)
            for gpu in model.resident_on.values()
        ]
        if not options:
            for gpu in self._cluster.gpus.values():
                ready_ns = self._placement.load_ready_ns(gpu, model, now_ns)
                if ready_ns is not None and gpu.pages >= model.pages:
                    options.append((ready_ns + self._backlog_ns(gpu), gpu.index, gpu))
        # One that is held gives no time at which it will be free.
        start_ns, _, gpu = min([o for o in options if not o[2].held] or options)
        single, returns = gpu.exec_table(request.queue).single, gpu.worker.returns
        if gpu.exec.outstanding or self._backlog_ns(gpu):
            return gpu, start_ns, start_ns + single.margin_ns + returns.margin_ns
        if model.resident_on:
            start_ns = self._cluster.likely_start_ns(gpu, now_ns)
        return gpu, start_ns, start_ns + single.expected_ns + returns.expected_ns

    def _backlog_ns(self, gpu: Gpu) -> int:
        return self._queues[gpu.index].backlog_ns

    def _assign(self, request: Request, gpu: Gpu) -> None:
        if not request.instance.resident_on:
            self._unassigned.add(request)
            return
        exec_ns = gpu.exec_table(request.queue).single.expected_ns
        self._queues[gpu.index].add(request, exec_ns)
        self._assigned[request.key] = gpu.index

    def _reject(
        self, request: Request, gpu: Gpu, start_ns: int, end_ns: int, now_ns: int, *, again: bool
    ) -> None:
        model = request.instance
        if model.resident_on:
            self._placement.short_of(model, now_ns=now_ns)
        state = "" if model.resident_on else " after loading its weights"
        exec_ns = gpu.exec_table(request.queue).single.expected_ns
        takes = f"takes {format_duration(exec_ns)}"
        # It would likely be in time: only the margin of a promise makes it too late.
        if start_ns + exec_ns <= request.deadline_ns:
            takes += f", or up to {format_duration(end_ns - start_ns)} until the report is here"
        reason = (
            f"could start in {format_duration(start_ns - now_ns)} at the earliest{state} and {takes}; "
            "the deadline is in "
            f"{format_duration(request.deadline_ns - now_ns)}"
        )
        code = Code.COULD_NOT_START_IN_TIME
        if again:  # it was admitted once
            code, reason = Code.TIMED_OUT, f"no other try fits: {reason}"
        self._refusals.refuse(request, code, reason, start_ns=start_ns, exec_ns=exec_ns)

    # ------------------------------------------------------------------------------ the lines

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._placement.plan(now_ns=now_ns)
        slices = self._cluster.slices
        for request in self._expiry.pop_some(now_ns + 1, slices):
            self._time_out(request, now_ns)
        self._serve_open(now_ns)
        ready = self._unassigned.take_ready(slices)
        for request in ready:
            self._assign_anew(request, now_ns)
        if ready:
            self._serve_open(now_ns)

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        line, spend = self._queues[gpu.index], self._cluster.slices.spend
        while (request := line.first()) is not None:
            model = request.instance
            if model.model_id not in gpu.resident:
                if not spend(AN_ASSIGNMENT):
                    return
                self._unassign(request)
                continue
            if request.deadline_ns <= start_ns:
                if not spend(ANSWER):
                    return
                self._time_out(request, now_ns)
                continue
            self.forget(request)
            send_single(self._cluster, gpu, request, start_ns=start_ns, now_ns=now_ns)
            return

    def _assign_anew(self, request: Request, now_ns: int) -> None:
        """Its weights have arrived, or its GPU was lost: the rule of arrival once more."""
        gpu, start_ns, end_ns = self._soonest(request, now_ns)
        if end_ns > request.deadline_ns:
            take_appended(request.queue.requests, request)
            self._reject(request, gpu, start_ns, end_ns, now_ns, again=True)
        else:
            self._assign(request, gpu)

    def _time_out(self, request: Request, now_ns: int) -> None:
        self.forget(request)
        waited = format_duration(now_ns - request.arrival_ns)
        reason = f"its turn did not come before its deadline: waited {waited} in the queue"
        self._refusals.refuse(request, Code.TIMED_OUT, reason)

    def next_wakeup_ns(self) -> int | None:
        if not self._assigned and not self._unassigned:
            return None
        return soonest(
            self._windows.next_opening_ns(self._now_ns),
            self._expiry.next_ns(),
            self._placement.next_wakeup_ns(),
        )
