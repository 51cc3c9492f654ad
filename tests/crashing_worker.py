"""A worker of an emulated GPU with one model whose code ends the process; a program, for tests.

    python crashing_worker.py CONFIG_AS_JSON MODEL WHERE HOW

WHERE the code runs: launch (a forward in the worker's process), device (a kernel), prepare. HOW it ends: see
`end`. A file descriptor of a supervisor's blackbox is written as a real GPU's backend does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from slosched.config import WorkerConfig
from slosched.core.worker.interface import Device, ModelPrepared, Op, OpDone, OpKind, PrepareModel
from slosched.daemon import supervisor, worker
from slosched.daemon.backends.emulated import EmulatedBackend
from slosched.daemon.blackbox import NoBlackbox
from slosched.errors import DeviceLost

HOWS = ("segv", "abort", "exit3", "exit0", "exception", "system-exit", "lost")


def end(how: str) -> None:
    if how == "segv":
        signal.raise_signal(signal.SIGSEGV)
    elif how == "abort":
        os.abort()
    elif how.startswith("exit"):
        os._exit(int(how.removeprefix("exit")))
    elif how == "exception":
        raise RuntimeError("a bug of the model")
    elif how == "system-exit":
        sys.exit()
    raise DeviceLost("emulated is lost (CUDA error 719)")


class _CrashingGpu:
    def __init__(self, inner: Device, blackbox: NoBlackbox, bad: str, where: str, how: str) -> None:
        self._inner, self._blackbox = inner, blackbox
        self._bad, self._where, self._how = bad, where, how
        self.steady, self.free_copies = inner.steady, inner.free_copies
        self.arm_ahead_ns, self.withdraw = inner.arm_ahead_ns, inner.withdraw
        self.poll, self.next_event_ns = inner.poll, inner.next_event_ns

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        if op.kind is not OpKind.EXEC:
            return self._inner.launch(op, now_ns=now_ns)
        blackbox = self._blackbox
        index = blackbox.index(op.model_name)
        if self._where == "launch":
            blackbox.launching(index)
        blackbox.running(index)
        if op.model_name == self._bad and self._where != "prepare":
            end(self._how)
        blackbox.idle()
        return self._inner.launch(op, now_ns=now_ns)


class CrashingBackend(EmulatedBackend):
    def __init__(
        self, config: WorkerConfig, blackbox: NoBlackbox, bad: str, where: str, how: str
    ) -> None:
        super().__init__(config)
        gpu = _CrashingGpu(self.devices[0], blackbox, bad, where, how)
        self.devices = {**self.devices, 0: gpu}  # type: ignore[dict-item]
        self._blackbox, self._bad, self._where, self._how = blackbox, bad, where, how

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        self._blackbox.preparing(effect.name)
        if effect.name == self._bad and self._where == "prepare":
            end(self._how)
        super().prepare(effect, done=done)
        self._blackbox.preparing("")


def main(config: str, bad: str, where: str, how: str) -> int:
    def open_backend(config: WorkerConfig, blackbox: NoBlackbox) -> EmulatedBackend:
        return CrashingBackend(config, blackbox, bad, where, how)

    worker.open_backend = open_backend  # type: ignore[attr-defined,assignment]
    return supervisor._child_main([config])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
