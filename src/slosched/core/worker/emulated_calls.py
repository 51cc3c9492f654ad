"""Emulated slots of a host: calls of functions that follow scripts, in exact time, and compute nothing.

The device is pure, as the emulated GPU (emulated.py) is, so a graph of calls runs in virtual time. A frame is
its first MARK_BYTES here, and a call answers with its own mark: a result that reaches another parent, or
belongs to another child, is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from slosched.codes import Code
from slosched.config import EmulationNoise
from slosched.core.worker.call_scripts import AwaitAll as AwaitAll
from slosched.core.worker.call_scripts import Chain as Chain
from slosched.core.worker.call_scripts import EmulatedFunction as EmulatedFunction
from slosched.core.worker.call_scripts import Exit as Exit
from slosched.core.worker.call_scripts import Raise as Raise
from slosched.core.worker.call_scripts import Return as Return
from slosched.core.worker.call_scripts import Run as Run
from slosched.core.worker.call_scripts import Script as Script
from slosched.core.worker.call_scripts import Step as Step
from slosched.core.worker.call_scripts import TakeBack as TakeBack
from slosched.core.worker.call_scripts import mark_of as mark_of
from slosched.core.worker.call_scripts import prepare_function as prepare_function
from slosched.core.worker.emulated import SplitMix64, is_noisy, noisy_ns
from slosched.core.worker.interface import (
    CallAwaits,
    CallChained,
    CallLost,
    ChildTakenBack,
    DeviceEvent,
    Op,
    OpDone,
    OpKind,
    WeightsLost,
    op_failed,
)
from slosched.messages import Span
from slosched.units import format_duration

#: A fault: how long a suspended call has been when its process ends.
_DIES_AFTER_NS = 1_000_000


@dataclass(slots=True, eq=False)
class _Life:
    """One unfinished call. `op_id` is that of the part that runs; -1: it has no slot, and nothing of it runs.

    One that `prepares` runs its host part, and has no slot either.
    """

    device: EmulatedHost
    function: EmulatedFunction
    script: Script
    mark: bytes
    key: int
    op_id: int = -1
    prepares: bool = False
    place: int = 0  # of the next step
    ran_ns: int = 0  # before the part that runs
    begun_ns: int = 0  # of the part that runs
    dies: bool = False  # a fault: in its next Run
    end: tuple[Code, str] | None = None  # how it ends when what it runs is over
    marks: list[bytes] = field(default_factory=list)  # of its children
    answers: dict[int, tuple[int, str]] = field(default_factory=dict)  # code and reason, by child


def _lost(life: _Life) -> CallLost:
    reason = (
        f"the process of a call of {life.function.name!r} ended while it was suspended, by a fault"
    )
    return CallLost(life.key, Code.MODEL_PROCESS_ENDED, reason)


class EmulatedHost:
    """Implements `Device`: `slots` calls run at a time, and each follows its script.

    `tag` tells its marks from those of other hosts. `on_begin(function, mark)` is called when a body begins
    that has arguments. The methods from `keep_inputs` on are for the frames, as those of CallPort and Backend
    are, in marks. The devices of one worker share these: all but the first are made with it as `beside`.
    `noise` disturbs each Run of a script as it does an exec; it has no copies here.
    """

    steady = False  # `end` changes what comes next
    free_copies = True
    arm_ahead_ns = 0

    def __init__(
        self,
        functions: Sequence[EmulatedFunction],
        slots: int,
        gpu_id: int = 0,
        *,
        tag: int = 0,
        on_begin: Callable[[str, bytes], None] | None = None,
        beside: EmulatedHost | None = None,
        noise: EmulationNoise | None = None,
    ) -> None:
        self.functions: Mapping[str, EmulatedFunction] = {each.name: each for each in functions}
        self.slots = slots
        self.gpu_id = gpu_id
        self._tag = tag & 0xFFFFFFFF
        self._on_begin = on_begin
        self._noise = noise if noise is not None and is_noisy(noise) else None
        seed = 0 if noise is None else noise.seed
        self._random = SplitMix64((tag + seed) * 0x10001 + gpu_id + 1)
        #: Fault injection, as on an emulated GPU: a multiplier on run times; the share of parts of calls in
        #: which the call raises, and the share in which, or behind which, its process ends; the share of
        #: functions that do not get ready.
        self.slowdown = 1.0
        self.failing = self.ending = self.spoiling = 0.0
        self._running = 0
        #: By key, as the next ones.
        self._lives: dict[int, _Life] = {} if beside is None else beside._lives
        self._inputs: dict[int, bytes] = {} if beside is None else beside._inputs
        self._results: dict[int, bytes] = {} if beside is None else beside._results
        #: By key and number of the child.
        self._payloads: dict[tuple[int, int], bytes] = {} if beside is None else beside._payloads
        self._ready: dict[int, str] = {}  # names by model id
        #: (time, seq, the call that goes on, or what is reported)
        self._due: list[tuple[int, int, _Life | None, DeviceEvent | None]] = []
        self._seq = 0

    # ------------------------------------------------------------------------------- device

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        function = self.functions.get(op.model_name)
        if function is None:
            return op_failed(op, Code.RUNTIME_ERROR, f"no function {op.model_name!r}", now_ns)
        if op.kind is OpKind.LOAD_WEIGHTS:
            self._make_ready(function, op, now_ns)
            return None
        begun = self._lives.get(op.action_id)
        if begun is not None and op.kind is OpKind.RESUME:
            life = begun
        elif op.kind in (OpKind.CALL, OpKind.PREPARE):
            life = self._begin(function, op)
        else:
            return op_failed(op, Code.RUNTIME_ERROR, f"a host does no {op.kind.name}", now_ns)
        if op.kind is OpKind.PREPARE:
            life.op_id, life.begun_ns, life.prepares = op.op_id, now_ns, True
            self._run(life, life.script.host_ns, now_ns)
            return None
        if self._running >= self.slots:
            raise AssertionError(f"{self._running + 1} calls would run in {self.slots} slots")
        self._running += 1
        life.op_id, life.begun_ns = op.op_id, now_ns
        life.dies = self._falls(self.ending)
        self._push(now_ns, life, None)
        return None

    def _begin(self, function: EmulatedFunction, op: Op) -> _Life:
        mark = self._inputs.pop(op.action_id, b"")
        life = _Life(self, function, function.script(mark), mark, op.action_id)
        self._lives[life.key] = life
        if self._on_begin is not None and mark:
            self._on_begin(function.name, mark)
        return life

    def withdraw(self, op_id: int) -> OpDone | None:
        return None  # each op has begun

    def poll(self, *, now_ns: int) -> list[DeviceEvent]:
        events: list[DeviceEvent] = []
        due = self._due
        while due and due[0][0] <= now_ns:
            at_ns, _, life, event = heappop(due)
            if isinstance(event, CallLost):
                self._lose_suspended(event, events)
            elif event is not None:
                events.append(event)
            elif life is not None and self._lives.get(life.key) is life:
                self._go_on(life, at_ns, events)
        return events

    def next_event_ns(self) -> int | None:
        return self._due[0][0] if self._due else None

    @property
    def unfinished(self) -> int:
        """Calls of the worker that have begun and not ended."""
        return len(self._lives)

    @property
    def running(self) -> int:
        """Calls in its slots."""
        return self._running

    @property
    def frames_kept(self) -> int:
        """Frames that are kept for calls, running or not."""
        return len(self._inputs) + len(self._results) + len(self._payloads)

    def _push(self, at_ns: int, life: _Life | None, event: DeviceEvent | None) -> None:
        self._seq += 1
        heappush(self._due, (at_ns, self._seq, life, event))

    def _falls(self, share: float) -> bool:
        return share > 0 and self._random.uniform() < share

    def _make_ready(self, function: EmulatedFunction, op: Op, now_ns: int) -> None:
        end_ns = now_ns + function.cold_ns
        span = Span(now_ns, end_ns, function.cold_ns)
        if self._falls(self.spoiling):
            reason = f"{function.name!r} did not get ready, by a fault"
            self._push(end_ns, None, OpDone(op.op_id, span, Code.RUNTIME_ERROR, reason))
            return
        self._ready[op.model_id] = function.name
        self._push(end_ns, None, OpDone(op.op_id, span))

    # -------------------------------------------------------------------------------- calls

    def _go_on(self, life: _Life, now_ns: int, events: list[DeviceEvent]) -> None:
        """Follow the script until time passes, or the call gives its slot away."""
        if life.end is not None:
            self._over(life, now_ns, events, *life.end)
            return
        if life.prepares:
            events.append(OpDone(life.op_id, self._part(life, now_ns)))
            if self._falls(self.ending):
                self._push(now_ns + _DIES_AFTER_NS, life, _lost(life))
            return
        steps = life.script.steps
        while True:
            step = steps[life.place] if life.place < len(steps) else Return()
            if isinstance(step, AwaitAll):
                if not self._await(life, step, now_ns, events):
                    return
                continue
            life.place += 1
            if isinstance(step, Run):
                self._run(life, step.ns, now_ns)
                return
            if isinstance(step, Chain):
                self._chain(life, step, now_ns, events)
            elif isinstance(step, TakeBack):
                events.append(ChildTakenBack(life.key, step.child))
            else:
                self._finish(life, step, now_ns, events)
                return

    def _run(self, life: _Life, ns: int, now_ns: int) -> None:
        if self.slowdown != 1.0:
            ns = max(1, round(ns * self.slowdown))
        if self._noise is not None and ns:
            ns = noisy_ns(ns, self._noise, self._random)
        limit_ns = life.function.info.limit_ns
        left_ns = limit_ns - life.ran_ns - (now_ns - life.begun_ns)
        if life.dies:
            ns //= 2
            life.end = Code.MODEL_PROCESS_ENDED, "its process ended, by a fault"
        elif limit_ns and ns > left_ns:
            ns = max(0, left_ns)
            reason = f"it ran for longer than {format_duration(limit_ns)}, its limit"
            life.end = Code.CALL_OVER_LIMIT, reason
        elif self._falls(self.failing):
            life.end = Code.CALL_RAISED, "RuntimeError: by a fault"
        self._push(now_ns + ns, life, None)

    def _await(self, life: _Life, step: AwaitAll, now_ns: int, events: list[DeviceEvent]) -> bool:
        """True if all are answered, and the call goes on in its slot."""
        children = step.children or tuple(range(len(life.marks)))
        if any(child not in life.answers for child in children):
            events.append(CallAwaits(life.op_id, self._part(life, now_ns), children))
            if self._falls(self.ending):
                self._push(now_ns + _DIES_AFTER_NS, life, _lost(life))
            return False
        life.place += 1
        failed = next((c for c in children if life.answers[c][0]), None)
        if failed is not None and not step.catch:
            code, reason = life.answers[failed]
            text = f"CallFailed: child {failed} ended with code {code}: {reason}"
            self._over(life, now_ns, events, Code.CALL_RAISED, text)
            return False
        return True

    def _chain(self, life: _Life, step: Chain, now_ns: int, events: list[DeviceEvent]) -> None:
        for turn in range(step.n):
            child = len(life.marks)
            identity = b"".join(
                (each & 0xFFFFFFFF).to_bytes(4, "big") for each in (self._tag, life.key, child)
            )
            mark = mark_of(step.numbers[turn % len(step.numbers)], identity)
            life.marks.append(mark)
            self._payloads[life.key, child] = mark
            chained = CallChained(
                action_id=life.key,
                child=child,
                function=step.function,
                size=step.in_bytes,
                slo_ns=step.slo_ns,
                size_class=step.size_class,
                near=step.near,
                near_child=step.near_child,
                ran_ns=life.ran_ns + now_ns - life.begun_ns,
            )
            events.append(chained)

    def _finish(
        self, life: _Life, step: Raise | Exit | Return, now_ns: int, events: list[DeviceEvent]
    ) -> None:
        if isinstance(step, Raise):
            self._over(life, now_ns, events, Code.CALL_RAISED, step.text)
        elif isinstance(step, Exit):
            reason = f"the process of a call of {life.function.name!r} ended"
            self._over(life, now_ns, events, Code.MODEL_PROCESS_ENDED, reason)
        else:
            if step.size:
                self._results[life.key] = life.mark
            self._over(life, now_ns, events, Code.OK, "", (step.size,))

    def _over(
        self,
        life: _Life,
        now_ns: int,
        events: list[DeviceEvent],
        code: Code,
        reason: str,
        output_sizes: tuple[int, ...] = (),
    ) -> None:
        """The running call has ended."""
        del self._lives[life.key]
        op_id = life.op_id
        span = self._part(life, now_ns)
        events.append(OpDone(op_id, span, code, reason, output_sizes=output_sizes))

    def _part(self, life: _Life, now_ns: int) -> Span:
        """What runs is over, and its slot is free."""
        ran_ns = now_ns - life.begun_ns
        life.op_id = -1
        if life.prepares:
            life.prepares = False
        else:
            life.ran_ns += ran_ns
            self._running -= 1
        return Span(life.begun_ns, now_ns, ran_ns)

    # ------------------------------------------------------------------------------- frames

    def keep_inputs(self, action_id: int, mark: bytes) -> None:
        """The arguments of a call that has arrived."""
        self._inputs[action_id] = mark

    def drop_inputs(self, action_id: int) -> None:
        """The call has ended without an answer of its own: nothing of it is kept."""
        self._inputs.pop(action_id, None)
        self._results.pop(action_id, None)

    def take_result(self, action_id: int) -> bytes:
        return self._results.pop(action_id)

    def payload(self, action_id: int, child: int) -> bytes:
        """The arguments of a child, once."""
        return self._payloads.pop((action_id, child))

    def deliver(
        self, action_id: int, child: int, *, code: int, reason: str, mark: bytes | None
    ) -> None:
        """A child was answered. Raises ValueError if that is a second time, or the answer is of another."""
        life = self._lives.get(action_id)
        if life is None:
            return  # its process ended, which the brain is about to learn
        if child in life.answers:
            raise ValueError(f"child {child} of {life.function.name!r} is answered a second time")
        if not code and mark and mark != life.marks[child]:
            wanted = life.marks[child].hex()
            raise ValueError(f"child {child} of {life.function.name!r}: {mark.hex()}, not {wanted}")
        life.answers[child] = code, reason

    def end(self, action_id: int, reason: str, *, now_ns: int) -> None:
        """End the process of the call. A part that runs is reported."""
        for key in [key for key in self._payloads if key[0] == action_id]:
            del self._payloads[key]
        life = self._lives.get(action_id)
        if life is None:
            return
        if life.op_id < 0:
            del self._lives[action_id]
            return
        events: list[DeviceEvent] = []
        life.device._over(life, now_ns, events, Code.PROCESS_ENDED, reason)
        life.device._push(now_ns, None, events[0])

    # ------------------------------------------------------------------------------- faults

    def _lose_suspended(self, event: CallLost, events: list[DeviceEvent]) -> None:
        """The process of a call ends, if it is suspended still."""
        life = self._lives.get(event.action_id)
        if life is not None and life.op_id < 0:
            del self._lives[event.action_id]
            events.append(event)

    def lose(self, name: str, *, now_ns: int) -> None:
        """The process that held the function `name` ready ends. Calls have their own, and go on."""
        lost = tuple(model_id for model_id, each in self._ready.items() if each == name)
        for model_id in lost:
            del self._ready[model_id]
        if lost:
            self._push(now_ns, None, WeightsLost(self.gpu_id, lost))
