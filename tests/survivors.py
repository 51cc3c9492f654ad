"""Finds what a command left running: every process whose environment has a mark that the test chose."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_VARIABLE = "SLOSCHED_TEST_MARK"


class Marked:
    """Processes with one mark. `variables` are to be in the environment of what a test starts."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)
        self.variables = {_VARIABLE: self.mark}

    def running(self) -> dict[int, str]:
        """The marked processes that run, with their command lines; a zombie does not run."""
        wanted = f"{_VARIABLE}={self.mark}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):
                state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                if state != "Z" and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = line.decode(errors="replace").strip()
        return found

    def find(self, *words: str, within_s: float = 60.0) -> int:
        """The marked process whose command line has all `words`; waits until it is there."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for pid, line in self.running().items():
                if all(word in line for word in words):
                    return pid
            time.sleep(0.1)
        raise AssertionError(f"no process with {words} within {within_s:.0f} s: {self.running()}")

    def assert_none(self, *, within_s: float) -> None:
        """All have ended within a time, or the test fails with what still runs."""
        deadline = time.monotonic() + within_s
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"still running after {within_s:.0f} s: {left}"


@contextmanager
def marked() -> Iterator[Marked]:
    """A mark for a test's processes; those that are left at its end are killed."""
    made = Marked()
    try:
        yield made
    finally:
        for pid in made.running():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
