"""Child processes of a command: started with a log file each, and all ended, whatever happens.

The children live in sessions of their own, so that a Ctrl-C on the terminal reaches only the
command; it then ends them in order, and their files are complete. Should the command itself be
killed, the kernel ends them (Linux).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.units import NS_PER_S

#: The module that a child runs (cli/child.py). It is named, not imported: it imports every command.
_CHILD = "slosched.cli.child"
_POLL_S = 0.1
_READY = re.compile(r"ready on \S*:(\d+): ")


class ChildFailed(SloschedError):
    """A child process ended, or did not become ready, when it should have served."""


@dataclass
class Child:
    """A running child and the file that its output goes to."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_line(self) -> str:
        """The last line that the child wrote: usually its error."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


class Children:
    """The children of one command. Use it as a context: leaving it ends every one."""

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        stop_within_s: float = 8.0,
    ) -> None:
        """`command` is what runs instead of slosched, for tests."""
        self._command = command or (sys.executable, "-m", _CHILD, str(os.getpid()))
        self._stop_within_s = stop_within_s
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(
        self, name: str, arguments: Sequence[str], log: Path, *, stdout: Path | None = None
    ) -> Child:
        """Run `slosched ARGUMENTS`. All its output goes to `log`.

        With `stdout` its answer goes there, and its stderr is ours, so that its progress is seen.
        """
        command = [*self._command, *arguments]
        with contextlib.ExitStack() as files:
            out = files.enter_context((stdout or log).open("wb"))
            errors: IO[bytes] | int | None = subprocess.STDOUT if stdout is None else None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
        child = Child(name, process, stdout or log)
        self._children.append(child)
        return child

    def wait_ready(self, child: Child, *, within_s: float) -> int:
        """Wait for the child's "ready on host:port" line; return the port. Raises ChildFailed."""
        deadline_ns = now_ns() + int(within_s * NS_PER_S)
        while True:
            ended = child.process.poll() is not None
            match = _READY.search(child.log.read_text(encoding="utf-8", errors="replace"))
            if match is not None:
                return int(match[1])
            if ended:
                raise ChildFailed(
                    f"the {child.name} ended with exit code {child.process.returncode}: "
                    f"{child.last_line()} (all of it: {child.log})"
                )
            if now_ns() > deadline_ns:
                raise ChildFailed(
                    f"the {child.name} was not ready within {within_s:.0f} s: {child.last_line()} "
                    f"(all of it: {child.log})"
                )
            self.wait(child, _POLL_S)

    def wait(self, child: Child, timeout_s: float) -> int | None:
        """Return the child's exit code, or None if it still runs after `timeout_s`."""
        try:
            return child.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def check(self) -> None:
        """Raise ChildFailed if a child that should serve has ended."""
        for child in self._children:
            code = child.process.poll()
            if code not in (None, 0):
                raise ChildFailed(
                    f"the {child.name} ended with exit code {code}: {child.last_line()} "
                    f"(all of it: {child.log})"
                )

    def forget(self, child: Child) -> None:
        """The child has ended as it should; `check` and `stop` pass it over."""
        self._children.remove(child)

    def end(self, child: Child) -> None:
        """End this child: SIGTERM, and SIGKILL if that does not help in time."""
        self._terminate(child)
        self.forget(child)

    def stop(self) -> None:
        """End all: the last started first, SIGTERM and then SIGKILL. A Ctrl-C meanwhile kills at once."""
        try:
            while self._children:
                self._terminate(self._children[-1])
                self._children.pop()
        finally:
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
            for child in self._children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(self._stop_within_s)
            self._children.clear()

    def _terminate(self, child: Child) -> None:
        if child.process.poll() is not None:
            return
        child.process.terminate()
        try:
            child.process.wait(self._stop_within_s)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait(self._stop_within_s)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, with exit code 128 + their number."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
