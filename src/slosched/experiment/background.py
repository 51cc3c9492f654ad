"""An experiment in the background: a process without a terminal, whose lines go to a file."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def detach(log: Path) -> int:
    """Continue in a process of its own session, with `log` as its output; return 0 there.

    In the process that called, return the other's id, which is 0 nowhere. Nothing may run in another thread.
    The new process has no terminal: closing that, or Ctrl-C in it, does not reach it; SIGTERM ends it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644)
    ready, done = os.pipe()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        os.close(done)
        os.read(
            ready, 1
        )  # until it has its own session: a closing terminal must not find it before
        os.close(ready)
        return pid
    os.setsid()
    # A shell that starts commands in the background may let them ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - by descriptor
        os.dup2(nothing.fileno(), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.close(ready)
    os.close(done)
    return 0
