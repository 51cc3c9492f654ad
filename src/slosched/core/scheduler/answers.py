"""The one place where a request ends: its reply, its telemetry record, the counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from slosched.codes import Code
from slosched.core.scheduler.interface import (
    CallDone,
    CallRecord,
    Effect,
    RequestDone,
    RequestRecord,
    ToClient,
)
from slosched.core.scheduler.limits import Limits
from slosched.core.scheduler.state import ActionState, Request, RequestState
from slosched.core.values import Value
from slosched.messages import InferReply


class Plan(NamedTuple):
    """What was expected of a request and what became of it. Times in ns; -1 where there is none."""

    expected_start_ns: int = -1
    expected_exec_ns: int = 0
    start_ns: int = -1
    exec_ns: int = 0
    worker_id: int = -1
    gpu_id: int = -1
    batch_size: int = 0

    @classmethod
    def of(cls, action: ActionState, *, start_ns: int = -1, exec_ns: int = 0) -> Plan:
        """The plan of an action that carried the request, and when it ran if it did."""
        return cls(
            action.expected_start_ns,
            # That of the whole call: one that goes on is expected to take the rest of it.
            action.expected_end_ns - action.expected_start_ns,
            start_ns,
            exec_ns,
            action.gpu.worker.worker_id,
            action.gpu.gpu_id,
            len(action.requests),
        )


NO_PLAN = Plan()

#: A call is answered: (request, code, reason, result, worker). True if the answer does not go to a client.
OnCall = Callable[[Request, int, str, Value | None, int], bool]


def reply_and_record(
    request: Request,
    plan: Plan,
    *,
    code: int,
    reason: str,
    now_ns: int,
    met: bool,
    departure_count: int,
    cold: bool,
) -> tuple[InferReply, RequestRecord]:
    """Return the message for the client, and what telemetry says, of a request that ends now.

    `cold`: no GPU had its weights when it came, and one had when it left. By position: built by keyword the two
    take 2 us more, of some 40 a request.
    """
    arrival_ns, model_id = request.arrival_ns, request.instance.model_id
    predicted_ns = plan.expected_start_ns - arrival_ns
    if predicted_ns < -1:
        predicted_ns = -1
    started_ns = plan.start_ns - arrival_ns
    if started_ns < -1:
        started_ns = -1
    reply = InferReply(
        request.request_id,
        code,
        reason,
        model_id,
        request.slo_ns,
        now_ns - arrival_ns,
        met,
        plan.batch_size,
        plan.worker_id,
        plan.gpu_id,
        cold,
        predicted_ns,
        plan.expected_exec_ns,
        started_ns,
        plan.exec_ns,
        request.attempts,
        request.trail,
    )
    record = RequestRecord(
        request.key,
        request.request_id if request.call is None else request.call.root_id,
        request.user_id,
        model_id,
        code,
        reason,
        request.slo_factor,
        request.slo_ns,
        arrival_ns,
        now_ns,
        met,
        request.arrival_count,
        departure_count,
        cold,
        plan.batch_size,
        plan.worker_id,
        plan.gpu_id,
        request.attempts,
        predicted_ns,
        plan.expected_exec_ns,
        started_ns,
        plan.exec_ns,
    )
    return reply, record


def call_record(request: Request, record: RequestRecord, output: Value | None) -> CallRecord:
    """What telemetry says of a call that ends now, beside its `record`."""
    call, parent, function = request.call, request.parent, request.instance.function
    assert call is not None and function is not None
    return CallRecord(
        key=record.key,
        request_id=record.request_id,
        user_id=record.user_id,
        function=request.instance.name,
        arrival_ns=record.arrival_ns,
        end_ns=record.departure_ns,
        code=record.code,
        parent=-1 if parent is None else parent.key,
        child=call.child,
        asked_ran_ns=call.asked_ran_ns,
        model_id=record.model_id,
        size_class=request.length,
        slo_ns=record.slo_ns,
        near=call.near,
        near_child=call.near_child,
        worker_id=record.worker_id,
        gpu_id=record.gpu_id,
        start_ns=call.begin_ns,
        exec_ns=call.ran_ns,
        suspended_ns=call.suspended_ns,
        predicted_exec_ns=record.predicted_exec_ns,
        in_bytes=0 if request.input is None else request.input.size,
        out_bytes=0 if output is None else output.size,
        children=call.asked,
        cold=record.cold,
        attempts=record.attempts,
        gpu=function.gpu,
    )


class Answers:
    """Gives each request its one answer. `count` and `by_code` say how many so far.

    `on_call` must be set where calls are served (chains.py).
    """

    def __init__(self, *, emit: Callable[[Effect], None], limits: Limits) -> None:
        self._emit = emit
        self._limits = limits
        self.on_call: OnCall | None = None
        self.count = 0
        self.by_code: dict[int, int] = {}

    def give(
        self,
        request: Request,
        code: int,
        reason: str,
        plan: Plan,
        *,
        now_ns: int,
        output: Value | None,
        tell: bool,
    ) -> bool:
        """End `request` at `now_ns`; `tell` its client unless that is gone. True if it was in time."""
        request.move(RequestState.ANSWERED)
        code = int(code)
        # By this controller's own count, also where the plan was for an earlier date; the client has its own.
        met = code == Code.OK and now_ns <= request.arrival_ns + request.slo_ns
        departure_count = len(request.instance.resident_on)
        cold = request.arrival_count == 0 < departure_count
        self._take_off(request, code)
        reply, record = reply_and_record(
            request,
            plan,
            code=code,
            reason=reason,
            now_ns=now_ns,
            met=met,
            departure_count=departure_count,
            cold=cold,
        )
        if request.call is not None:
            assert self.on_call is not None
            record_of_call = call_record(request, record, output)
            tell = not self.on_call(request, code, reason, output, plan.worker_id) and tell
            self._emit(CallDone(record_of_call))
        if tell and not request.client.gone:
            self._emit(ToClient(request.client.identity, reply, output))
        self._emit(RequestDone(record, request.parent is not None))
        return met

    def keeps(self, request: Request, size: int) -> None:
        """`size` bytes of an earlier stage's output are kept for `request`: they count like inputs."""
        request.kept_bytes += size
        self._limits.took(request.client, size)

    def _take_off(self, request: Request, code: int) -> None:
        """It does not wait any more."""
        del request.client.requests[request.request_id]
        if request.input is not None:
            self._limits.answered(request.client, request.input.size)
        if request.kept_bytes:
            self._limits.answered(request.client, request.kept_bytes)
        self.count += 1
        self.by_code[code] = self.by_code.get(code, 0) + 1
