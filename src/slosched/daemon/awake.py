"""Keeping a host's cores awake, so that a thread that is woken there runs at once.

In a virtual machine a core that has nothing to do halts, and the hypervisor takes its time to bring it
back: a small message between two sleeping processes took 0.33 ms (p99 3.6 ms) on an H200's host, and 0.12
(0.21) when no core could halt. So a loop that does nothing sits on each core, in the kernel's idle class:
it runs when nothing else wants the core, and leaves it at once when something does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence

from slosched.child_processes import end_with_parent
from slosched.clock import now_ns
from slosched.daemon.housekeeping import usable_cores
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import NS_PER_S

_LOOK_S = 0.1
_END_WITHIN_NS = 2 * NS_PER_S


def keep_awake(cores: Sequence[int], *, until: Callable[[], bool]) -> None:
    """Keep `cores` awake until `until()` is true (looked at ten times a second); all has ended on return.

    Raises InvalidConfig for a core that this process may not use, SloschedError if the kernel has no
    idle class or a loop ends by itself.
    """
    usable = usable_cores()
    wrong = [core for core in cores if core not in usable]
    if wrong or not cores:
        raise InvalidConfig(f"cores {wrong or '(none)'}: this process may use {list(usable)}")
    children: list[int] = []
    try:
        children.extend(_start(core) for core in cores)
        pause = threading.Event()
        while not until():
            pause.wait(_LOOK_S)
            for child, core in zip(list(children), cores, strict=True):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    children.remove(child)
                    raise SloschedError(
                        f"core {core} is not kept awake any more: its loop ended with status {status}; "
                        "does this kernel have SCHED_IDLE?"
                    )
    finally:
        _end(children)


def _start(core: int) -> int:
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        end_with_parent(signal.SIGKILL)
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        # getppid is a call into the kernel, so this loop can be preempted anywhere.
        while os.getppid() == parent:
            for _ in range(100_000):
                pass
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's is ours to close


def _end(children: Sequence[int]) -> None:
    for child in children:
        with contextlib.suppress(OSError):
            # To die takes processor time, which the idle class does not get on a busy core.
            os.sched_setscheduler(child, os.SCHED_OTHER, os.sched_param(0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    give_up_ns = now_ns() + _END_WITHIN_NS
    pause = threading.Event()
    for child in children:
        while now_ns() < give_up_ns:
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(child, os.WNOHANG)[0]:
                    pause.wait(0.005)
                    continue
            break
