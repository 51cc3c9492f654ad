"""Call: one call of a function, in a slot of the host or on a GPU's exec lane (calls.py has its states).

A call that was answered with one of the codes EXEC_TOO_LATE, EXEC_WEIGHTS_MISSING, TOO_MANY_CALLS,
SHUTTING_DOWN and CANCELLED, and which the controller did not cancel, has not begun: it may be sent again. One
that has begun and is ended by its worker has the code PROCESS_ENDED.
"""

from __future__ import annotations

from slosched.call_messages import (
    MOST_CHILDREN,
    Call,
    CallPrepared,
    CallResult,
    CallResumed,
    CallSuspended,
    CancelCall,
    ChildCancel,
    ChildReply,
    ChildRequest,
)
from slosched.codes import ActionType, Code
from slosched.core.worker.calls import CallPhase, CallState
from slosched.core.worker.interface import (
    CallAwaits,
    CallChained,
    CallLost,
    ChildTakenBack,
    EndCall,
    Op,
    OpDone,
    OpKind,
    ToController,
    Withdraw,
)
from slosched.core.worker.kinds.base import Acceptance, ActionKind, Fault, peer_span
from slosched.core.worker.lanes import Role
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import NO_EARLIEST_NS, NO_LATEST_NS, PendingAction, Step
from slosched.messages import MAX_TEXT, NO_SPAN, Span, WorkerToController
from slosched.units import NS_PER_S, format_duration

#: A controller refuses a child beyond MOST_CHILDREN. A call with this number of them open asks faster than it
#: is answered, and is ended.
MOST_OPEN = 2 * MOST_CHILDREN
#: Codes of an op that did not begin: one that has a slot may wait for a process, and get none.
_NOT_BEGUN = (Code.EXEC_TOO_LATE, Code.CANCELLED, Code.EXEC_WEIGHTS_MISSING)
#: A call that is suspended for this time after its deadline, and for its own limit, is ended: an answer was
#: lost.
_SUSPENDED_AFTER_DEADLINE_NS = 60 * NS_PER_S
#: Before the `earliest` of every call that has not begun.
_BEFORE_ALL_NS = -NO_LATEST_NS


class CallKind(ActionKind[Call]):
    message = Call
    action_type = ActionType.CALL
    takes_inputs = True

    def __init__(self, pipeline: Pipeline, acceptance: Acceptance) -> None:
        super().__init__(pipeline, acceptance)
        self._calls = pipeline.ledger.calls
        self._host = Step(Role.PREPARE, self._start, self._host_ended)
        self._first = Step(Role.EXEC, self._start, self._ended)
        self._after_host = Step(Role.EXEC, self._enter, self._ended)
        self._next = Step(Role.EXEC, self._go_on, self._ended)

    # ---------------------------------------------------------------------------- arrival

    def check(self, action: PendingAction[Call], frames: tuple[int, ...]) -> Fault | None:
        message = action.message
        fault = self._locate(action, message, Code.COPY_INPUT_UNKNOWN_MODEL)
        if fault is not None:
            return fault
        assert action.instance is not None
        function, name = action.instance.function, action.instance.name
        if function is None:
            return Code.INVALID_ACTION, f"{name!r} is a model, which an Infer runs"
        if not 0 <= message.size_class < function.size_classes:
            most = function.size_classes - 1
            reason = f"{name!r} has the size classes 0 to {most}, and not {message.size_class}"
            return Code.COPY_INPUT_INVALID_INPUT, reason
        if frames != ((message.input_size,) if message.input_size else ()):
            reason = f"input_size says {message.input_size} bytes, the frames have {list(frames)}"
            return Code.COPY_INPUT_BAD_SIZES, reason
        if 0 < function.max_payload_bytes < message.input_size:
            reason = (
                f"{message.input_size} bytes of arguments; {name!r} takes at most "
                f"{function.max_payload_bytes}"
            )
            return Code.COPY_INPUT_INVALID_INPUT, reason
        return None

    def begin(self, action: PendingAction[Call], now_ns: int) -> None:
        assert action.gpu is not None
        action.call = self._calls.add(action.key, action.message.action_id)
        self._ledger.use_weights(action)
        assert action.instance is not None and action.instance.function is not None
        step = self._host if action.instance.function.prepare_ns else self._first
        self._pipeline.enqueue(action.gpu.lanes[step.role], action.earliest_ns, action, step)

    # ------------------------------------------------------------------------------- steps

    def _start(self, action: PendingAction[Call], now_ns: int) -> None:
        if self._pipeline.late(action, Code.EXEC_TOO_LATE, now_ns):
            return
        gpu, instance, state = action.gpu, action.instance, action.call
        assert gpu is not None and instance is not None and state is not None
        if not gpu.cache.resident(instance.model_id):
            reason = f"the function {instance.name!r} is not ready on device {gpu.gpu_id}"
            self._ledger.fail(action, Code.EXEC_WEIGHTS_MISSING, reason, now_ns)
        elif self._calls.full:
            reason = (
                f"this worker has {self._calls.most} unfinished calls, which is its limit (most_calls); "
                f"{self._calls.suspended} of them await children"
            )
            self._ledger.fail(action, Code.TOO_MANY_CALLS, reason, now_ns)
        else:
            prepares = action.step is self._host
            self._calls.begin(state, CallPhase.PREPARING if prepares else CallPhase.RUNNING)
            self._launch(OpKind.PREPARE if prepares else OpKind.CALL, action)

    def _host_ended(self, action: PendingAction[Call], done: OpDone, now_ns: int) -> None:
        """Its host part is over: let it wait for the lane, behind what came before."""
        state, gpu = action.call, action.gpu
        assert state is not None and gpu is not None
        if state.ending is not None or done.code:
            ending = state.ending or (done.code, _shown(done.code, done.reason))
            self._ledger.fail(action, *ending, now_ns)
            return
        state.phase, state.prepared = CallPhase.READY, True
        part = peer_span(self._clock, done.span)
        message = action.message
        self._tell(action, CallPrepared(message.session, message.action_id, part))
        self._pipeline.enqueue(gpu.lanes[Role.EXEC], now_ns, action, self._after_host)

    def _enter(self, action: PendingAction[Call], now_ns: int) -> None:
        assert action.call is not None
        action.call.phase = CallPhase.RUNNING
        self._launch(OpKind.RESUME, action)

    def _go_on(self, action: PendingAction[Call], now_ns: int) -> None:
        assert action.call is not None
        action.call.phase = CallPhase.RUNNING
        session = action.message.session
        self._tell(action, CallResumed(session, action.message.action_id))
        self._launch(OpKind.RESUME, action)

    def _launch(self, kind: OpKind, action: PendingAction[Call]) -> None:
        message, gpu, instance = action.message, action.gpu, action.instance
        assert gpu is not None and instance is not None
        assert action.call is not None
        begins = kind is not OpKind.RESUME
        op = Op(
            op_id=self._ledger.next_seq(),
            kind=kind,
            gpu_id=gpu.gpu_id,
            model_id=instance.model_id,
            action_id=action.key,
            batch_size=1,
            request_count=1,
            input_sizes=(message.input_size,),
            model_name=instance.name,
            earliest_ns=action.earliest_ns if begins else NO_EARLIEST_NS,
            latest_ns=action.latest_ns if begins else NO_LATEST_NS,
            call_id=message.call_id,
            deadline_ns=self._clock.to_local_ns(message.deadline_ns),
            size_class=message.size_class,
        )
        action.call.op_id = op.op_id
        self._pipeline.launch(gpu.lanes[action.step.role], action, op)

    def _ended(self, action: PendingAction[Call], done: OpDone, now_ns: int) -> None:
        state = action.call
        assert state is not None and action.gpu is not None
        begun = state.first_ns >= 0 or state.prepared
        if done.code == Code.CANCELLED and begun and state.ending is None:
            # It was about to go on, and its device gave that back: its process is there still.
            state.ending = Code.PROCESS_ENDED, "the call had no slot when its worker ended it"
            self._ledger.effects.append(EndCall(state.key, state.ending[1]))
        self._add_part(state, done.span)
        clock = self._clock
        if state.ending is not None or done.code:
            ending = state.ending or (done.code, _shown(done.code, done.reason))
            part = NO_SPAN if done.code in _NOT_BEGUN else peer_span(clock, done.span)
            self._ledger.fail(action, *ending, now_ns, part=part)
            return
        result = CallResult(
            session=action.message.session,
            action_id=action.message.action_id,
            gpu_id=action.gpu.gpu_id,
            exec=peer_span(clock, Span(state.first_ns, done.span.end_ns, state.ran_ns)),
            output_sizes=done.output_sizes,
            children=state.asked,
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
        )
        self._ledger.answer(action, result, action.key if any(done.output_sizes) else None)

    def _add_part(self, state: CallState, span: Span) -> None:
        state.ran_ns += span.duration_ns
        if state.first_ns < 0:
            state.first_ns = span.begin_ns

    # --------------------------------------------------------------- what a running call says

    def awaits(self, event: CallAwaits, now_ns: int) -> None:
        """The call gives its slot away until its children are answered."""
        action: PendingAction[Call] = self._pipeline.op_over(event.op_id)
        state = action.call
        assert state is not None
        self._add_part(state, event.span)
        if state.ending is not None:
            part = peer_span(self._clock, event.span)
            self._ledger.fail(action, *state.ending, now_ns, part=part)
            return
        state.phase = CallPhase.SUSPENDED
        strange = next((c for c in event.children if not 0 <= c < state.asked), None)
        if strange is not None:
            reason = f"it awaits child {strange}, and asked for {state.asked}"
            self.end(state, Code.RUNTIME_ERROR, reason, now_ns)
            return
        if self._pipeline.closing:
            reason = "the worker is shutting down, and the call awaits children"
            self.end(state, Code.PROCESS_ENDED, reason, now_ns)
            return
        state.awaited = state.open.intersection(event.children)
        named = event.children
        if len(named) > MOST_CHILDREN:  # what has its answer need not be named
            named = tuple(child for child in named if child in state.awaited)[:MOST_CHILDREN]
        suspended = CallSuspended(
            session=action.message.session,
            action_id=action.message.action_id,
            ran_ns=state.ran_ns,
            part=peer_span(self._clock, event.span),
            children=named,
        )
        self._tell(action, suspended)
        if not state.awaited:
            self._ready(action, state)

    def chained(self, event: CallChained, now_ns: int) -> None:
        """The call asks for a child."""
        action = self._of_key(event.action_id)
        state = None if action is None else action.call
        if action is None or state is None or state.ending is not None:
            return  # it has ended, or will
        if event.child != state.asked:
            reason = f"it asks for child {event.child} after {state.asked} children"
            self.end(state, Code.RUNTIME_ERROR, reason, now_ns)
            return
        if len(state.open) >= MOST_OPEN:
            reason = f"{MOST_OPEN} of its children are unanswered"
            self.end(state, Code.CALL_OVER_LIMIT, reason, now_ns)
            return
        state.asked += 1
        state.open.add(event.child)
        request = ChildRequest(
            session=action.message.session,
            action_id=action.message.action_id,
            child=event.child,
            function=event.function,
            input_size=event.size,
            slo_ns=event.slo_ns,
            size_class=event.size_class,
            near=event.near,
            near_child=event.near_child,
            ran_ns=event.ran_ns,
        )
        self._tell(action, request, output_of=action.key)

    def taken_back(self, event: ChildTakenBack) -> None:
        """The call does not want a child any more. The child's answer comes all the same."""
        action = self._of_key(event.action_id)
        if action is None or action.call is None or event.child not in action.call.open:
            return
        message = action.message
        self._tell(action, ChildCancel(message.session, message.action_id, event.child))

    def lost(self, event: CallLost, now_ns: int) -> None:
        """The process of a call that holds no slot is gone. One that goes on is reported by its op."""
        action = self._of_key(event.action_id)
        state = None if action is None else action.call
        if state is not None and state.phase in (CallPhase.SUSPENDED, CallPhase.READY):
            self.end(state, event.code, event.reason, now_ns)

    # ----------------------------------------------------------------- what the controller says

    def answered(self, message: ChildReply) -> int | None:
        """A child has its answer. Returns the key of the call that gets it, None if none wants it."""
        state = self._calls.find(message.action_id)
        if state is None or state.ending is not None or message.child not in state.open:
            return None
        state.open.discard(message.child)
        if state.phase is CallPhase.SUSPENDED:
            state.awaited.discard(message.child)
            if not state.awaited:
                self._ready(self._ledger.unanswered[state.key], state)
        return state.key

    def cancel(self, message: CancelCall, now_ns: int) -> None:
        state = self._calls.find(message.action_id)
        if state is not None:
            self.end(state, Code.CANCELLED, "cancelled: it was taken back", now_ns)

    # ------------------------------------------------------------------------------- ends

    def end(self, state: CallState, code: int, reason: str, now_ns: int) -> None:
        """End the call, whatever it does: at once, unless its process runs and is to be reported."""
        ledger, action = self._ledger, self._ledger.unanswered[state.key]
        if state.phase in (CallPhase.RUNNING, CallPhase.PREPARING):
            if state.ending is None:
                state.ending = code, reason
                gpu = action.gpu
                if gpu is not None and gpu.lanes[action.step.role].ahead_ns:
                    # It may only be armed; then no process could end.
                    ledger.effects.append(Withdraw(state.op_id, gpu.gpu_id))
                ledger.effects.append(EndCall(state.key, reason))
            return
        if state.phase in (CallPhase.QUEUED, CallPhase.READY):
            self._pipeline.take_back(action)
        if state.phase is not CallPhase.QUEUED:
            ledger.effects.append(EndCall(state.key, reason))
        ledger.fail(action, code, reason, now_ns)

    def end_begun(self, reason: str, now_ns: int, *, running: bool) -> None:
        """End the calls that have begun with code 100: those without a slot, or with `running` all of them."""
        for state in list(self._calls.begun.values()):
            if running or state.phase is not CallPhase.RUNNING:
                self.end(state, Code.PROCESS_ENDED, reason, now_ns)

    def end_forgotten(self, now_ns: int) -> None:
        """End what waits for children long after its deadline: their answers were lost."""
        for state in list(self._calls.begun.values()):
            if state.phase is not CallPhase.SUSPENDED:
                continue
            action = self._ledger.unanswered[state.key]
            assert action.instance is not None and action.instance.function is not None
            after_ns = max(action.instance.function.limit_ns, _SUSPENDED_AFTER_DEADLINE_NS)
            deadline_ns = self._clock.to_local_ns(action.message.deadline_ns)
            if now_ns - max(deadline_ns, action.received_ns) > after_ns:
                reason = (
                    f"no answer of {len(state.awaited)} children that it awaits came within "
                    f"{format_duration(after_ns)} after its deadline"
                )
                self.end(state, Code.CALL_OVER_LIMIT, reason, now_ns)

    # ------------------------------------------------------------------------------ helpers

    def _of_key(self, key: int) -> PendingAction[Call] | None:
        return self._ledger.unanswered.get(key)

    def _ready(self, action: PendingAction[Call], state: CallState) -> None:
        """Let it wait for a slot, before all calls that have not begun."""
        assert action.gpu is not None
        state.phase = CallPhase.READY
        lane = action.gpu.lanes[Role.EXEC]
        self._pipeline.enqueue(lane, _BEFORE_ALL_NS, action, self._next)

    def _tell(
        self,
        action: PendingAction[Call],
        message: WorkerToController,
        output_of: int | None = None,
    ) -> None:
        self._ledger.effects.append(ToController(action.peer, message, output_of))


def _shown(code: int, reason: str) -> str:
    """A traceback that is too long keeps its end, which says what was raised."""
    if code != Code.CALL_RAISED or len(reason) <= MAX_TEXT:
        return reason
    return "...\n" + reason[4 - MAX_TEXT :]
