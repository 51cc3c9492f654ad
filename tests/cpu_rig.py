"""The CPU's backend, driven op by op as a worker's pipeline drives it."""

from __future__ import annotations

import select
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from slosched.clock import now_ns
from slosched.config import ModelSource, WorkerConfig
from slosched.core.worker.interface import (
    ModelPrepared,
    Op,
    OpDone,
    OpKind,
    PrepareModel,
    ReleaseModel,
    WeightsLost,
)
from slosched.daemon.backends.cpu.backend import CpuBackend
from slosched.daemon.backends.cpu.processes import SILENT_NS
from slosched.units import NS_PER_S

Array = Any


class CpuRig:
    """A backend that offers `models`. A context manager; nothing of it stays."""

    def __init__(
        self,
        models: Sequence[ModelSource],
        *,
        silent_ns: int = SILENT_NS,
        repository: str = "",
    ) -> None:
        config = WorkerConfig(device="cpu", models=tuple(models), repository=repository)
        self.backend = CpuBackend(config, silent_ns=silent_ns)
        self.device = self.backend.devices[0]
        self.lost: list[WeightsLost] = []
        self.said: list[str] = []
        self._next = 0

    def __enter__(self) -> CpuRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.backend.close()

    def number(self) -> int:
        self._next += 1
        return self._next

    def poll(self, wait_s: float = 0.05) -> list[OpDone]:
        if self.device.next_event_ns() != 0:
            select.select(self.backend.wake_fds(), [], [], wait_s)
        done = []
        for event in self.device.poll(now_ns=now_ns()):
            if isinstance(event, WeightsLost):
                self.lost.append(event)
            elif isinstance(event, OpDone):
                done.append(event)
        self.said += self.backend.take_notes()
        return done

    def prepare(self, name: str, *, max_batch: int = 16, within_s: float = 60) -> ModelPrepared:
        found: list[ModelPrepared] = []
        effect = PrepareModel(self.number(), name, 0, 1, max_batch, NS_PER_S)
        self.backend.prepare(effect, done=found.append)
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while not found and now_ns() < give_up_ns:
            assert not self.poll()
        assert found, f"{name} was not prepared within {within_s} s"
        assert self.backend.warm_up(found[0])
        return found[0]

    def run(
        self,
        kind: OpKind,
        name: str,
        model_id: int = 0,
        action: int = 0,
        sizes: tuple[int, ...] = (),
        *,
        length: int = 0,
        lengths: tuple[int, ...] = (),
        within_s: float = 30,
    ) -> OpDone:
        """Run one op to its end."""
        op_id, count = self.number(), max(1, len(sizes))
        op = Op(
            op_id=op_id,
            kind=kind,
            gpu_id=0,
            model_id=model_id,
            action_id=action,
            batch_size=count,
            request_count=count,
            input_sizes=sizes,
            model_name=name,
            length=length,
            lengths=lengths,
        )
        self.device.launch(op, now_ns=0)
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while now_ns() < give_up_ns:
            for done in self.poll():
                assert done.op_id == op_id
                return done
        raise AssertionError(f"{kind.name} of {name} did not end within {within_s} s")

    def load(self, name: str, model_id: int = 0) -> OpDone:
        return self.run(OpKind.LOAD_WEIGHTS, name, model_id)

    def infer(self, name: str, rows: Array, model_id: int = 0) -> tuple[OpDone, list[Array]]:
        """What the exec (or what failed before it) reported, and the answers."""
        action, sizes = self.number(), tuple(row.nbytes for row in rows)
        self.backend.keep_inputs(action, [row.tobytes() for row in rows])
        for kind in (OpKind.COPY_INPUT, OpKind.EXEC):
            done = self.run(kind, name, model_id, action, sizes)
            if done.code:
                self.backend.drop_inputs(action)
                return done, []
        copied = self.run(OpKind.COPY_OUTPUT, name, model_id, action, sizes)
        frames = self.backend.take_outputs(action, copied.output_sizes)
        return done, [np.frombuffer(frame, np.float32) for frame in frames]

    def ask(
        self,
        name: str,
        frames: Sequence[bytes],
        model_id: int = 0,
        *,
        length: int = 0,
        lengths: tuple[int, ...] = (),
    ) -> tuple[OpDone, list[bytes]]:
        """The same with frames of any signature: what the last op reported, and the frames of the answers."""
        action, sizes = self.number(), tuple(len(frame) for frame in frames)
        self.backend.keep_inputs(action, [frame for frame in frames if frame])
        for kind in (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT):
            done = self.run(kind, name, model_id, action, sizes, length=length, lengths=lengths)
            if done.code:
                self.backend.drop_inputs(action)
                return done, []
        answers = [bytes(each) for each in self.backend.take_outputs(action, done.output_sizes)]
        assert done.output_sizes == tuple(map(len, answers)) or 0 in sizes
        return done, answers

    def wait_served(self, name: str, model_id: int = 0, *, within_s: float = 30) -> None:
        """Load the weights, as often as the model's process is not there yet."""
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while now_ns() < give_up_ns:
            if self.load(name, model_id).code == 0:
                return
            self.poll()
        raise AssertionError(f"{name} is not served again within {within_s} s")

    def release(self, name: str) -> None:
        self.backend.release(ReleaseModel(0, name, last=True))
