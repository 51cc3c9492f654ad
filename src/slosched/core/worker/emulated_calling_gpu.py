"""An emulated GPU that runs calls of functions beside inferences, on the same exec lane."""

from __future__ import annotations

from collections.abc import Sequence

from slosched.core.worker.emulated_calls import EmulatedHost
from slosched.core.worker.interface import CallAwaits, Device, DeviceEvent, Op, OpDone, OpKind

_IN_EXEC_LANE = (OpKind.EXEC, OpKind.CALL, OpKind.RESUME)


class CallingGpu:
    """Implements `Device`: ops of functions go to `calls`, which has one slot, and all others to `gpu`.

    Nothing runs beside a call: an op that would is an AssertionError, because the brain sees to that.
    """

    steady = False
    arm_ahead_ns = 0

    def __init__(self, gpu: Device, calls: EmulatedHost) -> None:
        self._gpu, self._calls = gpu, calls
        self._execs: dict[int, bool] = {}  # by op: whether it is a call's
        self.free_copies = gpu.free_copies

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        of_a_call = op.model_name in self._calls.functions
        if op.kind in _IN_EXEC_LANE:
            if self._execs and (of_a_call or any(self._execs.values())):
                raise AssertionError(f"{op.kind.name} of {op.model_name!r} beside a call on a GPU")
            self._execs[op.op_id] = of_a_call
        device: Device = self._calls if of_a_call else self._gpu
        done = device.launch(op, now_ns=now_ns)
        if done is not None:
            self._execs.pop(done.op_id, None)
        return done

    def withdraw(self, op_id: int) -> OpDone | None:
        done = self._gpu.withdraw(op_id)
        if done is not None:
            self._execs.pop(op_id, None)
        return done

    def poll(self, *, now_ns: int) -> Sequence[DeviceEvent]:
        events = [*self._gpu.poll(now_ns=now_ns), *self._calls.poll(now_ns=now_ns)]
        for event in events:
            if isinstance(event, OpDone | CallAwaits):
                self._execs.pop(event.op_id, None)
        return events

    def next_event_ns(self) -> int | None:
        times = (self._gpu.next_event_ns(), self._calls.next_event_ns())
        return min((each for each in times if each is not None), default=None)
