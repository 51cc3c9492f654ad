"""Runs calls of functions: which process has which call, what it says, and when it is ended.

Nothing here waits: `step` takes what has come, ends what has reached a limit, and returns what the worker's
brain must know. Large payloads are written in pieces, one per step and call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.core.worker.interface import (
    CallAwaits,
    CallChained,
    CallLost,
    ChildTakenBack,
    DeviceEvent,
    Op,
    OpDone,
    OpKind,
    op_failed,
)
from slosched.daemon.backends.base import Frame
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.children import ChildRunner, Watch
from slosched.daemon.backends.functions import wire
from slosched.daemon.backends.functions.arguments import Arguments
from slosched.daemon.backends.functions.guard import end_group
from slosched.daemon.backends.functions.loaded import CallChild, Root
from slosched.daemon.backends.functions.loaded_functions import LoadedFunctions
from slosched.daemon.backends.functions.parcels import Parcel, opened
from slosched.daemon.backends.functions.running_call import NEVER_NS, MakeMessage, RunningCall
from slosched.functions.function import MAX_PAYLOAD_BYTES
from slosched.messages import Span
from slosched.units import NS_PER_S, exact_bytes

#: A call that found no process waits for one for this time.
_PROCESS_WITHIN_NS = 20 * NS_PER_S
#: Results of children that a call has not taken yet.
_HELD_AT_MOST_BYTES = 1 << 30
#: What a process may say of its call. Others would say that it has not begun.
_CODES = (Code.CALL_RAISED, Code.CALL_OVER_LIMIT, Code.INVALID_INPUT)


class Runner:
    """Every unfinished call of one worker, and the `functions` that are loaded for them.

    `over` is called with each op of a call that is over. All calls together hold `shared_at_most_bytes` of
    shared memory (0: any): of more, the one that holds the most is ended.
    """

    def __init__(
        self,
        root: Root,
        watch: Watch,
        *,
        clock: Clock = now_ns,
        announce: Callable[[str], None],
        shared_at_most_bytes: int = 0,
    ) -> None:
        self._shared_at_most_bytes = shared_at_most_bytes
        self._root, self._watch, self._clock = root, watch, clock
        self.functions = LoadedFunctions(clock=clock, announce=announce)
        self._calls: dict[int, RunningCall] = {}
        self._waiting: deque[RunningCall] = deque()
        self._writing: dict[int, RunningCall] = {}  # calls with a payload that is not sent yet
        self._events: list[DeviceEvent] = []
        self._arguments = Arguments()
        self._outputs: dict[int, Frame] = {}
        self._payloads: dict[tuple[int, int], Frame] = {}
        self._leftover: list[RunningCall] = []  # their results and payloads go with the next step
        self._next_ns = NEVER_NS
        self.over: Callable[[Op], None] = lambda op: None

    # ------------------------------------------------------------------------- what is due

    def due_ns(self) -> int | None:
        """When `step` has something to do; 0: now."""
        if self._events or self._writing or self._arguments.writing or self._watch.ready:
            return 0
        if self.functions.begun:
            return 0
        return None if self._next_ns == NEVER_NS else self._next_ns

    def step(self) -> list[DeviceEvent]:
        """Take what processes said, and do what is due."""
        for ended in self._leftover:
            self._outputs.pop(ended.key, None)
        if self._leftover and self._payloads:
            keys = {each.key for each in self._leftover}
            self._payloads = {k: v for k, v in self._payloads.items() if k[0] not in keys}
        self._leftover = []
        if self._writing:
            self._write()
        elif self._arguments.writing:
            self._arguments.write()
        for child in self._watch.step():
            self._hear(child)
        now = self._clock()
        if now >= self._next_ns or self.functions.unfinished or self._waiting:
            self._do_due(now)
        events, self._events = self._events, []
        return events

    def _do_due(self, now: int) -> None:
        functions = list(self.functions)
        self._events += self.functions.step(now)
        self._assign(now)
        next_ns = NEVER_NS
        for call in list(self._calls.values()):
            next_ns = min(next_ns, self._check(call, now))
        self._check_all(now)
        for function in functions:
            if not function.failed:
                next_ns = min(next_ns, now + NS_PER_S if function.ready else function.due_ns)
        for call in self._waiting:
            next_ns = min(next_ns, call.begin_ns + _PROCESS_WITHIN_NS)
        self._next_ns = next_ns

    # ------------------------------------------------------------------------------- calls

    def keep(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._arguments.keep(action_id, frames)

    def drop_inputs(self, action_id: int) -> None:
        self._arguments.drop(action_id)

    def take_outputs(self, action_id: int) -> Sequence[Frame]:
        frame = self._outputs.pop(action_id, None)
        return () if frame is None else (frame,)

    def payload(self, action_id: int, child: int) -> Frame:
        return self._payloads.pop((action_id, child), b"")

    def launch(self, op: Op) -> None:
        """Begin a CALL, a PREPARE or a RESUME, and report its end."""
        now = self._clock()
        if op.kind is OpKind.RESUME:
            self._resume(op, now)
            return
        frames, parcel = self._arguments.take(op.action_id)
        function = self.functions.get(op.gpu_id, op.model_name)
        if function is None or not function.ready:
            why = f": {function.failed}" if function is not None and function.failed else ""
            reason = f"the function {op.model_name!r} is not loaded{why}"
            if parcel is not None:
                parcel.close()
            self._refuse(op, Code.EXEC_WEIGHTS_MISSING, reason, now)
            return
        call = RunningCall(op.action_id, function, op, now, frames, parcel)
        self._calls[call.key] = call
        child = None if function.reloads else function.take(call.key)
        if child is not None:
            self._begin(call, child, now)
        else:
            function.need_another()
            self._waiting.append(call)
            self._next_ns = 0

    def _refuse(self, op: Op, code: int, reason: str, now: int) -> None:
        self._events.append(op_failed(op, code, reason, now))
        self.over(op)

    def _assign(self, now: int) -> None:
        """Give processes that have become ready to calls that wait for one."""
        for call in list(self._waiting):
            if call.key not in self._calls:
                self._waiting.remove(call)
                call.function.need_no_more()
                continue
            child = call.function.take(call.key)
            if child is not None:
                self._waiting.remove(call)
                self._begin(call, child, now)
            elif call.function.failed or now >= call.begin_ns + _PROCESS_WITHIN_NS:
                self._waiting.remove(call)
                call.function.need_no_more()
                name = call.function.name
                reason = call.function.failed or f"no process of {name!r} became ready in time"
                self._end(call, Code.EXEC_WEIGHTS_MISSING, reason, now)

    def _begin(self, call: RunningCall, child: CallChild, now: int) -> None:
        op = call.op
        assert op is not None
        call.child = child
        prepares = op.kind is OpKind.PREPARE
        if prepares and not call.function.listed.prepares:
            # Its host part was the start of its process.
            self._host_part_over(call, op, call.span(now, now), now)
            return
        # A cold start is part of the call where each has one, and of its host part: forecasts learn it.
        whole = prepares or call.function.reloads
        self._send_begin(call, op, call.begin_ns if whole else now)

    def _send_begin(self, call: RunningCall, op: Op, now: int) -> None:
        try:
            parcel = call.parcel or Parcel(call.frames)
        except OSError as error:
            reason = f"no memory for the arguments: {error}"
            self._end(call, Code.EXEC_WEIGHTS_MISSING, reason, now)
            return
        call.frames, call.parcel = (), None
        call_id, deadline_ns = op.call_id, op.deadline_ns

        def message(parcel: Parcel) -> wire.ToCall:
            return wire.Begin(call.key, call_id, deadline_ns, parcel.size, parcel.inline)

        call.begun = True
        self._put(call, message, parcel)
        self._runs(call, op, now)

    def _resume(self, op: Op, now: int) -> None:
        call = self._calls.get(op.action_id)
        if call is None or call.child is None:
            reason = f"a suspended call of {op.model_name!r} has no process any more"
            self._refuse(op, Code.MODEL_PROCESS_ENDED, reason, now)
            return
        if not call.begun:
            call.op = op
            self._send_begin(call, op, now)
            return
        key = call.key
        self._put(call, lambda parcel: wire.Resume(key), Parcel(()))
        self._runs(call, op, now)

    def _host_part_over(self, call: RunningCall, op: Op, span: Span, now: int) -> None:
        call.suspended(now, 0)
        self._next_ns = min(self._next_ns, call.due_ns)
        self._events.append(OpDone(op.op_id, span))

    def _runs(self, call: RunningCall, op: Op, now: int) -> None:
        call.begins(op, now)
        self._next_ns = min(self._next_ns, call.due_ns)

    def deliver(
        self, action_id: int, child: int, *, code: int, reason: str, frames: Sequence[Frame]
    ) -> None:
        call = self._calls.get(action_id)
        if call is None or call.child is None or call.child.ended:
            return
        size = sum(len(frame) for frame in frames)
        call.held_bytes += size
        if call.held_bytes > _HELD_AT_MOST_BYTES:
            limit = exact_bytes(_HELD_AT_MOST_BYTES)
            code, reason, frames = Code.CALL_OVER_LIMIT, f"results of children above {limit}", ()
        try:
            parcel = Parcel(frames)
        except OSError as error:
            code, reason = Code.CALL_OVER_LIMIT, f"no memory for the child's result: {error}"
            parcel = Parcel(())
        key, text = call.key, reason

        def message(parcel: Parcel) -> wire.ToCall:
            return wire.Deliver(key, child, code, text, parcel.size, parcel.inline)

        self._put(call, message, parcel)

    # -------------------------------------------------------------------- to the processes

    def _put(self, call: RunningCall, message: MakeMessage, parcel: Parcel) -> None:
        call.put(message, parcel)
        if call.writing:
            self._writing[call.key] = call

    def _write(self) -> None:
        """Write a piece of each payload that is on its way."""
        for call in list(self._writing.values()):
            try:
                call.write()
            except OSError as error:
                reason = f"no memory for a payload: {error}"
                self._end(call, Code.PROCESS_ENDED, reason, self._clock())
            if not call.writing:
                self._writing.pop(call.key, None)

    # ------------------------------------------------------------------ from the processes

    def _hear(self, child: ChildRunner) -> None:
        if not isinstance(child, CallChild):
            self._next_ns = 0  # a template: `LoadedFunction.step` hears it
            return
        while child.mail:
            packet, fds = child.mail.popleft()
            try:
                wrong = self._heard(child, packet, fds)
            except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OSError) as error:
                wrong = f"it sent nonsense ({error})"
            finally:
                packets.close_all(fds)
            if wrong:
                child.drop_mail()
                child.kill(wrong)
        if child.ended:
            self._ended(child)

    def _heard(self, child: CallChild, packet: bytes, fds: list[int]) -> str:
        """Take in one message. Returns what is wrong with it; empty if nothing is."""
        owner = child.owner
        assert owner is not None
        if child.loading:
            child.loading = False
            self._next_ns = 0
            return "" if owner.hear(packet) else "it sent nonsense"
        message = wire.from_call.decode(packet)
        if isinstance(message, wire.Ready):
            owner.is_ready(child, message)
            self._next_ns = 0
            return ""
        call = self._calls.get(child.call)
        if call is None or call.op is None:
            return "it spoke although it runs no call" if child.call >= 0 else ""
        if isinstance(message, wire.Chained):
            self._chained(call, message, fds)
        elif isinstance(message, wire.TakenBack):
            self._events.append(ChildTakenBack(call.key, message.child))
        elif isinstance(message, wire.Awaits):
            self._awaits(call, message)
        else:
            self._returned(call, child, message, fds)
        return ""

    def _chained(self, call: RunningCall, message: wire.Chained, fds: list[int]) -> None:
        frame = opened(message.payload, message.size, fds, MAX_PAYLOAD_BYTES)
        if message.size:
            self._payloads[call.key, message.child] = frame
        chained = CallChained(
            action_id=call.key,
            child=message.child,
            function=message.function,
            size=message.size,
            slo_ns=message.slo_ns,
            size_class=message.size_class,
            near=message.near,
            near_child=message.near_child,
            ran_ns=call.ran_ns + max(0, message.ran_ns),
        )
        self._events.append(chained)

    def _awaits(self, call: RunningCall, message: wire.Awaits) -> None:
        op, now = call.op, self._clock()
        assert op is not None
        span = call.span(message.end_ns, now)
        if op.kind is OpKind.PREPARE:
            self._host_part_over(call, op, span, now)
            return
        call.suspended(now, span.duration_ns)
        self._next_ns = min(self._next_ns, call.due_ns)
        self._events.append(CallAwaits(op.op_id, span, message.children))
        self.over(op)

    def _returned(
        self,
        call: RunningCall,
        child: CallChild,
        message: wire.Returned | wire.Raised,
        fds: list[int],
    ) -> None:
        op = call.op
        assert op is not None
        span = call.span(message.end_ns, self._clock())
        if isinstance(message, wire.Raised):
            code = message.code if message.code in _CODES else Code.CALL_RAISED
            done = OpDone(op.op_id, span, code, message.text)
        else:
            most = call.function.listed.info.max_payload_bytes
            frame = opened(message.payload, message.size, fds, most)
            sizes = (message.size,) if message.size else ()
            if sizes:
                self._outputs[call.key] = frame
            done = OpDone(op.op_id, span, output_sizes=sizes)
        self._events.append(done)
        self._forget(call)
        self.over(op)
        if message.again:
            call.function.give_back(child)
        else:
            child.call = -1
            call.function.end(child, "its call is over")

    # -------------------------------------------------------------------------------- ends

    def _ended(self, child: CallChild) -> None:
        """The process is gone, or is being ended."""
        owner = child.owner
        assert owner is not None
        owner.gone(child)
        self._next_ns = 0
        call = self._calls.get(child.call)
        child.call = -1
        if call is not None:
            reason = f"the process of a call of {owner.name!r} ended: {child.ended}"
            self._end(call, Code.MODEL_PROCESS_ENDED, reason, self._clock())

    def end(self, action_id: int, reason: str) -> None:
        """End the process of the call; an op of it that runs is reported."""
        call = self._calls.get(action_id)
        if call is not None:
            self._end(call, Code.PROCESS_ENDED, reason, self._clock(), wanted=True)

    def _end(
        self, call: RunningCall, code: int, reason: str, now: int, *, wanted: bool = False
    ) -> None:
        """End the call and its process. A suspended call that was `wanted` to end is not reported."""
        op, child = call.op, call.child
        self._forget(call)
        if child is not None:
            child.call = -1
            call.function.end(child, reason)
        if op is not None:
            span = Span(call.begin_ns, now, now - call.begin_ns)
            self._events.append(OpDone(op.op_id, span, code, reason))
            self.over(op)
        elif not wanted:
            self._events.append(CallLost(call.key, code, reason))

    def _forget(self, call: RunningCall) -> None:
        call.op = None
        self._calls.pop(call.key, None)
        self._writing.pop(call.key, None)
        call.stop_writing()
        self._leftover.append(call)

    def _check(self, call: RunningCall, now: int) -> int:
        """End the call if it is over a limit. Returns when to look again."""
        reason = call.over_limit(now, self._clock)
        if not reason:
            return call.due_ns
        self._end_group(call, reason, now)
        return NEVER_NS

    def _check_all(self, now: int) -> None:
        """End the call that holds the most shared memory if all of them hold too much."""
        most_bytes = self._shared_at_most_bytes
        if most_bytes and sum(call.shared_bytes for call in self._calls.values()) > most_bytes:
            call = max(self._calls.values(), key=_shared_bytes)
            mine, limit = exact_bytes(call.shared_bytes), exact_bytes(most_bytes)
            words = f"the shared memory of all calls of a worker, {limit}; this one has the most, {mine}"
            self._end_group(call, words, now)

    def _end_group(self, call: RunningCall, reason: str, now: int) -> None:
        if call.child is not None:
            # Its template does that too, but those that fork without end leave it little time for it.
            end_group(call.child.pid)
        self._end(call, Code.CALL_OVER_LIMIT, reason, now)

    def pid_of(self, action_id: int) -> int:
        """The process of an unfinished call; 0: it has none."""
        call = self._calls.get(action_id)
        child = None if call is None else call.child
        return 0 if child is None or child.ended else child.pid

    def pids(self, name: str) -> list[int]:
        """The processes that calls of the function have, or may get."""
        loaded = self.functions.named(name)
        return [child.pid for each in loaded for child in each.children if child.ready]

    def close(self) -> None:
        """End every process; bounded by two seconds."""
        self.functions.close()
        for call in list(self._calls.values()):
            self._forget(call)
        self._arguments.close()
        self._root.close()
        for child in self._watch.step():
            if isinstance(child, CallChild):
                child.drop_mail()
        self._watch.close()


def _shared_bytes(call: RunningCall) -> int:
    return call.shared_bytes
