"""Calls of functions: their children, their suspensions, and their ends.

A call that runs may ask for children. Each is a request of its own, whose client is that of its parent, which
has what is left of its parent's time, and whose answer goes to the worker of its parent.

    ChildRequest --> request --> ... --> answered --ChildReply--> the parent's worker
    the parent ends, in whatever way --> its unanswered children end with code 1, running ones by a CancelCall

A call that awaits children gives its slot away, is in flight all the same, and takes a slot again when its
worker says so.

At most once: the body of a call that began, or may have begun, is not sent again, unless its function is
*idempotent*; then it is sent once more after its process ended. What its worker refused before it began is
planned anew, as every action that failed is.

Deeper calls go first: a child's deadline is a microsecond before its parent's. So of calls with one deadline
few are unfinished at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from slosched.call_messages import (
    MOST_CHILDREN,
    CallPrepared,
    CallResumed,
    CallSuspended,
    CancelCall,
    ChildCancel,
    ChildReply,
    ChildRequest,
)
from slosched.codes import ENDED, ActionType, Code
from slosched.core.scheduler.actions.call import CallKind
from slosched.core.scheduler.actions.kind import Outcome
from slosched.core.scheduler.answers import Answers, Plan
from slosched.core.scheduler.arrivals import Arrivals
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.foreign_text import printable
from slosched.core.scheduler.full_hosts import FullHosts
from slosched.core.scheduler.interface import CallPart, CallPartDone, ToWorker
from slosched.core.scheduler.nested_calls import Nested
from slosched.core.scheduler.policies.base import Policy
from slosched.core.scheduler.replanning import is_pointless, was_handed_back, why_failed
from slosched.core.scheduler.second_tries import ONCE_MORE
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import ActionState, Request, RequestState, Worker
from slosched.core.scheduler.validation import plausible
from slosched.core.values import Value
from slosched.messages import MOST_BEAT_CALLS, NO_SPAN, CallNews, CallResult, ErrorResult
from slosched.units import NS_PER_S

#: A call has at most this number of parents above it.
MOST_DEPTH = 1000
#: How a worker refuses a call that has not begun (core/worker/kinds/call.py); other ends may be of its body.
UNSTARTED = frozenset(
    {
        Code.EXEC_TOO_EARLY,
        Code.EXEC_TOO_LATE,
        Code.EXEC_WEIGHTS_MISSING,
        Code.WEIGHTS_NOT_PRESENT,
        Code.TOO_MANY_CALLS,
        Code.SHUTTING_DOWN,
        Code.CANCELLED,
    }
)
#: A call is with its worker by then, and heartbeats tell of it, or it was lost on the way.
_REACHES_WITHIN_NS = 5 * NS_PER_S
#: A call that came back so often from behind others is refused as one that fails.
_MOST_MOVES = 100
_TAKEN_BACK = "the call that made it has ended"


class End(Protocol):
    """Ends a request wherever it is, and may `tell` its client or parent."""

    def __call__(self, request: Request, code: int, reason: str, *, tell: bool = True) -> None: ...


#: Answers a request: (request, code, words, plan).
Answer = Callable[[Request, int, str, Plan], object]


class Chains:
    """The calls that are not answered. `end` ends a request from outside, `answer` answers one in flight."""

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        arrivals: Arrivals,
        answers: Answers,
        full_hosts: FullHosts,
        end: End,
        answer: Answer,
    ) -> None:
        self._cluster, self._policy = cluster, policy
        self._full_hosts = full_hosts
        self._arrivals, self._answers = arrivals, answers
        self._end, self._answer = end, answer
        kind = cluster.kinds[ActionType.CALL]
        assert isinstance(kind, CallKind)
        self._kind = kind
        answers.on_call = self._answered
        self._orphans: deque[Request] = deque()  # children of calls that have ended
        self._ending = False

    @property
    def taking_back(self) -> bool:
        """Children of calls that have ended are not all ended yet."""
        return self._ending

    # ------------------------------------------------------------------- what a call says

    def heard(
        self, worker: Worker, message: CallNews, payload: Sequence[Value], *, now_ns: int
    ) -> None:
        """A running call of `worker` says something. Words of one that has ended are ignored."""
        action = self._cluster.actions.get(message.action_id)
        if (
            action is None
            or action.gpu.worker is not worker
            or action.action_type is not ActionType.CALL
        ):
            return
        request = action.requests[0]
        call = request.call
        assert call is not None
        if call.prepares:  # whatever it says, it has its host part behind it
            call.prepares = False
            part = message.part if isinstance(message, CallPrepared) else NO_SPAN
            if part.duration_ns:
                part = plausible(part, sent_ns=action.sent_ns, now_ns=now_ns)
            self._kind.prepared(action, part=part, now_ns=now_ns)
        if isinstance(message, CallPrepared):
            return
        if isinstance(message, CallSuspended):
            self._suspended(action, request, call, message, now_ns)
        elif isinstance(message, CallResumed):
            self._resumed(action, call, now_ns)
        elif request.state is RequestState.ANSWERED:
            return  # it was cancelled, and is about to end
        elif isinstance(message, ChildCancel):
            child = call.children.get(message.child)
            if child is not None:
                self._end(child, Code.CANCELLED, "taken back by the call that made it")
        else:
            self._asked(action, request, call, message, payload, now_ns)

    def _asked(
        self,
        action: ActionState,
        parent: Request,
        call: Nested[Request, ActionState],
        message: ChildRequest,
        payload: Sequence[Value],
        now_ns: int,
    ) -> None:
        if message.child < call.asked:
            return  # it came twice, and is answered once
        call.asked = message.child + 1
        size = payload[0].size if payload else 0
        error, code = "", Code.LIMIT_REACHED
        if call.depth >= MOST_DEPTH:
            error = f"the call has {MOST_DEPTH} calls above it, which is the limit"
        elif len(call.children) >= MOST_CHILDREN:
            error = f"{MOST_CHILDREN} children of the call have no answer yet, which is the limit"
        elif size != message.input_size or len(payload) > 1:
            error, code = "its arguments did not come with it", Code.INVALID_REQUEST
        if not error:
            nested = Nested[Request, ActionState](
                call.root_id,
                child=message.child,
                depth=call.depth + 1,
                near=printable(message.near),
                near_child=message.near_child,
                asked_ran_ns=max(0, message.ran_ns),
            )
            value = payload[0] if payload else None
            code, error = self._arrivals.child(parent, nested, message, value, now_ns=now_ns)
        if error:
            self._reply(action, message.child, code, error)

    def _suspended(
        self,
        action: ActionState,
        request: Request,
        call: Nested[Request, ActionState],
        message: CallSuspended,
        now_ns: int,
    ) -> None:
        if action.action_id in action.gpu.suspended:
            return  # it came twice
        part = plausible(message.part, sent_ns=action.sent_ns, now_ns=now_ns)
        self._part_over(request, call, part.begin_ns, part.end_ns, message.children)
        call.ran_ns += part.duration_ns
        call.suspended_at_ns = part.end_ns
        self._kind.suspend(action, end_ns=part.end_ns)
        for child in message.children:
            if child >= call.asked and request.state is not RequestState.ANSWERED:
                self._reply(action, child, Code.CANCELLED, "the request for it was lost")

    def _resumed(
        self, action: ActionState, call: Nested[Request, ActionState], now_ns: int
    ) -> None:
        if action.action_id not in action.gpu.suspended:
            return
        begin_ns = max(
            call.suspended_at_ns, now_ns - action.gpu.worker.returns.expected_ns, action.sent_ns
        )
        call.suspended_ns += begin_ns - call.suspended_at_ns
        call.part_ns, call.suspended_at_ns, call.stuck_ticks = begin_ns, -1, 0
        self._kind.resume(action, ran_ns=call.ran_ns, now_ns=now_ns)

    def _part_over(
        self,
        request: Request,
        call: Nested[Request, ActionState],
        begin_ns: int,
        end_ns: int,
        awaits: tuple[int, ...] = (),
    ) -> None:
        if call.begin_ns < 0:
            call.begin_ns = begin_ns
        part = CallPart(
            key=request.key, part=call.part, begin_ns=begin_ns, end_ns=end_ns, awaits=awaits
        )
        call.part += 1
        self._cluster.emit(CallPartDone(part))

    def _reply(self, action: ActionState, child: int, code: int, reason: str) -> None:
        """Answer a child that never became a request."""
        reply = ChildReply(
            session=action.gpu.worker.session,
            action_id=action.action_id,
            child=child,
            code=int(code),
            reason=reason,
        )
        self._cluster.emit(ToWorker(action.gpu.worker.worker_id, reply))

    # --------------------------------------------------------------------- how calls end

    def returned(
        self, action: ActionState, outcome: Outcome, outputs: Sequence[Value], *, now_ns: int
    ) -> int:
        """The call returned: answer it. Returns 1 if it was in time, else 0."""
        request, result = action.requests[0], outcome.result
        call = request.call
        assert call is not None and isinstance(result, CallResult)
        span = outcome.span
        rest_ns = min(max(0, span.duration_ns - call.ran_ns), span.end_ns - span.begin_ns)
        if call.begin_ns < 0:
            call.begin_ns = span.begin_ns
        self._part_over(request, call, span.end_ns - rest_ns, span.end_ns)
        call.ran_ns = span.duration_ns
        call.suspended_ns = max(0, span.end_ns - span.begin_ns - span.duration_ns)
        call.action = None
        self._full_hosts.ended(action.gpu)
        if request.state is RequestState.ANSWERED:
            return 0
        output = outputs[0] if outputs and any(result.output_sizes) else None
        plan = Plan.of(action, start_ns=span.begin_ns, exec_ns=span.duration_ns)
        return self._answers.give(
            request, Code.OK, "", plan, now_ns=now_ns, output=output, tell=True
        )

    def failed(
        self, action: ActionState, outcome: Outcome, *, now_ns: int, lost: bool = False
    ) -> None:
        """The call came to nothing, or its worker was `lost`: plan it anew if that may be, else answer it."""
        request = action.requests[0]
        call = request.call
        assert call is not None
        call.action = None
        self._take_back_children(call)
        code, reason = outcome.code, outcome.reason
        if isinstance(outcome.result, ErrorResult) and code not in UNSTARTED:
            self._body_ended(action, outcome.result, now_ns)
        if request.state is RequestState.ANSWERED:
            return
        plan = Plan.of(action, start_ns=call.begin_ns, exec_ns=call.ran_ns)
        began = lost or call.begin_ns >= 0 or code not in UNSTARTED
        if began:
            self._full_hosts.ended(action.gpu)
            function = request.instance.function
            may_again = function is not None and function.idempotent and (lost or code in ENDED)
            if not may_again or request.tried_alone:
                again = f"; {ONCE_MORE}" if request.tried_alone and may_again else ""
                self._answer(request, code, f"{reason}{again}", plan)
                return
            request.tried_alone = True  # once, whatever comes
            request.excused += 1
        elif code == Code.TOO_MANY_CALLS and self._full_hosts.refused(action.gpu, reason):
            request.excused += 1  # it goes elsewhere, or there when a call has ended
        elif was_handed_back(action, code):
            request.excused += 1
        elif code == Code.EXEC_TOO_LATE and request.attempts < _MOST_MOVES:
            request.excused += 1  # what ran before it took longer than expected
        if is_pointless(request, self._cluster, self._policy, now_ns):
            self._answer(request, code, why_failed(code, reason), plan)
            return
        call.again()
        request.move(RequestState.QUEUED)
        self._policy.enqueue(request, now_ns=now_ns)

    def _body_ended(self, action: ActionState, result: ErrorResult, now_ns: int) -> None:
        """It raised, or was ended: its worker says what it ran last, if it has begun and was not suspended."""
        request = action.requests[0]
        call = request.call
        assert call is not None
        if result.part.end_ns <= 0 or call.suspended_at_ns >= 0:
            return
        part = plausible(result.part, sent_ns=action.sent_ns, now_ns=now_ns)
        self._part_over(request, call, part.begin_ns, part.end_ns)
        call.ran_ns += part.duration_ns

    # ------------------------------------------------------------------------------ answers

    def _answered(
        self, request: Request, code: int, reason: str, output: Value | None, worker_id: int
    ) -> bool:
        """`request`, a call, is being answered. True if its parent is told, or would be, and no client."""
        call = request.call
        assert call is not None
        action = call.action
        if action is not None and self._cluster.actions.get(action.action_id) is action:
            cancel = CancelCall(action.gpu.worker.session, action.action_id)
            self._cluster.emit(ToWorker(action.gpu.worker.worker_id, cancel))
        self._take_back_children(call)
        parent = request.parent
        if parent is None:
            return False
        self._arrivals.children.pop(request.key, None)
        asked_by = parent.call
        if asked_by is None or asked_by.children.get(call.child) is not request:
            return True  # its parent has ended, or begins anew
        del asked_by.children[call.child]
        action = asked_by.action
        if action is None or self._cluster.actions.get(action.action_id) is not action:
            return True  # its worker was lost
        if parent.state is RequestState.ANSWERED:
            return True
        reply = ChildReply(
            session=action.gpu.worker.session,
            action_id=action.action_id,
            child=call.child,
            code=code,
            reason=reason,
            output_size=0 if output is None else output.size,
            worker_id=worker_id,
        )
        inputs = () if output is None else (output,)
        self._cluster.emit(ToWorker(action.gpu.worker.worker_id, reply, (request.key,), inputs))
        return True

    def _take_back_children(self, call: Nested[Request, ActionState]) -> None:
        """End the children that have no answer, in slices: there may be thousands."""
        if not call.children:
            return
        self._orphans.extend(call.children.values())
        call.children.clear()
        if not self._ending:
            self._ending = True
            self._cluster.slices.begin(self._end_orphans())

    def _end_orphans(self) -> Work:
        while self._orphans:
            child = self._orphans.popleft()
            if child.state is not RequestState.ANSWERED:
                self._end(child, Code.CANCELLED, _TAKEN_BACK, tell=False)
                yield ANSWER
        self._ending = False

    # --------------------------------------------------------------------------------- time

    def forgotten(self, worker: Worker, *, now_ns: int) -> str:
        """A call that was sent long ago and that `worker` does not know, in words; empty: there is none.

        It was lost, or its result was, with a connection that broke too briefly for either side to notice.
        """
        beat = worker.beat
        if beat.session != worker.session or len(beat.calls) >= MOST_BEAT_CALLS:
            return ""
        known = set(beat.calls)
        for gpu in worker.gpus:
            for action in (*gpu.exec.outstanding, *gpu.suspended.values()):
                old = now_ns - action.sent_ns > _REACHES_WITHIN_NS
                if old and action.action_type is ActionType.CALL and action.action_id not in known:
                    return f"call {action.requests[0].key}"
        return ""

    def stuck(self, ticks: int) -> tuple[Worker, str] | None:
        """A worker that does not let a call go on for `ticks` calls of this, although a slot is free, and why.

        What it awaits, or its answer, was lost with a connection that broke too briefly to be noticed.
        """
        for gpu in self._cluster.gpus.values():
            if not gpu.suspended or len(gpu.exec.outstanding) >= gpu.exec.width:
                continue
            for action in gpu.suspended.values():
                call = action.requests[0].call
                if call is None or call.children or call.prepares:
                    continue
                call.stuck_ticks += 1
                if call.stuck_ticks >= ticks:
                    return gpu.worker, f"it does not go on with call {action.requests[0].key}"
        return None
