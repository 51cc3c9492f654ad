"""A worker whose emulated GPU is lost in the middle of its work; also a program, for tests of processes.

    python losing_worker.py CONFIG_AS_JSON LOST_FILE LIVES EXECS

Its device is lost after EXECS inferences, in as many lives as LIVES; LOST_FILE counts them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from slosched.config import WorkerConfig
from slosched.core.worker.interface import Device, DeviceEvent, Op, OpDone, OpKind
from slosched.daemon import supervisor, worker
from slosched.daemon.backends.emulated import EmulatedBackend
from slosched.daemon.blackbox import NoBlackbox

WHY = "CUDA error 719: unspecified launch failure"


class _HangingGpu:
    """Ends nothing any more from its `execs`-th inference on."""

    def __init__(self, inner: Device, execs: int) -> None:
        self._inner = inner
        self.left = execs
        self.steady, self.free_copies = inner.steady, inner.free_copies
        self.arm_ahead_ns, self.withdraw = inner.arm_ahead_ns, inner.withdraw

    @property
    def hangs(self) -> bool:
        return self.left <= 0

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        self.left -= op.kind is OpKind.EXEC
        return None if self.hangs else self._inner.launch(op, now_ns=now_ns)

    def poll(self, *, now_ns: int) -> Sequence[DeviceEvent]:
        return [] if self.hangs else self._inner.poll(now_ns=now_ns)

    def next_event_ns(self) -> int | None:
        return None if self.hangs else self._inner.next_event_ns()


class LosingBackend(EmulatedBackend):
    """GPU 0 is lost with its `execs`-th inference, or when `lose` says so."""

    def __init__(
        self, config: WorkerConfig, execs: int = 2**62, lost_file: Path | None = None
    ) -> None:
        super().__init__(config)
        self._gpu = _HangingGpu(self.devices[0], execs)
        self.devices = {**self.devices, 0: self._gpu}  # type: ignore[dict-item]
        self._lost_file = lost_file

    @property
    def lost(self) -> str:  # type: ignore[override]
        if not self._gpu.hangs:
            return ""
        if self._lost_file is not None:
            with self._lost_file.open("a") as file:
                file.write("lost\n")
        return WHY

    def lose(self) -> None:
        self._gpu.left = 0


def main(config: str, lost_file: str, lives: str, execs: str) -> int:
    file = Path(lost_file)
    lost = len(file.read_text().splitlines()) if file.exists() else 0

    def open_backend(config: WorkerConfig, blackbox: NoBlackbox) -> EmulatedBackend:
        if lost >= int(lives):
            return EmulatedBackend(config)
        return LosingBackend(config, int(execs), file)

    worker.open_backend = open_backend  # type: ignore[attr-defined,assignment]
    return supervisor._child_main([config])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
