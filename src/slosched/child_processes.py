"""Child processes: started in a session of their own, ended in order, and never left behind.

A terminal's Ctrl-C reaches only the parent, which then ends its children in order, so that their files are
complete. Should the parent be killed, the kernel ends them (Linux). Whether a child starts again, and what its
lines mean, the parents decide: experiment/children.py, daemon/supervisor.py, daemon/backends/cpu/children.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

_PR_SET_PDEATHSIG = 1
#: What the libraries that compute read as the number of their threads.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
#: How a daemon says that it serves: "slosched worker ready on 0.0.0.0:12345: ...".
_READY = re.compile(r"^slosched \w+ ready on \S*:(\d+): ", re.MULTILINE)


def start(
    argv: Sequence[str],
    *,
    stdout: int,
    stderr: int | None,
    stdin: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own, without an input unless `stdin` gives one.

    Raises OSError if it cannot be started.
    """
    return subprocess.Popen(
        list(argv),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        pass_fds=pass_fds,
        env=env,
    )


def end(process: subprocess.Popen[bytes], *, within_s: float, ask: bool = True) -> bool:
    """Wait until `process` has ended; SIGKILL it after `within_s`. False if that was necessary.

    With `ask`, SIGTERM tells it to end; without, it knows already.
    """
    if process.poll() is not None:
        return True
    if ask:
        process.terminate()
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # it waits in the kernel
            process.wait(within_s)
        return False
    return True


def end_with_parent(number: int) -> None:
    """Have the kernel send this process signal `number` when its parent dies. Elsewhere than on Linux nothing.

    The child asks for that itself: it cannot be done between fork and exec once torch has started threads
    in the parent. A parent that died before is not noticed; compare os.getppid().
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def computing_threads(count: int) -> dict[str, str]:
    """The environment variables with which a child's libraries compute in `count` threads each."""
    return dict.fromkeys(_THREADS, str(count))


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """In this block, processes that are started have these environment variables."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def ready_port(text: str) -> int | None:
    """The port in the ready line of a daemon's output; None if there is no such line."""
    match = _READY.search(text)
    return int(match[1]) if match is not None else None


@contextmanager
def on_signals(numbers: Sequence[int], call: Callable[[int], None]) -> Iterator[None]:
    """In this block the signals call `call` with their number. Only the main thread may ask for that."""

    def handler(number: int, frame: FrameType | None) -> None:
        call(number)

    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
