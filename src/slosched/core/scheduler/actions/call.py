"""Call: one call of a function, in a slot of a host or on a GPU's exec lane.

It may give its slot away while it awaits children (`suspend`, `resume`): then it is outstanding on its device,
and not in the lane. chains.py says when, and what follows its end. One with a host part runs that first, as a
suspended one, and stands in the lane from its end on (`prepared`): the lane is taken for the rest alone.
"""

from __future__ import annotations

import msgspec

from slosched.codes import ActionType, Code
from slosched.core.scheduler.actions.infer import OVERDUE_SHARE
from slosched.core.scheduler.actions.kind import Kind, Outcome
from slosched.core.scheduler.residency import drop_residency
from slosched.core.scheduler.state import ActionState, RequestState
from slosched.core.scheduler.validation import plausible
from slosched.messages import Call, CallResult, Span
from slosched.units import NS_PER_MS, NS_PER_S

#: What a call that goes on is expected to take at least: this part of a whole call.
_REST_SHARE = 8
#: A call is ended by its worker at its function's limit, and reported within this time.
_ENDED_WITHIN_NS = 5 * NS_PER_S
_NEVER_NS = 2**62
#: A call that was sent behind others comes back when they take longer than expected by this, if it could run
#: elsewhere: this number of times what it takes itself, and this at the least.
_BEHIND_TIMES, _BEHIND_LEAST_NS = 4, 20 * NS_PER_MS


class CallKind(Kind):
    """Takes a slot of the exec lane; teaches the exec table and the path. See the head of this file."""

    action_type = ActionType.CALL
    result_type = CallResult
    carries_requests = True

    def message(self, action: ActionState) -> Call:
        gpu, request = action.gpu, action.requests[0]
        return Call(
            session=gpu.worker.session,
            action_id=action.action_id,
            model_id=action.instance.model_id,
            gpu_id=gpu.gpu_id,
            call_id=request.key,
            earliest_ns=action.sent_ns,
            latest_ns=action.latest_ns,
            expected_duration_ns=action.expected_duration_ns,
            deadline_ns=request.deadline_ns,
            input_size=0 if request.brings is None else request.brings.size,
            size_class=request.length,
            parent_id=-1 if request.parent is None else request.parent.key,
        )

    def reserve(self, action: ActionState) -> None:
        gpu, model, request = action.gpu, action.instance, action.requests[0]
        assert model.function is not None and request.call is not None
        estimator = gpu.tables[action.queue.program].single
        spread_ns = estimator.margin_ns - estimator.expected_ns
        action.spread_ns = min(spread_ns, action.expected_duration_ns // OVERDUE_SHARE)
        limit_ns = model.function.limit_ns
        action.patience_ns = limit_ns + _ENDED_WITHIN_NS if limit_ns else _NEVER_NS
        if len(gpu.exec.outstanding) >= gpu.exec.width and len(model.resident_on) > 1:
            soon_ns = max(_BEHIND_TIMES * action.expected_duration_ns, _BEHIND_LEAST_NS)
            action.latest_ns = min(action.latest_ns, action.expected_start_ns + soon_ns)
        request.move(RequestState.IN_FLIGHT)
        request.attempts += 1
        request.call.action = action
        request.call.part_ns = action.expected_start_ns
        host_part = gpu.tables[action.queue.program].host_part
        if host_part is None:
            self._take_exec(action)
        else:
            request.call.prepares = True
            self._take_host(action, host_part.expected_ns)

    def _take_host(self, action: ActionState, host_ns: int) -> None:
        """It runs its host part first, for `host_ns`."""
        gpu = action.gpu
        action.latest_ns = max(action.reaches_ns, action.latest_ns - host_ns)
        action.predicted_start_ns = max(action.reaches_ns, gpu.prepare.busy_until_ns)
        action.predicted_end_ns = action.predicted_start_ns + host_ns
        action.expected_duration_ns = host_ns  # until it stands in the lane
        gpu.prepare.add(action)
        gpu.suspended[action.action_id] = action
        self._used(action)

    def prepared(self, action: ActionState, *, part: Span, now_ns: int) -> None:
        """Its host part is over, which ran in `part` (NO_SPAN: that was not said): it stands in the lane."""
        gpu = action.gpu
        table = gpu.tables[action.queue.program]
        gpu.prepare.finish(action, end_ns=part.end_ns or now_ns)
        del gpu.suspended[action.action_id]
        if table.host_part is not None and part.duration_ns:
            table.host_part.add(part.duration_ns)
        action.expected_duration_ns = table.single.expected_ns
        action.reaches_ns = now_ns - gpu.worker.returns.expected_ns  # it is there
        action.predicted_start_ns = max(action.reaches_ns, gpu.exec.busy_until_ns)
        action.predicted_end_ns = action.predicted_start_ns + action.expected_duration_ns
        gpu.exec.add(action)
        self._changes.execs(gpu)

    def outcome(self, action: ActionState, result: CallResult, *, now_ns: int) -> Outcome:
        span = plausible(result.exec, sent_ns=action.sent_ns, now_ns=now_ns)
        if span is not result.exec:
            result = msgspec.structs.replace(result, exec=span)
        return Outcome(Code.OK, "", span, result)

    def finished(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        gpu, span = action.gpu, outcome.span
        self._leave(action, span.end_ns, span.duration_ns)
        gpu.busy_ns += span.duration_ns
        gpu.tables[action.queue.program].single.add(span.duration_ns)
        self._paths.learn(
            gpu.worker,
            there_ns=outcome.result.received_ns - action.sent_ns,
            back_ns=now_ns - span.end_ns,
        )

    def failed(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        gpu, model = action.gpu, action.instance
        self._leave(action, now_ns, 0)
        if outcome.code == Code.EXEC_WEIGHTS_MISSING and model.model_id in gpu.resident:
            drop_residency(gpu, model)
            gpu.free_pages += model.pages

    def _leave(self, action: ActionState, end_ns: int, took_ns: int) -> None:
        gpu = action.gpu
        if gpu.suspended.pop(action.action_id, None) is None:
            gpu.exec.finish(action, end_ns=end_ns, took_ns=took_ns)
        elif action in gpu.prepare.outstanding:
            gpu.prepare.finish(action, end_ns=end_ns)
        self._changes.execs(gpu)

    def suspend(self, action: ActionState, *, end_ns: int) -> None:
        """It gave its slot away at `end_ns`."""
        gpu = action.gpu
        gpu.suspended[action.action_id] = action
        gpu.exec.suspend(action, end_ns=end_ns)
        self._changes.execs(gpu)

    def resume(self, action: ActionState, *, ran_ns: int, now_ns: int) -> None:
        """It has a slot again, after it has run for `ran_ns`; it went on as long ago as messages take."""
        gpu = action.gpu
        del gpu.suspended[action.action_id]
        whole_ns = gpu.tables[action.queue.program].single.expected_ns
        rest_ns = max(whole_ns - ran_ns, whole_ns // _REST_SHARE, 1)
        action.expected_duration_ns = rest_ns
        action.predicted_start_ns = now_ns - gpu.worker.returns.expected_ns
        action.predicted_end_ns = action.predicted_start_ns + rest_ns
        gpu.exec.resume(action)
        self._changes.execs(gpu)

    def goodput_ns(self, action: ActionState, outcome: Outcome, met: int) -> int:
        return outcome.span.duration_ns * met
