"""The runner of functions, driven op by op as a worker's pipeline drives it, with children answered by hand."""

from __future__ import annotations

import select
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from slosched.clock import now_ns
from slosched.config import WorkerConfig
from slosched.core.worker.interface import (
    CallAwaits,
    CallChained,
    DeviceEvent,
    ModelPrepared,
    Op,
    OpDone,
    OpKind,
    PrepareModel,
    WeightsLost,
)
from slosched.daemon.backends.functions.backend import FunctionsBackend
from slosched.daemon.backends.opening import open_backend
from slosched.functions.payload import decode, decode_result, encode, encode_result, joined
from slosched.units import NS_PER_S

Ended = OpDone | CallAwaits
E = TypeVar("E")


class FunctionRig:
    """A worker's backend that offers tests/called_functions.py. A context manager; nothing of it stays."""

    def __init__(self, module: str = "called_functions", **options: Any) -> None:
        given = {"device": "none", "slots": 2, "functions": (module,), **options}
        backend = open_backend(WorkerConfig(**given))
        assert isinstance(backend, FunctionsBackend)
        self.backend = backend
        self.events: list[DeviceEvent] = []
        self.said: list[str] = []
        self._next = 0
        self._ids: dict[tuple[int, str], int] = {}
        self._loaded: set[tuple[int, str]] = set()

    def __enter__(self) -> FunctionRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.backend.close()

    @property
    def host(self) -> int:
        return next(gpu.gpu_id for gpu in self.backend.gpus if gpu.host)

    def number(self) -> int:
        self._next += 1
        return self._next

    def poll(self, wait_s: float = 0.02) -> None:
        due = [device.next_event_ns() for device in self.backend.devices.values()]
        if all(each is None or each > now_ns() for each in due):
            select.select(self.backend.wake_fds(), [], [], wait_s)
        for device in self.backend.devices.values():
            self.events += device.poll(now_ns=now_ns())
        self.said += self.backend.take_notes()

    def prepare(self, name: str, within_s: float = 60) -> ModelPrepared:
        found: list[ModelPrepared] = []
        effect = PrepareModel(self.number(), name, 0, 1, 1, NS_PER_S)
        self.backend.prepare(effect, done=found.append)
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while not found and now_ns() < give_up_ns:
            self.poll()
        assert found, f"{name} was not prepared within {within_s} s"
        return found[0]

    def load(self, name: str, gpu_id: int | None = None) -> OpDone:
        gpu_id = self.host if gpu_id is None else gpu_id
        model_id = self._ids.setdefault((gpu_id, name), len(self._ids))
        op = Op(
            op_id=self.number(),
            kind=OpKind.LOAD_WEIGHTS,
            gpu_id=gpu_id,
            model_id=model_id,
            action_id=self.number(),
            model_name=name,
        )
        self._launch(op)
        done = self.wait(op.op_id)
        assert isinstance(done, OpDone)
        if not done.code:
            self._loaded.add((gpu_id, name))
        return done

    def unload(self, name: str) -> None:
        self._loaded.discard((self.host, name))
        self.backend.evict(self.host, self._ids[self.host, name])

    def begin(
        self,
        name: str,
        *args: Any,
        gpu_id: int | None = None,
        frame: bytes | None = None,
        load: bool = True,
        kind: OpKind = OpKind.CALL,
    ) -> Op:
        """Begin a call, of which nothing is awaited; with PREPARE its host part."""
        gpu_id = self.host if gpu_id is None else gpu_id
        if load and (gpu_id, name) not in self._loaded:
            done = self.load(name, gpu_id)
            assert not done.code, done.reason
        key = self.number()
        data = joined(encode(args)) if frame is None else frame
        if data:
            self.backend.calls.keep(key, [data])
        op = Op(
            op_id=self.number(),
            kind=kind,
            gpu_id=gpu_id,
            model_id=self._ids[gpu_id, name],
            action_id=key,
            model_name=name,
            latest_ns=2**62,
            call_id=key,
            deadline_ns=now_ns() + 60 * NS_PER_S,
        )
        self._launch(op)
        return op

    def done(self, op: Op) -> OpDone:
        """The end of a call that awaits nothing."""
        done = self.wait(op.op_id)
        assert isinstance(done, OpDone)
        return done

    def resumed(self, op: Op) -> OpDone:
        """The end of a call that goes on, and awaits nothing more."""
        done = self.resume(op)
        assert isinstance(done, OpDone)
        return done

    def polled(self) -> bool:
        self.poll()
        return True

    def resume(self, op: Op) -> Ended:
        again = Op(
            op_id=self.number(),
            kind=OpKind.RESUME,
            gpu_id=op.gpu_id,
            model_id=op.model_id,
            action_id=op.action_id,
            model_name=op.model_name,
        )
        self._launch(again)
        return self.wait(again.op_id)

    def _launch(self, op: Op) -> None:
        done = self.backend.devices[op.gpu_id].launch(op, now_ns=now_ns())
        if done is not None:
            self.events.append(done)

    def wait(self, op_id: int, within_s: float = 30) -> Ended:
        """The end of the op. Everything else that is reported stays in `events`."""
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while now_ns() < give_up_ns:
            for event in self.events:
                if isinstance(event, OpDone | CallAwaits) and event.op_id == op_id:
                    self.events.remove(event)
                    return event
            self.poll()
        raise AssertionError(f"op {op_id} did not end within {within_s} s; said: {self.said}")

    def call(
        self, name: str, *args: Any, gpu_id: int | None = None, within_s: float = 30
    ) -> tuple[OpDone, Any]:
        """A whole call: how it ended, and its result."""
        op = self.begin(name, *args, gpu_id=gpu_id)
        done = self.wait(op.op_id, within_s)
        assert isinstance(done, OpDone)
        return done, self.result(op, done)

    def result(self, op: Op, done: OpDone) -> Any:
        frames = self.backend.take_outputs(op.action_id, done.output_sizes)
        assert tuple(map(len, frames)) == done.output_sizes
        return decode_result(frames[0]) if frames else None

    def chained(self, op: Op) -> list[tuple[CallChained, Any]]:
        """The children that the call asked for since the last time, with their arguments."""
        asked = [
            e for e in self.events if isinstance(e, CallChained) and e.action_id == op.action_id
        ]
        self.events = [e for e in self.events if e not in asked]
        return [
            (each, decode(self.backend.calls.payload(op.action_id, each.child))[0])
            for each in asked
        ]

    def answer(
        self, op: Op, child: int, value: Any = None, *, code: int = 0, reason: str = ""
    ) -> None:
        frames = [] if code else [joined(encode_result(value))]
        self.backend.calls.deliver(op.action_id, child, code=code, reason=reason, frames=frames)

    def reported(self, kind: type[E], within_s: float = 30) -> list[E]:
        """The events of a kind, once there are some; they are taken from `events`."""
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while now_ns() < give_up_ns:
            found: list[E] = [event for event in self.events if isinstance(event, kind)]
            if found:
                self.events = [event for event in self.events if event not in found]
                return found
            self.poll()
        raise AssertionError(f"no {kind.__name__} within {within_s} s")

    def templates(self) -> list[int]:
        """The processes that those of calls are forked from."""
        root = self.backend.root_pid
        return [int(pid) for pid in Path(f"/proc/{root}/task/{root}/children").read_text().split()]

    @property
    def lost(self) -> list[WeightsLost]:
        return [event for event in self.events if isinstance(event, WeightsLost)]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not reaped does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def children_of(pid: int) -> set[int]:
    """All descendants of a process, by the kernel's lists."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        try:
            tasks = list(Path(f"/proc/{each}/task").iterdir())
            pids = {int(word) for task in tasks for word in (task / "children").read_text().split()}
        except OSError:
            continue
        waiting += pids - found
        found |= pids
    return found


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])
