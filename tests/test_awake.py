"""Cores that are kept awake: in the idle class, one loop each, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slosched.daemon.awake import keep_awake
from slosched.daemon.housekeeping import usable_cores
from slosched.errors import InvalidConfig

IDLE = os.SCHED_IDLE
pytestmark = pytest.mark.processes


def children() -> list[int]:
    found: list[int] = []
    for each in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # a thread that ended meanwhile
            found += map(int, (each / "children").read_text().split())
    return found


def test_a_loop_in_the_idle_class_sits_on_each_core_and_goes_with_the_call() -> None:
    before = set(children())
    seen: list[tuple[int, set[int]]] = []

    def until() -> bool:
        ours = [child for child in children() if child not in before]
        loops = [child for child in ours if os.sched_getscheduler(child) == IDLE]
        seen.extend((child, os.sched_getaffinity(child)) for child in loops)
        return len({child for child, _ in seen}) == len(cores)

    cores = usable_cores()[:2]
    keep_awake(cores, until=until)
    assert {core for _, where in seen for core in where} == set(cores)
    assert all(len(where) == 1 for _, where in seen)
    assert set(children()) <= before


def test_a_core_that_is_not_there_is_refused_before_anything_starts() -> None:
    before = children()
    with pytest.raises(InvalidConfig, match="this process may use"):
        keep_awake([100_000], until=lambda: True)
    with pytest.raises(InvalidConfig):
        keep_awake([], until=lambda: True)
    assert children() == before


def test_the_command_ends_by_itself_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "slosched", "awake", "--cores", str(usable_cores()[0])]
    done = subprocess.run(
        [*command, "--seconds", "0.3"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0 and "keeping 1 core(s) awake" in done.stdout + done.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "slosched", "awake", "--cores", "x"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert refused.returncode == 2 and "--cores" in refused.stderr
