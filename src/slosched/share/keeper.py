"""A process that cleans up behind a run whose own process was killed and could not.

The run tells it, line by line, what exists: process groups of members, folders, the folder of an MPS daemon;
and what is gone again. At the end of its input it ends and removes what is left: nothing after an orderly end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from slosched import child_processes

GROUP, FOLDER, MPS = "group", "folder", "mps"
_END_WITHIN_S = 5.0
#: Members end with their parent; MPS has no clients then.
_MEMBERS_END_S = 0.5


class Keeper:
    """The run's end of it. Use it as a context. Without a process for it (no room), nothing is kept."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._process = child_processes.start(
                (sys.executable, "-m", "slosched.share.keeper"),
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


def clean_up(kept: list[tuple[str, str]]) -> None:
    """End and remove what is in `kept`: groups first, folders last."""
    for kind, what in kept:
        if kind == GROUP:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(int(what), signal.SIGKILL)
    if any(kind == MPS for kind, _ in kept):
        from slosched.share.mps import Mps

        threading.Event().wait(_MEMBERS_END_S)
        for kind, what in kept:
            if kind == MPS and Path(what).is_dir():
                Mps(Path(what)).stop()
    for kind, what in kept:
        if kind in (FOLDER, MPS):
            shutil.rmtree(what, ignore_errors=True)


def main() -> None:
    """Read what exists until the input ends, and clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    kept: dict[tuple[str, str], None] = {}
    for line in sys.stdin:
        kind, _, what = line.rstrip("\n").partition(" ")
        if kind.startswith("+"):
            kept[kind[1:], what] = None
        else:
            kept.pop((kind[1:], what), None)
    clean_up(list(kept))


if __name__ == "__main__":
    main()
