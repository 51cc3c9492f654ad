"""A worker's loop that stands still for ever is noticed, told and ended; a slow one is not."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest

from slosched.daemon.traceback_file import INTERNAL_ERROR
from slosched.daemon.watchdog import Watchdog

_PERIOD_S = 0.05


def test_a_loop_that_waits_for_a_lock_that_a_stopped_thread_holds_is_told_and_ended() -> None:
    lock, ended = threading.Lock(), threading.Event()
    lines: list[str] = []
    rounds = 0

    def loop() -> None:
        nonlocal rounds
        rounds += 1
        with lock:
            rounds += 1

    lock.acquire()  # as model code does that is stopped in the middle
    stuck = threading.Thread(target=loop)
    stuck.start()
    with Watchdog(lambda: rounds, period_s=_PERIOD_S, say=lines.append, end=ended.set):
        assert ended.wait(20)
    assert len(lines) == 2 and "stood still for 50ms" in lines[0]
    lock.release()
    stuck.join(20)


def test_a_loop_that_goes_on_after_one_period_is_left_alone() -> None:
    looked = threading.Semaphore(0)
    counts = itertools.chain([0, 0, 1, 1, 2, 2, 3, 3], itertools.count(4))
    lines: list[str] = []

    def rounds() -> int:
        looked.release()
        return next(counts)

    def end() -> None:
        pytest.fail("it was slow, and went on")

    with Watchdog(rounds, period_s=0.001, say=lines.append, end=end):
        for _ in range(8):
            assert looked.acquire(timeout=20)
    assert lines and all("stood still" in line and "ends" not in line for line in lines)


def test_the_process_ends_with_its_threads_in_words() -> None:
    code = (
        "import threading\n"
        "from slosched.daemon.watchdog import Watchdog\n"
        "def waits_for_ever():\n"
        "    threading.Event().wait(60)\n"
        f"with Watchdog(lambda: 0, period_s={_PERIOD_S}):\n"
        "    waits_for_ever()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == INTERNAL_ERROR
    assert "in waits_for_ever" in done.stderr and "this process ends" in done.stderr
