"""The devices that calls run on: the host's slots, and a GPU whose exec lane calls share with inferences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from slosched.clock import Clock
from slosched.codes import Code
from slosched.core.worker.interface import (
    Device,
    DeviceEvent,
    Op,
    OpDone,
    OpKind,
    op_failed,
    too_late,
)
from slosched.daemon.backends.functions.loaded import LoadedFunction
from slosched.daemon.backends.functions.runner import Runner

_CALLS = (OpKind.CALL, OpKind.RESUME)
#: Loads the function of a name for the device of an id.
Make = Callable[[int, str], LoadedFunction]


class HostDevice:
    """The slots of this host. It reports what happens to every call of the worker, those on GPUs too.

    In event time (`exact`) something that is due has the time at which that was first noticed.
    """

    steady = False
    free_copies = False
    arm_ahead_ns = 0

    def __init__(self, runner: Runner, make: Make, *, exact: bool, clock: Clock) -> None:
        self._runner, self._make, self._exact, self._clock = runner, make, exact, clock
        self._noticed_ns = 0

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        if op.kind is OpKind.LOAD_WEIGHTS:
            self._runner.functions.load(op, lambda: self._make(op.gpu_id, op.model_name))
        elif op.kind in _CALLS:
            self._runner.launch(op)
        else:
            return op_failed(op, Code.INVALID_ACTION, "a host runs calls alone", now_ns)
        return None

    def withdraw(self, op_id: int) -> OpDone | None:
        return None

    def poll(self, *, now_ns: int) -> Sequence[DeviceEvent]:
        self._noticed_ns = 0
        return self._runner.step()

    def next_event_ns(self) -> int | None:
        due_ns = self._runner.due_ns()
        if due_ns == 0 and self._exact:
            self._noticed_ns = self._noticed_ns or self._clock()
            return self._noticed_ns
        return due_ns


class GpuWithFunctions:
    """The GPU behind `inner`, on which the calls of `functions` run too.

    A call has the GPU to itself, but for its host part, which does not use it. It begins when no exec of
    `inner` is unfinished, and an exec that `inner` would arm meanwhile is held until the call is over, or
    suspended.
    """

    steady = False

    def __init__(
        self, inner: Device, runner: Runner, make: Make, functions: Collection[str], clock: Clock
    ) -> None:
        self._inner, self._runner, self._make, self._clock = inner, runner, make, clock
        self._functions = functions
        self._execs: set[int] = set()  # op ids that `inner` has and has not reported
        self._held: list[Op] = []  # in order
        self._call: Op | None = None  # what runs
        self._done: list[DeviceEvent] = []  # what ended while it was launched

    @property
    def free_copies(self) -> bool:
        return self._inner.free_copies

    @property
    def arm_ahead_ns(self) -> int:
        return self._inner.arm_ahead_ns

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        if op.kind is OpKind.LOAD_WEIGHTS and op.model_name in self._functions:
            self._runner.functions.load(op, lambda: self._make(op.gpu_id, op.model_name))
            return None
        if op.kind is OpKind.PREPARE:
            self._runner.launch(op)
            return None
        if op.kind in _CALLS or (op.kind is OpKind.EXEC and (self._call or self._held)):
            self._held.append(op)
            self._done += self._start_held(now_ns)
            return None
        return self._to_inner(op, now_ns)

    def _to_inner(self, op: Op, now_ns: int) -> OpDone | None:
        done = self._inner.launch(op, now_ns=now_ns)
        if op.kind is OpKind.EXEC and done is None:
            self._execs.add(op.op_id)
        return done

    def _start_held(self, now_ns: int) -> list[DeviceEvent]:
        """Start what may start, in order."""
        done: list[DeviceEvent] = []
        while self._held and self._call is None:
            op = self._held[0]
            if op.kind in _CALLS:
                if self._execs or op.earliest_ns > now_ns:
                    return done
                del self._held[0]
                if op.kind is OpKind.CALL and now_ns > op.latest_ns:
                    done.append(too_late(op, now_ns))
                    continue
                self._call = op
                self._runner.launch(op)
            else:
                del self._held[0]
                ended = self._to_inner(op, now_ns)
                if ended is not None:
                    done.append(ended)
        return done

    def over(self, op: Op) -> None:
        """An op of a call is over."""
        if self._call is not None and self._call.op_id == op.op_id:
            self._call = None

    def withdraw(self, op_id: int) -> OpDone | None:
        for op in self._held:
            if op.op_id == op_id:
                self._held.remove(op)
                return op_failed(op, Code.CANCELLED, "it was taken back", self._clock())
        return self._inner.withdraw(op_id)

    def poll(self, *, now_ns: int) -> Sequence[DeviceEvent]:
        events = [*self._inner.poll(now_ns=now_ns)]
        for event in events:
            if isinstance(event, OpDone):
                self._execs.discard(event.op_id)
        done, self._done = self._done, []
        return [*events, *done, *self._start_held(now_ns)]

    def next_event_ns(self) -> int | None:
        if self._done:
            return 0
        due_ns = self._inner.next_event_ns()
        if not self._held or self._call is not None:
            return due_ns
        op = self._held[0]
        if op.kind in _CALLS and self._execs:
            return due_ns
        held_ns = op.earliest_ns if op.kind in _CALLS else 0
        return held_ns if due_ns is None else min(due_ns, held_ns)
