"""Child processes of a command: started with a log file each, and all ended, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slosched import child_processes
from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.units import NS_PER_S

_POLL_S = 0.1
#: The module that a child runs.
_CHILD = "slosched.cli.child"


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
            errors = subprocess.STDOUT if stdout is None else None
            process = child_processes.start(command, stdout=out.fileno(), stderr=errors)
        child = Child(name, process, stdout or log)
        self._children.append(child)
        return child

    def wait_ready(self, child: Child, *, within_s: float) -> int:
        """Wait for the child's "ready on host:port" line; return the port. Raises ChildFailed."""
        deadline_ns = now_ns() + int(within_s * NS_PER_S)
        while True:
            ended = child.process.poll() is not None
            text = child.log.read_text(encoding="utf-8", errors="replace")
            port = child_processes.ready_port(text)
            if port is not None:
                return port
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
        child_processes.end(child.process, within_s=self._stop_within_s)
        self.forget(child)

    def stop(self) -> None:
        """End all: the last started first, SIGTERM and then SIGKILL. A Ctrl-C meanwhile kills at once."""
        try:
            while self._children:
                child_processes.end(self._children[-1].process, within_s=self._stop_within_s)
                self._children.pop()
        finally:
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
            for child in self._children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(self._stop_within_s)
            self._children.clear()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, with exit code 128 + their number."""

    def ended(number: int) -> None:
        raise SystemExit(128 + number)

    with child_processes.on_signals((signal.SIGTERM, signal.SIGHUP), ended):
        yield
