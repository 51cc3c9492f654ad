"""Child processes of a command: started with a log file each, and all ended, whatever happens.

A child is `slosched ARGUMENTS` on this host, or any command with a *lifeline*: a pipe to its standard input,
whose end tells it to end, and into which `beat` writes while it shall run (remote.py is the other side).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from slosched import child_processes
from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.units import NS_PER_S

_POLL_S = 0.1
#: How often a lifeline gets a byte.
_BEAT_NS = NS_PER_S
#: The module that a child runs.
_CHILD = "slosched.cli.child"


class ChildFailed(SloschedError):
    """A child process ended, or did not become ready, when it should have served.

    `child` is that process and `code` its exit code; None while it still ran.
    """

    def __init__(self, text: str, child: Child | None = None, code: int | None = None) -> None:
        super().__init__(text)
        self.child, self.code = child, code


@dataclass
class Child:
    """A running child and the file that its output goes to."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    lifeline: IO[bytes] | None = None

    def text(self) -> str:
        """All that the child wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        """The last line that the child wrote: usually its error."""
        lines = self.text().split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")

    def ask_to_end(self) -> None:
        """Tell it to end: its lifeline closes, or it gets SIGTERM."""
        if self.lifeline is None:
            self.process.terminate()
            return
        with contextlib.suppress(OSError):
            self.lifeline.close()


class Children:
    """The children of one command. Use it as a context: leaving it ends every one."""

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        stop_within_s: float = 8.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`command` is what runs instead of slosched, for tests; `env` the environment, by default this one."""
        self._env = env
        self._command = command or (sys.executable, "-m", _CHILD, str(os.getpid()))
        self._stop_within_s = stop_within_s
        self._children: list[Child] = []
        self._next_beat_ns = 0

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        *,
        stdout: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """Run `slosched ARGUMENTS`. All its output goes to `log`.

        With `stdout` its answer goes there, and its stderr is ours, so that its progress is seen. `env` is its
        environment, by default that of all children.
        """
        command = [*self._command, *arguments]
        with contextlib.ExitStack() as files:
            out = files.enter_context((stdout or log).open("wb"))
            errors = subprocess.STDOUT if stdout is None else None
            process = child_processes.start(
                command, stdout=out.fileno(), stderr=errors, env=env or self._env
            )
        child = Child(name, process, stdout or log)
        self._children.append(child)
        return child

    def start_with_lifeline(
        self,
        name: str,
        command: Sequence[str],
        first: bytes,
        log: Path,
        *,
        stdout: Path | None = None,
    ) -> Child:
        """Run `command` with a lifeline, on which `first` is sent. Its output goes to `log`; with `stdout`,
        only its stderr does."""
        with contextlib.ExitStack() as files:
            errors = files.enter_context(log.open("wb"))
            out = errors if stdout is None else files.enter_context(stdout.open("wb"))
            process = child_processes.start(
                command, stdin=subprocess.PIPE, stdout=out.fileno(), stderr=errors.fileno()
            )
        assert process.stdin is not None
        child = Child(name, process, log, process.stdin)
        self._children.append(child)
        self._write(child, first)
        # A beat must never wait for a connection that takes nothing any more.
        os.set_blocking(process.stdin.fileno(), False)
        return child

    def wait_ready(self, child: Child, *, within_s: float) -> int:
        """Wait for the child's "ready on host:port" line; return the port. Raises ChildFailed."""
        deadline_ns = now_ns() + int(within_s * NS_PER_S)
        while True:
            ended = child.process.poll() is not None
            port = child_processes.ready_port(child.text())
            if port is not None:
                return port
            if ended:
                raise self._ended(child)
            if now_ns() > deadline_ns:
                raise ChildFailed(
                    f"the {child.name} was not ready within {within_s:.0f} s: {child.last_line()} "
                    f"(all of it: {child.log})",
                    child,
                )
            self.wait(child, _POLL_S)

    def wait(self, child: Child, timeout_s: float) -> int | None:
        """Return the child's exit code, or None if it still runs after `timeout_s` (at most a second)."""
        self.beat()
        try:
            return child.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def beat(self) -> None:
        """Write to every lifeline, if the last time is a second ago; whatever waits for long must call it."""
        at_ns = now_ns()
        if at_ns < self._next_beat_ns:
            return
        self._next_beat_ns = at_ns + _BEAT_NS
        for child in self._children:
            self._write(child, b"\n")

    def _write(self, child: Child, data: bytes) -> None:
        # That a child has ended, or takes nothing, is noticed elsewhere.
        with contextlib.suppress(OSError, ValueError):
            if child.lifeline is not None:
                os.write(child.lifeline.fileno(), data)

    def check(self) -> None:
        """Raise ChildFailed if a child that should serve has ended; one with a lifeline also with 0."""
        for child in self._children:
            code = child.process.poll()
            if code is not None and (code != 0 or child.lifeline is not None):
                raise self._ended(child)

    def _ended(self, child: Child) -> ChildFailed:
        code = child.process.returncode
        return ChildFailed(
            f"the {child.name} ended with exit code {code}: {child.last_line()} "
            f"(all of it: {child.log})",
            child,
            code,
        )

    def forget(self, child: Child) -> None:
        """The child has ended as it should; `check` and `stop` pass it over."""
        self._children.remove(child)
        if child.lifeline is not None:
            with contextlib.suppress(OSError):
                child.lifeline.close()

    def end(self, child: Child) -> None:
        """End this child: ask it, and SIGKILL if that does not help in time."""
        self._end(child)
        self.forget(child)

    def _end(self, child: Child) -> None:
        if child.process.poll() is None:
            child.ask_to_end()
        child_processes.end(child.process, within_s=self._stop_within_s, ask=False)

    def stop(self) -> None:
        """End all: the last started first, those with lifelines at once. A Ctrl-C meanwhile kills at once."""
        try:
            for child in self._children:
                if child.lifeline is not None:
                    child.ask_to_end()
            while self._children:
                self._end(self._children[-1])
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
