"""Functions for tests of what runs them: each does what its name says."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import slosched


@slosched.function
def nothing(ctx: Any) -> None:
    return None


@slosched.function
def echo(ctx: Any, value: Any) -> Any:
    return value


@slosched.function
def double(ctx: Any, array: Any) -> Any:
    return array * 2


@slosched.function
def raises(ctx: Any, text: str) -> None:
    raise ValueError(text)


@slosched.function
def exits(ctx: Any, code: int) -> None:
    sys.exit(code)


@slosched.function
def leaves(ctx: Any) -> None:
    os._exit(7)


@slosched.function
def segfaults(ctx: Any) -> None:
    ctypes.string_at(0)


@slosched.function
def kills_itself(ctx: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@slosched.function
def kills_parent(ctx: Any) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@slosched.function(limit="1s")
def sleeps(ctx: Any, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@slosched.function
def naps(ctx: Any, seconds: float) -> None:
    time.sleep(seconds)


@slosched.function(limit="500ms")
def spins(ctx: Any) -> None:
    while True:
        pass


@slosched.function
def prints(ctx: Any, size: int) -> int:
    line = "x" * 999 + "\n"
    for _ in range(size // 1000):
        sys.stdout.write(line)
    return size


@slosched.function
def eats(ctx: Any, size: int) -> int:
    return int(np.ones(size, np.uint8).sum())


LEAKED: list[Any] = []


@slosched.function
def leaks(ctx: Any, size: int) -> int:
    LEAKED.append(np.ones(size, np.uint8))
    return os.getpid()


@slosched.function
def bombs(ctx: Any) -> None:
    while True:
        if os.fork() == 0:
            time.sleep(0.01)


@slosched.function
def many_eat(ctx: Any, processes: int, size: int) -> None:
    for _ in range(processes):
        if os.fork() == 0:
            eaten = np.ones(size, np.uint8)
            time.sleep(60)
            os._exit(int(eaten[0]))
    time.sleep(60)


@slosched.function
def leaves_child(ctx: Any, session: bool) -> int:
    return subprocess.Popen(["sleep", "600"], start_new_session=session).pid


@slosched.function
def forks(ctx: Any) -> int:
    os.fork()  # the copy returns, too
    return os.getpid()


@slosched.function
def leaves_thread(ctx: Any) -> int:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return os.getpid()


@slosched.function
def scribbles(ctx: Any) -> None:
    for fd in range(3, 64):
        try:
            os.write(fd, b"\xff\xfe nonsense")
        except OSError:
            continue


@slosched.function
def pid(ctx: Any) -> int:
    return os.getpid()


@slosched.function(max_payload="1MiB")
def returns(ctx: Any, size: int) -> bytes:
    return bytes(size)


@slosched.function
def wrong_type(ctx: Any) -> Any:
    return {"a": [{1, 2}]}


def _made() -> dict[str, int]:
    return {"pid": os.getpid(), "calls": 0}


def _count(ctx: Any) -> tuple[int, int]:
    ctx.init["calls"] += 1
    return ctx.init["pid"], ctx.init["calls"]


@slosched.function(init=_made)
def counts(ctx: Any) -> tuple[int, int]:
    return _count(ctx)


@slosched.function(init=_made, reset="restore")
def counts_anew(ctx: Any) -> tuple[int, int]:
    return _count(ctx)


@slosched.function(init=_made, reset="reload")
def counts_cold(ctx: Any) -> tuple[int, int]:
    return _count(ctx)


@slosched.function(init=_made, reset="reload")
def sleeps_cold(ctx: Any, seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@slosched.function(init=_made, gpu=True)
def counts_on_gpu(ctx: Any) -> tuple[int, int]:
    return _count(ctx)


@slosched.function(init=_made, gpu=True, reset="reload")
def counts_cold_on_gpu(ctx: Any) -> tuple[int, int]:
    return _count(ctx)


@slosched.function(init=_made, gpu=True, reset="restore")
def counts_anew_on_gpu(ctx: Any) -> tuple[int, int]:
    return _count(ctx)


def _fails() -> None:
    raise RuntimeError("init says no")


@slosched.function(init=_fails)
def cannot_start(ctx: Any) -> None:
    pass


@slosched.function
async def parent(ctx: Any, n: int) -> int:
    refs = [ctx.chain(echo, i) for i in range(n)]
    return sum(await slosched.gather(*refs))


@slosched.function
async def tree(ctx: Any, levels: int, width: int) -> int:
    """The number of leaves below: each level awaits `width` calls of the next."""
    if not levels:
        return 1
    refs = [ctx.chain("tree", levels - 1, width) for _ in range(width)]
    return sum(await slosched.gather(*refs))


@slosched.function
async def catches(ctx: Any, name: str, *args: Any) -> tuple[int, str]:
    try:
        await ctx.chain(name, *args)
    except slosched.CallFailed as error:
        return error.code, error.reason
    return 0, ""


@slosched.function
async def takes_back(ctx: Any) -> str:
    ref = ctx.chain(sleeps, 0.5)
    ref.cancel()
    return str(ref.status)


@slosched.function
async def starts_and_awaits(ctx: Any, processes: int) -> None:
    for _ in range(processes):
        subprocess.Popen(["sleep", "60"])
    await ctx.chain(echo, 1)


SHARED: list[int] = []


def _share(size: int, how: str) -> None:
    """Make `size` bytes of shared memory: in a file that is open, or mapped alone."""
    if how == "anonymous":
        KEPT.append(mmap.mmap(-1, size))
        _fill(KEPT[-1])
        return
    if how == "file":
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    else:
        fd = os.memfd_create("a call's")
    os.posix_fallocate(fd, 0, size)
    if how == "mapped":
        KEPT.append(mmap.mmap(fd, size))
        _fill(KEPT[-1])
        os.close(fd)
    else:
        SHARED.append(fd)


KEPT: list[mmap.mmap] = []


def _fill(memory: mmap.mmap) -> None:
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1


@slosched.function
def shares(ctx: Any, size: int, how: str, path: str = "") -> int:
    """Holds shared memory until the file exists, or it is ended."""
    _share(size, how)
    while path and not Path(path).exists():
        time.sleep(0.01)
    return os.getpid()
