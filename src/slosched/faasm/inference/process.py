"""One process of one instance, as the experiment sees it: started, asked, ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from slosched import child_processes
from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.faasm.inference import wire
from slosched.faasm.inference.plan import Plan

_START_WITHIN_S = 120.0
_ANSWER_WITHIN_S = 60.0
_END_WITHIN_S = 5.0
_MODULE = "slosched.faasm.inference.serve"

S = TypeVar("S", bound=wire.Report)


class InstanceFailed(SloschedError):
    """The process of an instance ended, or could not do what it was asked."""


class InstanceProcess:
    """Started at once; `ready` waits until it can answer. Without a plan it has no network."""

    def __init__(self, plan: Plan | None) -> None:
        near, far = socket.socketpair()
        self.started_ns = now_ns()
        words = [sys.executable, "-m", _MODULE, str(far.fileno()), plan.text() if plan else ""]
        with far:
            try:
                self._process: subprocess.Popen[bytes] = child_processes.start(
                    words,
                    stdout=subprocess.DEVNULL,
                    stderr=None,
                    pass_fds=(far.fileno(),),
                    env=_environment(plan),
                )
            except BaseException:
                near.close()
                raise
        self._end = near
        self._ready: wire.Ready | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> wire.Ready:
        """Wait until it can answer. Raises InstanceFailed."""
        if self._ready is None:
            self._end.settimeout(_START_WITHIN_S)
            self._ready = self._heard(wire.Ready)
            self._end.settimeout(_ANSWER_WITHIN_S)
        return self._ready

    def ask(self, order: wire.Order, kind: type[S]) -> S:
        """What it says to an order. Raises InstanceFailed."""
        self.ready()
        try:
            wire.send(self._end, order)
        except OSError as error:
            raise InstanceFailed(f"the process of an instance is gone: {error}") from None
        return self._heard(kind)

    def _heard(self, kind: type[S]) -> S:
        try:
            report = wire.receive_report(self._end)
        except (OSError, EOFError, ValueError) as error:
            code = self._process.poll()
            how = "" if code is None else f"; it ended with {code}"
            raise InstanceFailed(
                f"the process of an instance did not answer: {error or 'a time-out'}{how}"
            ) from None
        if isinstance(report, wire.Failed):
            raise InstanceFailed(f"an instance failed: {report.reason}")
        if not isinstance(report, kind):
            raise InstanceFailed(f"an instance sent {type(report).__name__}, not {kind.__name__}")
        return report

    def interrupt(self) -> None:
        """End what another thread waits for: that one gets InstanceFailed."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the process. Idempotent."""
        self._end.close()
        child_processes.end(self._process, within_s=_END_WITHIN_S)


def _environment(plan: Plan | None) -> dict[str, str]:
    folders: Sequence[str] = [str(Path(each or ".").absolute()) for each in sys.path]
    return {
        **os.environ,
        **child_processes.computing_threads(1 if plan is None else plan.threads),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)),
    }
