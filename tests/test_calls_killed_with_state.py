"""kill -9 of processes whose calls change shared state: what docs/state.md promises holds then, too.

A sum counts once. A call that was answered has counted; one that was killed has, or has not, and never twice.
No lock outlives its process by more than its lease.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from function_rig import FunctionRig
from slosched.clock import now_ns, sleep_ns
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone
from slosched.functions.state.folders import root
from slosched.units import NS_PER_S
from stateful_functions import COUNTED
from test_state import redis_address as redis_address

MODULE = "stateful_functions"
ENDED = (Code.MODEL_PROCESS_ENDED, Code.PROCESS_ENDED)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shared memory of these tests alone."""
    monkeypatch.setenv("SLOSCHED_STATE_FOLDER", f"slosched-test-{os.getpid()}-killed")
    yield
    shutil.rmtree(root(), ignore_errors=True)


@pytest.fixture(params=["embedded", pytest.param("redis", marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FunctionRig]:
    """With Redis each kill of a call that has the lock costs a lease of 10 s."""
    store = f"embedded:{tmp_path}"
    if request.param == "redis":
        store = str(request.getfixturevalue("redis_address"))
    with FunctionRig(MODULE, state=store, slots=3) as opened:
        yield opened


def _counted(rig: FunctionRig) -> list[float]:
    done, found = rig.call("counted", within_s=60)
    assert not done.code, done.reason
    return list(found)


@pytest.mark.processes
@pytest.mark.parametrize(("at", "counts"), [("locked", {0}), ("changed", {0, 1}), ("pushed", {1})])
def test_a_call_that_dies_at_a_place_counts_once_at_most(
    rig: FunctionRig, at: str, counts: set[int]
) -> None:
    done = rig.call("counts", 0, at, within_s=60)[0]
    assert done.code == Code.MODEL_PROCESS_ENDED
    done = rig.call("counts", 1, within_s=60)[0]  # the lock is free, after a lease at the latest
    assert not done.code, done.reason
    found = _counted(rig)
    assert found[0] in counts
    assert found[1] == 1
    assert found[COUNTED] == found[0] + 1


@pytest.mark.processes
def test_calls_that_are_killed_at_random_count_once_at_most(
    rig: FunctionRig, request: pytest.FixtureRequest
) -> None:
    draw = random.Random(11)
    ops: dict[int, Op] = {}
    kills = 0
    most = 2 if "redis" in request.node.name else 15
    for index in range(COUNTED):
        ops[index] = rig.begin("counts", index)
        rig.poll(0)
        if index % 3 == 2 and kills < most:
            sleep_ns(draw.randrange(4_000_000))
            victim = draw.choice(list(ops))
            pid = rig.backend.calls.pid_of(ops[victim].action_id)
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
    answered = {index: rig.wait(op.op_id, 120) for index, op in ops.items()}
    assert kills
    codes = {index: done.code for index, done in answered.items() if isinstance(done, OpDone)}
    assert set(codes.values()) <= {0, *ENDED}
    assert COUNTED - list(codes.values()).count(0) <= kills  # each costs a call at most
    found = _counted(rig)
    for index, code in codes.items():
        assert found[index] in ((0, 1) if code else (1,)), index
    assert found[COUNTED] == sum(found[:COUNTED])


@pytest.mark.processes
def test_a_lock_ends_with_the_process_that_held_it(rig: FunctionRig, tmp_path: Path) -> None:
    file = tmp_path / "held"
    holder = rig.begin("holds_lock", str(file))
    give_up_ns = now_ns() + 60 * NS_PER_S
    while not file.exists():
        rig.poll()
        assert now_ns() < give_up_ns
    waits = rig.begin("counts", 0)
    os.kill(rig.backend.calls.pid_of(holder.action_id), signal.SIGKILL)
    assert rig.done(holder).code == Code.MODEL_PROCESS_ENDED
    assert not rig.done(waits).code  # within 30 s, which is beyond a lease
    assert _counted(rig)[0] == 1
