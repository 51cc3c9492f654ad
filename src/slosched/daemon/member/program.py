"""A user's own program as a member: it runs from the begin of a window to its end, beside the models.

It is not asked for anything: it has no rows, and its output is in the member's log. `python -m
slosched.daemon.member.program COMMAND` replaces itself by COMMAND, which the kernel ends when the member dies.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from slosched import child_processes
from slosched.clock import now_ns
from slosched.daemon.member.loop import Control
from slosched.share_spec import (
    Begin,
    FromMember,
    JobEnded,
    Mode,
    Order,
    Prepared,
    Progress,
    Ready,
    Status,
)
from slosched.units import NS_PER_S

#: This module, which is __main__ in the process that launches.
_LAUNCHER = "slosched.daemon.member.program"
_END_WITHIN_S = 5.0
_LOOK_S = 0.05
_BEGIN_WITHIN_S = 3600.0
#: What a shell answers where there is no such program.
_NOT_FOUND = 127


def serve(
    order: Order,
    messages: queue.Queue[Begin | None],
    control: Control,
    tell: Callable[[FromMember], None],
) -> int:
    """Run the program of the order's one job in each window. Returns the member's exit code."""
    place, problem = _checked(order)
    if problem:
        for each in order.jobs:
            tell(JobEnded(job=each, status=Status.FAILED, reason=problem))
        return 1
    tell(Ready(prepared=(Prepared(job=place, pid=os.getpid(), note="the user's own program"),)))
    while True:
        try:
            begin = messages.get(timeout=_BEGIN_WITHIN_S)
        except queue.Empty:
            return 1
        if begin is None:
            return 0
        status, reason = _window(order, place, begin, control, tell)
        tell(JobEnded(job=place, status=status, reason=reason))


def _checked(order: Order) -> tuple[int, str]:
    """The place of the job, and why it cannot run."""
    place, job = next(iter(order.jobs.items()))
    if len(order.jobs) != 1 or order.mode not in (Mode.TM, Mode.MPS, Mode.EXCLUSIVE):
        return (
            place,
            f"a program of one's own shares a GPU in modes tm and mps, not in {order.mode}",
        )
    if shutil.which(job.command[0]) is None:
        return place, f"there is no program {job.command[0]!r}"
    return place, ""


def _window(
    order: Order,
    place: int,
    begin: Begin,
    control: Control,
    tell: Callable[[FromMember], None],
) -> tuple[Status, str]:
    """Run the program in the window of `begin`."""
    pause = threading.Event()
    at_ns = begin.at_ns + order.jobs[place].start_after_ns
    while now_ns() < at_ns and not (control.ending or control.gone):
        pause.wait(min(_LOOK_S, max(0.0, (at_ns - now_ns()) / NS_PER_S)))
    if control.ending or control.gone or now_ns() >= begin.until_ns:
        return Status.OK, "it was not started: the window was over"
    began_ns = now_ns()
    try:
        # In this process's group, which the experiment ends as a whole should this process be killed.
        process = subprocess.Popen(
            [sys.executable, "-m", _LAUNCHER, *order.jobs[place].command],
            stdin=subprocess.DEVNULL,
            env=_environment(order),
        )
    except OSError as error:
        return Status.FAILED, f"it does not start: {error.strerror}"
    try:
        told_ns = began_ns
        while now_ns() < begin.until_ns and not (control.ending or control.gone):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_S)
                return _by_itself(process.returncode, (now_ns() - began_ns) / NS_PER_S)
            if now_ns() - told_ns >= NS_PER_S:
                told_ns = now_ns()
                tell(Progress(ended={}))
    finally:
        _end(process)
    return Status.OK, "it ran to the end of the window"


def _environment(order: Order) -> Mapping[str, str]:
    """A program that takes the first GPU gets that of the experiment.

    The MPS daemon shows devices by its own numbers, in which a client's CUDA_VISIBLE_DEVICES counts.
    """
    kind, _, number = order.device.partition(":")
    if kind != "cuda" or number in ("", "0"):
        return os.environ
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    mine = visible[int(number)] if len(visible) > int(number) else number
    return {**os.environ, "CUDA_VISIBLE_DEVICES": mine}


def _by_itself(code: int, seconds: float) -> tuple[Status, str]:
    after = f"after {seconds:.1f} s, before the end of the window"
    if code < 0:
        return Status.DIED, f"it was ended by signal {-code} {after}"
    if code == _NOT_FOUND:
        return Status.FAILED, "it cannot be executed; see the log"
    if code:
        return Status.FAILED, f"it ended with exit code {code} {after}"
    return Status.OK, f"it ended by itself {after}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the program and what it started, which are in this group; SIGKILL to it after a time."""
    previous = signal.signal(signal.SIGTERM, _pass_over)
    try:
        os.killpg(0, signal.SIGTERM)
        child_processes.end(process, within_s=_END_WITHIN_S, ask=False)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _pass_over(number: int, frame: FrameType | None) -> None:
    """This process has signalled its own group."""


def main(command: Sequence[str]) -> int:
    """Become `command`; returns only if that cannot be."""
    child_processes.end_with_parent(signal.SIGKILL)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # the member ignores it, and that would be inherited
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.stderr.write(f"slosched member: {command[0]}: {error.strerror}\n")
        return _NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
