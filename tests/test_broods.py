"""Children of a zygote, where the host has no process left for one of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import zygote_short_of_processes
from slosched import child_processes
from slosched.clock import now_ns
from slosched.daemon.backends.broods.children import Brood, Watch, start_zygote
from slosched.units import NS_PER_S

pytestmark = pytest.mark.processes


def _until(watch: Watch, true: Callable[[], object]) -> None:
    give_up_ns = now_ns() + 30 * NS_PER_S
    while not true():
        assert now_ns() < give_up_ns
        watch.wait(1.0)
        watch.step()


def _pipes(pid: int) -> set[str]:
    """The pipes that the process has open."""
    links = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.add(str(each.readlink()))
    return {link for link in links if link.startswith("pipe:")}


def test_a_process_that_cannot_be_started_ends_alone() -> None:
    watch = Watch()
    lost: list[str] = []
    process, end = start_zygote(zygote_short_of_processes.__name__)
    brood = Brood(watch, end, lambda line: None, lost.append)
    try:
        refused = brood.spawn("refused")
        _until(watch, lambda: refused.ended)
        assert refused.ended.startswith("it could not be started")
        started = brood.spawn("started")
        _until(watch, lambda: started.inbox)
        assert not lost, "the zygote ended with the process that it could not start"
        started.kill("the test is over")
        _until(watch, lambda: not brood.has(started))
        left = _pipes(process.pid) - _pipes(os.getpid())
        assert len(left) == 1, (
            "the pipe that wakes it is its own; others are of processes that have ended"
        )
    finally:
        brood.close("the test is over")
        child_processes.end(process, within_s=5.0, ask=False)
        watch.close()
