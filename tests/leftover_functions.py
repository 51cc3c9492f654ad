"""Functions that leave behind what would harm a later call, and inits that end their process."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from typing import Any

import slosched


@slosched.function
def leaves_timer(ctx: Any) -> int:
    signal.setitimer(signal.ITIMER_REAL, 600)
    return os.getpid()


@slosched.function
def leaves_raw_thread(ctx: Any) -> int:
    begun = _thread.allocate_lock()
    begun.acquire()

    def sleeps() -> None:
        begun.release()
        time.sleep(600)

    _thread.start_new_thread(sleeps, ())
    begun.acquire(timeout=60)
    return os.getpid()


class _Leaves:
    def flush(self) -> None:
        sys.exit("flushed")


@slosched.function
def replaces_stdout(ctx: Any) -> int:
    sys.stdout = _Leaves()
    return os.getpid()


@slosched.function
def interrupts(ctx: Any) -> None:
    raise KeyboardInterrupt


def _exits() -> None:
    sys.exit("the licence has expired")


@slosched.function(init=_exits)
def init_exits(ctx: Any) -> None:
    return None


def _dies() -> None:
    os._exit(4)


@slosched.function(init=_dies)
def init_dies(ctx: Any) -> None:
    return None
