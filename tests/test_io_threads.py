"""How many threads of a controller move bytes between its sockets and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slosched.daemon.controller import io_threads_for

_COUNT = """
import os, sys, time
from slosched.transport.sockets import Dealer, Router, use_io_threads
use_io_threads(int(sys.argv[1]))
router = Router("127.0.0.1", 0)
dealer = Dealer(f"127.0.0.1:{router.port}")
give_up, counted = time.monotonic() + 20, 0
while counted < int(sys.argv[1]) and time.monotonic() < give_up:  # a thread names itself once it runs
    time.sleep(0.05)
    tasks = os.listdir("/proc/self/task")
    names = [open(f"/proc/self/task/{task}/comm").read() for task in tasks]
    counted = sum(name.startswith("ZMQbg/IO") for name in names)
print(counted)
dealer.close(); router.close()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are named in /proc")
@pytest.mark.parametrize("number", [1, 3])
def test_a_process_has_as_many_as_it_asks_for_before_its_first_socket(number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, str(number)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str(number), done.stderr


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (3, 1), (4, 2), (7, 3), (8, 4), (64, 4)])
def test_the_usual_number_leaves_the_loop_its_cpu(cpus: int, threads: int) -> None:
    assert io_threads_for(cpus) == threads
