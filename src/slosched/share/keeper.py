"""A run tells another process what it has started, so that this is ended also if the run itself is killed.

Lines say what exists: process groups of members, folders, the folder of an MPS daemon; and what is gone again.
share/cleaning.py is the other process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from slosched import child_processes

GROUP, FOLDER, MPS = "group", "folder", "mps"
_END_WITHIN_S = 5.0


class Keeper:
    """The run's end of it. Use it as a context. Without a process for it (no room), nothing is kept."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._process = child_processes.start(
                (sys.executable, "-m", "slosched.share.cleaning"),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return self

    def __exit__(self, *error: object) -> None:
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with suppress(OSError):
            process.stdin.close()
        child_processes.end(process, within_s=_END_WITHIN_S, ask=False)

    def keep(self, kind: str, what: int | Path) -> None:
        """`what` exists now, and is to be ended or removed should this process not do it."""
        self._tell(f"+{kind} {what}\n")

    def release(self, kind: str, what: int | Path) -> None:
        """`what` is gone."""
        self._tell(f"-{kind} {what}\n")

    def _tell(self, line: str) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            with suppress(OSError):
                os.write(process.stdin.fileno(), line.encode())
