"""Infer: one batch of one model's requests on a GPU's exec lane."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from slosched.codes import ActionType, Code
from slosched.core.scheduler.actions.kind import Kind, Outcome
from slosched.core.scheduler.residency import drop_residency
from slosched.core.scheduler.state import (
    ActionState,
    Instance,
    Request,
    RequestState,
)
from slosched.core.scheduler.validation import plausible
from slosched.core.values import Value
from slosched.messages import Infer, InferResult
from slosched.signature import row_bytes

#: An action is overdue when it takes longer than expected by this part of it.
OVERDUE_SHARE = 8
#: The codes of an Infer whose worker has no weights of the instance any more.
_WEIGHTS_GONE = (Code.EXEC_WEIGHTS_MISSING, Code.MODEL_PROCESS_ENDED)


class InferKind(Kind):
    """Takes the exec lane; teaches the exec table and the path. See the head of this file."""

    action_type = ActionType.INFER
    result_type = InferResult
    carries_requests = is_infer = True

    def message(self, action: ActionState) -> Infer:
        gpu, requests, made_up = action.gpu, action.requests, -1
        length = action.queue.length
        sizes = []
        for request in requests:
            if request.brings is not None:
                sizes.append(request.brings.size)
            else:
                # With length classes these differ from request to request.
                made_up = (
                    self._generated_bytes(action.instance, request.length or length)
                    if made_up < 0 or length
                    else made_up
                )
                sizes.append(made_up)
        return Infer(
            session=gpu.worker.session,
            action_id=action.action_id,
            model_id=action.instance.model_id,
            gpu_id=gpu.gpu_id,
            earliest_ns=action.sent_ns,
            latest_ns=action.latest_ns,
            expected_duration_ns=action.expected_duration_ns,
            batch_size=action.batch_class,
            request_count=len(requests) or action.batch_class,
            input_sizes=tuple(sizes),
            length=length,
            lengths=tuple([request.length or length for request in requests]) if length else (),
            priority=action.priority,
        )

    def _generated_bytes(self, model: Instance, length: int) -> int:
        """Size of the inputs that the controller makes up, if it was told to (Clockwork, INFER5)."""
        if not self._config.generate_inputs or model.result is None:
            return 0
        return row_bytes(model.result.inputs, length)

    def reserve(self, action: ActionState) -> None:
        gpu = action.gpu
        estimator = gpu.tables[action.queue.program].estimators.get(action.batch_class)
        if estimator is not None:
            # No more than makes it overdue: a stall is for the worker's refusals and replanning.
            spread_ns = estimator.margin_ns - estimator.expected_ns
            action.spread_ns = min(spread_ns, action.expected_duration_ns // OVERDUE_SHARE)
        for request in action.requests:
            request.move(RequestState.IN_FLIGHT)
            request.attempts += 1
        self._take_exec(action)

    def outcome(self, action: ActionState, result: InferResult, *, now_ns: int) -> Outcome:
        span = plausible(result.exec, sent_ns=action.sent_ns, now_ns=now_ns)
        if span is not result.exec:
            result = msgspec.structs.replace(result, exec=span)
        clock_mhz = (result.gpu_clock_before_mhz + result.gpu_clock_mhz) // 2
        return Outcome(Code.OK, "", span, result, clock_mhz)

    def finished(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        gpu, span = action.gpu, outcome.span
        gpu.exec.finish(action, end_ns=span.end_ns, took_ns=span.duration_ns)
        self._changes.execs(gpu)
        gpu.busy_ns += span.duration_ns
        gpu.clock_mhz = outcome.result.gpu_clock_mhz
        gpu.tables[action.queue.program].estimators[action.batch_class].add(span.duration_ns)
        # Loads come in bursts and wait behind one another on the wire: they would teach the wrong lesson.
        self._paths.learn(
            gpu.worker,
            there_ns=outcome.result.received_ns - action.sent_ns,
            back_ns=now_ns - span.end_ns,
        )

    def failed(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        gpu, model = action.gpu, action.instance
        gpu.exec.finish(action, end_ns=now_ns)
        self._changes.execs(gpu)
        if outcome.code in _WEIGHTS_GONE and model.model_id in gpu.resident:
            # The worker does not have what we thought it had: our pages go back to free.
            drop_residency(gpu, model)
            gpu.free_pages += model.pages

    def goodput_ns(self, action: ActionState, outcome: Outcome, met: int) -> int:
        return outcome.span.duration_ns * met // max(1, len(action.requests))


def inputs_of(requests: Sequence[Request]) -> tuple[Value | None, ...]:
    """The inputs that `requests` bring, in their order; empty if none brings one."""
    inputs = [request.brings for request in requests]
    return tuple(inputs) if any(inputs) else ()
