"""REJECT: admission control at arrival, one request at a time. No batches, no reordering.

1. A request is bound at its arrival to the GPU that holds its model and can start it soonest, behind
   everything bound there before it.
2. It is admitted if it will be done by its deadline there, as predicted, and else answered at once
   (code 8) with the prediction. On an idle GPU that is what is likely, also where the weights must be
   loaded first, behind others what the estimators' margins promise (as INFER5 does, and for the same
   reason: what is never tried is never found to be fast again).
3. Each GPU works its line off in the order of admission, starting when dispatch_windows.py says.

Where nothing holds the model, the load that placement/ would send counts into the prediction, and
the request is bound when the weights have arrived. It is bound anew, by the same rule, when its GPU is
lost or gives its model up. An admitted request whose deadline passes before it starts, because
something took longer than predicted, is answered then (code 4).

This is the baseline of a server that promises only what it can keep, but does not batch: its capacity
is that of batch 1, whatever the load.
"""

from __future__ import annotations

from collections import OrderedDict

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.dispatch_windows import DispatchWindows
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import NOT_OFFERED, Refusals, is_offered, soonest
from slosched.core.scheduler.policies.baselines.queued import answer_unoffered, send_single
from slosched.core.scheduler.policies.baselines.unassigned_requests import (
    A_BINDING,
    UnassignedRequests,
)
from slosched.core.scheduler.policies.placements import make_placement
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request
from slosched.units import format_duration


class _Line:
    """The requests bound to one GPU, in order of admission, and their predicted exec time."""

    __slots__ = ("backlog_ns", "requests")

    def __init__(self) -> None:
        self.requests: OrderedDict[int, Request] = OrderedDict()  # by key
        self.backlog_ns = 0


class Reject:
    """See the head of this file."""

    about = About(
        type="REJECT",
        summary="admits at arrival what it can do in time, one at a time: a baseline",
    )

    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._windows = DispatchWindows(cluster)
        self._placement = make_placement(cluster)
        self._lines: dict[int, _Line] = {}  # by GPU index
        self._bound: dict[int, tuple[int, int]] = {}  # request key -> (GPU index, exec ns)
        self._unassigned = UnassignedRequests()
        self._expiry = ExpiryHeap()  # by deadline
        self._now_ns = 0

    # ------------------------------------------------------------------------------ admission

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.model
        if not is_offered(self._cluster, model):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
            return
        self._placement.asked_for(request, now_ns=now_ns)
        gpu, start_ns, end_ns = self._soonest(request, now_ns)
        if end_ns > request.deadline_ns:
            self._reject(request, gpu, start_ns, end_ns, now_ns, again=request.attempts > 0)
            return
        append(model.queue, request)
        self._expiry.push(request.deadline_ns, request)
        self._bind(request, gpu)

    def _soonest(self, request: Request, now_ns: int) -> tuple[Gpu, int, int]:
        """(GPU, start, end at the controller) where `request` can start soonest. It is offered."""
        model = request.model
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
        single, returns = gpu.exec_table(model).single, gpu.worker.returns
        if gpu.exec.outstanding or self._backlog_ns(gpu):
            return gpu, start_ns, start_ns + single.margin_ns + returns.margin_ns
        if model.resident_on:
            start_ns = self._cluster.likely_start_ns(gpu, now_ns)
        return gpu, start_ns, start_ns + single.expected_ns + returns.expected_ns

    def _backlog_ns(self, gpu: Gpu) -> int:
        return self._lines[gpu.index].backlog_ns

    def _bind(self, request: Request, gpu: Gpu) -> None:
        if not request.model.resident_on:
            self._unassigned.add(request)
            return
        exec_ns = gpu.exec_table(request.model).single.expected_ns
        line = self._lines[gpu.index]
        line.requests[request.key] = request
        line.backlog_ns += exec_ns
        self._bound[request.key] = (gpu.index, exec_ns)

    def _reject(
        self, request: Request, gpu: Gpu, start_ns: int, end_ns: int, now_ns: int, *, again: bool
    ) -> None:
        model = request.model
        if model.resident_on:
            self._placement.short_of(model, now_ns=now_ns)
        state = "" if model.resident_on else " after loading its weights"
        exec_ns = gpu.exec_table(model).single.expected_ns
        takes = f"takes {format_duration(exec_ns)}"
        if (
            start_ns + exec_ns <= request.deadline_ns
        ):  # it is the margin of a promise that is too long
            takes += f", or up to {format_duration(end_ns - start_ns)} with the way back"
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
            self._bind_anew(request, now_ns)
        if ready:
            self._serve_open(now_ns)

    def _serve_open(self, now_ns: int) -> None:
        if self._bound:
            for start_ns, _, gpu in self._windows.open_gpus(now_ns):
                self._serve(gpu, start_ns, now_ns)

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        requests, spend = self._lines[gpu.index].requests, self._cluster.slices.spend
        while requests:
            request = next(iter(requests.values()))
            model = request.model
            if model.model_id not in gpu.resident:
                if not spend(A_BINDING):
                    return
                self._leave(request)
                self._unassigned.add(request)
                continue
            if request.deadline_ns <= start_ns:
                if not spend(ANSWER):
                    return
                self._time_out(request, now_ns)
                continue
            self.forget(request)
            send_single(self._cluster, gpu, request, start_ns=start_ns, now_ns=now_ns)
            return

    def _bind_anew(self, request: Request, now_ns: int) -> None:
        """Its weights have arrived, or its GPU was lost: the rule of arrival once more."""
        gpu, start_ns, end_ns = self._soonest(request, now_ns)
        if end_ns > request.deadline_ns:
            take_appended(request.model.queue, request)
            self._reject(request, gpu, start_ns, end_ns, now_ns, again=True)
        else:
            self._bind(request, gpu)

    def _leave(self, request: Request) -> None:
        """Take `request` off its line, or from those without one."""
        place = self._bound.pop(request.key, None)
        if place is None:
            self._unassigned.discard(request)
            return
        index, exec_ns = place
        line = self._lines[index]
        del line.requests[request.key]
        line.backlog_ns -= exec_ns

    def forget(self, request: Request) -> None:
        take_appended(request.model.queue, request)
        self._leave(request)

    def _time_out(self, request: Request, now_ns: int) -> None:
        self.forget(request)
        waited = format_duration(now_ns - request.arrival_ns)
        reason = f"its turn did not come before its deadline: waited {waited} in the queue"
        self._refusals.refuse(request, Code.TIMED_OUT, reason)

    def next_wakeup_ns(self) -> int | None:
        if not self._bound and not self._unassigned:
            return None
        return soonest(
            self._windows.next_opening_ns(self._now_ns),
            self._expiry.next_ns(),
            self._placement.next_wakeup_ns(),
        )

    # -------------------------------------------------------------------------------- facts

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)

    def gpu_added(self, gpu: Gpu) -> None:
        self._lines[gpu.index] = _Line()

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)
        self._cluster.slices.begin(self._removed(gpu.index))

    def _removed(self, index: int) -> Work:
        """What was bound to a GPU that is gone waits for another one, or is answered if there is none."""
        requests = self._lines[index].requests
        while requests:
            request = next(iter(requests.values()))
            self._leave(request)
            self._unassigned.add(request)
            yield A_BINDING
        del self._lines[index]
        yield from answer_unoffered(self._cluster, self, self._refusals, self._unassigned.models())

    def head(self, model: Model) -> Request | None:
        """The first request of `model` that is bound to no GPU."""
        return self._unassigned.head(model)

    def model_loaded(self, model: Model, gpus: list[Gpu], *, now_ns: int) -> None:
        self._placement.model_loaded(model, gpus)

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        self._placement.asked_for(request, now_ns=now_ns)

    def settled(self, model: Model) -> bool:
        return self._placement.settled(model)
