"""The gate in shared memory: high jobs alone, on many levels, several at a time, and dead ones block none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slosched.daemon.member import gate as gates
from slosched.daemon.member.gate import MOST_JOBS, Gate, GateMember, gate_path
from slosched.errors import InvalidConfig, OutOfResources

_LONG_NS = 20 * 10**9  # a bound that only a failure reaches


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    opened = Gate.open(str(tmp_path / "gate"))
    yield opened
    opened.remove()


def _members(gate: Gate, *priorities: int) -> list[GateMember]:
    members = [gate.member(job, priority) for job, priority in enumerate(priorities)]
    for member in members:
        member.look_around()
    return members


def _nothing() -> None:
    pass


def test_only_higher_jobs_are_waited_for(gate: Gate) -> None:
    low, same, high = _members(gate, 3, 3, 7)
    assert low.enter().timed_out is False
    assert not high.must_wait()
    same.want()
    assert not low.must_wait() and not high.must_wait()
    high.want()
    assert low.must_wait() and same.must_wait() and not high.must_wait()
    high.leave()
    assert not low.must_wait() and not same.must_wait()


def test_the_end_of_one_high_job_does_not_let_the_low_one_run_beside_another(gate: Gate) -> None:
    low, first, second = _members(gate, 0, 1, 1)
    first.enter()
    second.enter()  # jobs of one level do not wait for one another
    first.leave()
    assert low.must_wait()
    second.leave()
    assert not low.must_wait()


def test_a_job_that_sleeps_between_requests_blocks_none(gate: Gate) -> None:
    low, high = _members(gate, 0, 1)
    low.enter()
    low.leave()
    assert high.enter(_LONG_NS).timed_out is False


def test_a_running_low_job_is_waited_for_until_the_bound(gate: Gate) -> None:
    low, high = _members(gate, 0, 1)
    low.enter()
    entered = high.enter(5_000_000)
    assert entered.timed_out
    assert entered.entered_ns - entered.wanted_ns >= 5_000_000


def test_a_drained_low_job_lets_the_high_one_in_and_resumes_behind_it(gate: Gate) -> None:
    low, high = _members(gate, 0, 1)
    low.enter()
    drained = threading.Event()
    order: list[str] = []

    def high_job() -> None:
        high.want()
        drained.wait(20)
        assert not high.enter(_LONG_NS).timed_out
        order.append("high")
        high.leave()

    thread = threading.Thread(target=high_job)
    thread.start()
    while not low.must_wait():
        time.sleep(0.001)
    pause = low.pause(drained.set, boundary=17)
    order.append("low")
    thread.join()
    assert order == ["high", "low"]
    (part,) = pause.parts
    assert (part.job, part.by, part.boundary) == (0, 1, 17)
    assert part.wanted_ns <= pause.began_ns <= part.started_ns <= part.resumed_ns
    assert part.resumed_ns <= pause.resumed_ns


def test_a_hanging_high_job_is_not_waited_for_for_ever(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = _members(gate, 0, 1)
    low.enter()
    high.want()
    monkeypatch.setattr(gates, "SILENT_NS", 20_000_000)
    low.pause(_nothing)  # returns, though the high job still wants the GPU
    assert low.must_wait()


def test_levels_never_run_side_by_side(gate: Gate) -> None:
    priorities = (0, 1, 1, 2)
    members = _members(gate, *priorities)
    running: dict[int, int] = {}
    wrong: list[dict[int, int]] = []
    lock = threading.Lock()
    done = [0] * len(priorities)

    def stepping(member: GateMember) -> None:
        with lock:
            running[member.job] = member.priority
            if len(set(running.values())) > 1:
                wrong.append(dict(running))
        time.sleep(0.0003)
        with lock:
            del running[member.job]

    def job(member: GateMember) -> None:
        for request in range(12):
            if member.enter(_LONG_NS).timed_out:
                wrong.append({member.job: request})
            for _ in range(8):
                stepping(member)
                if member.must_wait():
                    member.pause(_nothing)
            member.leave()
            done[member.job] += 1
            time.sleep(0.001 * member.priority)

    threads = [threading.Thread(target=job, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert done == [12] * len(priorities)


_LOW = """
import sys, time
from slosched.daemon.member.gate import Gate
low = Gate.open(sys.argv[1]).member(0, 0)
print("ready", flush=True)
while True:
    low.enter()
    for _ in range(50):
        low.count()
        if low.must_wait():
            low.pause(lambda: None)
    low.leave()
"""
_HIGH = """
import sys, time
from slosched.daemon.member.gate import Gate
high = Gate.open(sys.argv[1]).member(1, 5)
high.enter()
print("ready", flush=True)
time.sleep(60)
"""


def _started(program: str, gate: Gate) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(gate.path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def _ended(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait(20)
    assert child.stdout is not None
    child.stdout.close()


@pytest.mark.parametrize("after_pause", [False, True])
def test_a_high_job_that_came_as_the_low_one_was_about_to_run_is_waited_for(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, after_pause: bool
) -> None:
    low, first = _members(gate, 0, 5)
    if after_pause:
        low.enter()
    first.enter()
    came: list[GateMember] = []
    rests = 0

    def rest(_waiting: object) -> None:
        """The wait of the low job: what happens meanwhile, step by step."""
        nonlocal rests
        rests += 1
        if rests == 1:
            first.leave()
            came.append(gate.member(2, 9))  # new: the low job has not seen it at its start
            assert not came[0].enter().timed_out
        elif rests == 4:
            came[0].leave()
        assert rests < 50

    with monkeypatch.context() as during:
        during.setattr(gates._Waiting, "rest", rest)
        if after_pause:
            low.pause(_nothing)
        else:
            low.enter()
    assert rests == 4, "the low job ran beside the high one that came last"


@pytest.mark.processes
def test_a_low_process_makes_no_step_while_the_high_one_runs(gate: Gate) -> None:
    child = _started(_LOW, gate)
    try:
        high = gate.member(1, 5)
        for _ in range(25):
            assert not high.enter(_LONG_NS).timed_out
            before = high.steps(0)
            time.sleep(0.003)
            assert high.steps(0) == before
            high.leave()
            until = time.monotonic() + 20
            while high.steps(0) == before and time.monotonic() < until:
                time.sleep(0.001)
            assert high.steps(0) > before, "the low one did not resume"
    finally:
        _ended(child)


@pytest.mark.processes
def test_a_low_job_resumes_soon_after_the_high_process_was_killed(gate: Gate) -> None:
    low = gate.member(0, 0)
    child = _started(_HIGH, gate)
    try:
        low.look_around()
        assert low.must_wait()
        os.kill(child.pid, signal.SIGKILL)  # and not reaped: a zombie is dead, too
        began = time.monotonic()
        low.pause(_nothing)
        assert time.monotonic() - began < 10  # 0.1 s, but for a busy machine
        assert not low.must_wait()
    finally:
        _ended(child)


@pytest.mark.processes
def test_a_low_process_that_died_in_its_request_blocks_none(gate: Gate) -> None:
    child = _started(_LOW, gate)
    high = gate.member(1, 5)
    try:
        high.look_around()
        child.send_signal(signal.SIGSTOP)
        gate.words[gate.slot(0) + gates._STATE] = gates._RUNNING
        os.kill(child.pid, signal.SIGKILL)
        assert not high.enter(_LONG_NS).timed_out
    finally:
        _ended(child)


def test_names_and_numbers_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="letters, digits"):
        gate_path("a b")
    with pytest.raises(InvalidConfig, match="letters, digits"):
        Gate.open("")
    opened = Gate.open(str(tmp_path / "gate"))
    with pytest.raises(InvalidConfig, match=f"room for {MOST_JOBS}"):
        opened.member(MOST_JOBS, 0)
    with pytest.raises(OutOfResources, match="no memory for the gate"):
        Gate.open(str(tmp_path / "none" / "gate"))
    with pytest.raises(OutOfResources, match="no memory for the gate"):
        Gate.open(str(tmp_path))
    assert gate_path("x-1").name == "slosched-gate-x-1"


def test_priorities_that_were_made_known_before_stay(tmp_path: Path) -> None:
    Gate.create(str(tmp_path / "gate"), {0: 4, 3: -2})
    opened = Gate.open(str(tmp_path / "gate"))
    assert [opened.words[opened.slot(job) + gates._PRIORITY] for job in (0, 3)] == [4, -2]
