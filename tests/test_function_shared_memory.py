"""Shared memory that calls hold: memfd, /dev/shm and shared mappings have bounds by call and by worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from function_rig import FunctionRig, alive
from slosched.codes import Code
from slosched.daemon.backends.functions.guard import shared_bytes

pytestmark = pytest.mark.processes

LIMIT = 2**27


@pytest.mark.parametrize("how", ["open", "file", "mapped", "anonymous"])
def test_a_call_that_holds_too_much_is_ended(tmp_path: Path, how: str) -> None:
    with FunctionRig(call_memory_bytes=LIMIT) as rig:
        done, _ = rig.call("shares", LIMIT + 2**24, how, str(tmp_path / "never"))
        assert done.code == Code.CALL_OVER_LIMIT
        assert "the shared memory of a call, 128MiB: memfd, /dev/shm" in done.reason
        assert rig.call("echo", ["x", 1])[1] == ["x", 1]


def test_a_call_may_hold_less(tmp_path: Path) -> None:
    over = tmp_path / "over"
    with FunctionRig(call_memory_bytes=LIMIT) as rig:
        op = rig.begin("shares", LIMIT // 2, "open", str(over))
        other = rig.begin("shares", LIMIT // 2, "mapped", str(over))
        for _ in range(20):
            rig.poll()
        over.touch()
        assert not rig.done(op).code
        assert not rig.done(other).code


def test_a_process_in_which_calls_left_much_takes_no_other_call() -> None:
    with FunctionRig(call_memory_bytes=LIMIT) as rig:
        pid = rig.call("shares", LIMIT // 2 + 2**20, "open")[1]
        assert rig.call("shares", 4096, "open")[1] != pid


def test_all_calls_of_a_worker_have_a_bound_together(tmp_path: Path) -> None:
    with FunctionRig(call_memory_bytes=0, slots=3) as rig:
        rig.backend.calls._shared_at_most_bytes = LIMIT  # by default half of this host's memory
        over = tmp_path / "over"
        small = [rig.begin("shares", LIMIT // 3, "open", str(over)) for _ in range(2)]
        largest = rig.begin("shares", LIMIT // 2, "open", str(over))
        done = rig.done(largest)
        assert done.code == Code.CALL_OVER_LIMIT
        assert "of all calls of a worker, 128MiB; this one has the most, 64MiB" in done.reason
        over.touch()
        for op in small:
            assert not rig.done(op).code


def test_what_a_process_holds() -> None:
    before = shared_bytes(os.getpid())
    fd = os.memfd_create("of this test")
    try:
        os.truncate(fd, 2**30)
        assert shared_bytes(os.getpid()) == before  # nothing lies there
        os.posix_fallocate(fd, 0, 2**20)
        twice = os.dup(fd)
        assert shared_bytes(os.getpid()) == before + 2**20
        os.close(twice)
    finally:
        os.close(fd)
    assert shared_bytes(2**22 + 1) == 0 and not alive(2**22 + 1)
