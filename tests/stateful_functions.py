"""Functions of tests/test_calls_with_state.py and tests/test_calls_killed_with_state.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import slosched
from slosched.clock import sleep_ns

#: Elements that calls count, each of them one.
COUNTED = 60


@slosched.function
def adds(ctx: Any, number: float) -> None:
    array = ctx.state.array("total", 1, merge="sum")
    with array.lock("write"):  # the local copy is shared by the processes of a host
        array.get(writable=True)[0] += number
        array.push()


@slosched.function
def total(ctx: Any) -> float:
    array = ctx.state.array("total", 1, merge="sum")
    array.pull()
    return float(array.get()[0])


@slosched.function(gpu=True)
async def awaits_on_gpu(ctx: Any) -> Any:
    return await ctx.chain("adds", 1.0)


def _dies(at: str, here: str) -> None:
    """End this process as kill -9 does, at the place that the caller chose."""
    if at == here:
        os.kill(os.getpid(), signal.SIGKILL)


@slosched.function
def counts(ctx: Any, index: int, dies_at: str = "") -> int:
    """Count element `index` once, and the last element under a lock."""
    array = ctx.state.array("counts", COUNTED + 1, merge="sum")
    with array.lock("write"):
        _dies(dies_at, "locked")
        array.pull()
        view = array.get(writable=True)
        view[index] += 1
        view[COUNTED] += 1
        _dies(dies_at, "changed")
        array.push()
        _dies(dies_at, "pushed")
    return index


@slosched.function
def holds_lock(ctx: Any, path: str) -> None:
    """Hold the lock until it is killed; the file says that it has it."""
    with ctx.state.array("counts", COUNTED + 1, merge="sum").lock("write"):
        Path(path).touch()
        while True:
            sleep_ns(10_000_000)


@slosched.function
def counted(ctx: Any) -> list[float]:
    array = ctx.state.array("counts", COUNTED + 1, merge="sum")
    array.push()  # what a killed call had changed on this host, and not pushed
    array.pull()
    return [float(each) for each in array.get()]
