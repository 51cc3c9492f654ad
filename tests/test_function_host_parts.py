"""Host parts of calls in their processes, driven op by op: they run beside what has the lane."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prepared_functions
import slosched
from function_rig import FunctionRig
from slosched.codes import Code
from slosched.core.worker.interface import CallLost, OpDone, OpKind
from slosched.engines import local
from slosched.engines.live import LiveEngine
from slosched.functions.errors import FunctionError
from slosched.functions.function import Function


@pytest.fixture
def rig() -> Iterator[FunctionRig]:
    with FunctionRig("prepared_functions", device="emulated") as opened:
        yield opened


def test_a_host_part_ends_while_another_call_has_the_lane(rig: FunctionRig, tmp_path: Path) -> None:
    over = tmp_path / "over"
    has_lane = rig.begin("waits_on_lane", str(over), gpu_id=0)
    cold = rig.begin("builds", "network", gpu_id=0, kind=OpKind.PREPARE)
    assert not rig.done(cold).code
    assert not [each for each in rig.events if isinstance(each, OpDone)]  # the lane is taken
    over.touch()
    assert not rig.done(has_lane).code
    prepared_in, ran_in, made = rig.result(cold, rig.resumed(cold))
    assert prepared_in == ran_in
    assert made == "network of builds"


def test_host_parts_of_two_calls_run_beside_each_other(rig: FunctionRig, tmp_path: Path) -> None:
    over = tmp_path / "over"
    slow = rig.begin("builds", "slow", str(over), gpu_id=0, kind=OpKind.PREPARE)
    quick = rig.begin("builds", "quick", gpu_id=0, kind=OpKind.PREPARE)
    assert not rig.done(quick).code
    over.touch()
    assert not rig.done(slow).code
    slow_pid, quick_pid = (rig.result(op, rig.resumed(op))[1] for op in (slow, quick))
    assert slow_pid != quick_pid


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("raises", Code.CALL_RAISED, "RuntimeError: no such network"),
        ("exits", Code.MODEL_PROCESS_ENDED, "ended"),
    ],
)
def test_a_host_part_that_fails_costs_its_call_alone(
    rig: FunctionRig, what: str, code: Code, words: str
) -> None:
    done = rig.done(rig.begin("builds", what, gpu_id=0, kind=OpKind.PREPARE))
    assert done.code == code
    assert words in done.reason
    after = rig.begin("builds", "well", gpu_id=0, kind=OpKind.PREPARE)
    assert not rig.done(after).code
    assert rig.result(after, rig.resumed(after))[2] == "well of builds"


def test_a_host_part_has_the_time_of_its_functions_limit(rig: FunctionRig, tmp_path: Path) -> None:
    op = rig.begin("builds_within", "it", str(tmp_path / "never"), gpu_id=0, kind=OpKind.PREPARE)
    done = rig.done(op)
    assert done.code == Code.CALL_OVER_LIMIT
    assert "the time of a call, 500ms" in done.reason


def test_a_call_whose_process_ends_behind_its_host_part_does_not_begin_again(
    rig: FunctionRig,
) -> None:
    op = rig.begin("builds", "network", gpu_id=0, kind=OpKind.PREPARE)
    assert not rig.done(op).code
    os.kill(rig.backend.calls.pid_of(op.action_id), signal.SIGKILL)
    (lost,) = rig.reported(CallLost)
    assert (lost.action_id, lost.code) == (op.action_id, Code.MODEL_PROCESS_ENDED)
    assert rig.resumed(op).code == Code.MODEL_PROCESS_ENDED


def test_a_host_part_can_be_ended(rig: FunctionRig, tmp_path: Path) -> None:
    op = rig.begin("builds", "slow", str(tmp_path / "never"), gpu_id=0, kind=OpKind.PREPARE)
    rig.backend.calls.end(op.action_id, "taken back")
    assert rig.done(op).code == Code.PROCESS_ENDED


def test_the_start_of_a_new_process_is_a_host_part(rig: FunctionRig, tmp_path: Path) -> None:
    prepared = rig.prepare("new_each_time")
    assert prepared.function is not None and prepared.profile is not None
    assert prepared.function.prepare_ns == prepared.profile.weights_ns  # as measured
    over = tmp_path / "over"
    has_lane = rig.begin("waits_on_lane", str(over), gpu_id=0)
    colds = [rig.begin("new_each_time", gpu_id=0, kind=OpKind.PREPARE) for _ in range(2)]
    for cold in colds:
        assert not rig.done(cold).code
    over.touch()
    assert not rig.done(has_lane).code
    pids = {rig.result(cold, rig.resumed(cold)) for cold in colds}
    assert len(pids) == 2


def test_engines_without_lanes_run_the_host_part_before_the_body() -> None:

    with local.LocalEngine([prepared_functions.builds]) as engine:
        pid, other, made = engine.call("builds", "network").result()
        assert pid == other == os.getpid()
        assert made == "network of builds"
        with pytest.raises(slosched.CallFailed, match="no such network"):
            engine.call("builds", "raises").result()


@pytest.mark.processes
def test_a_call_is_answered_while_another_ones_host_part_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client, controller and worker, on an emulated GPU."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    over, there = tmp_path / "over", tmp_path / "there"
    there.touch()
    functions: list[Function[Any] | str] = [
        prepared_functions.builds,
        prepared_functions.waits_on_lane,
    ]
    options = ["--device", "emulated", "--gpus", "1"]
    with LiveEngine(functions, slots=1, logs=tmp_path / "logs", worker_options=options) as engine:
        slow = engine.client.start_call(prepared_functions.builds, "net", str(over), slo="60s")
        for _ in range(3):
            quick = engine.client.start_call(
                prepared_functions.waits_on_lane, str(there), slo="60s"
            )
            quick.result(60)
        assert not slow.done()
        over.touch()
        assert slow.result(60)[2] == "net of builds"
        broken = engine.client.start_call(prepared_functions.builds, "raises", slo="60s")
        with pytest.raises(slosched.CallFailed, match="no such network"):
            broken.result(60)


def test_a_function_in_a_slot_needs_no_host_part() -> None:
    with pytest.raises(FunctionError, match="prepare is for functions with gpu=True"):

        @slosched.function(prepare=lambda ctx: None)
        def f(ctx: object) -> None: ...
