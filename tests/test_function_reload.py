"""reset="reload": each call has a process that is started, and loaded, for it alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from function_rig import FunctionRig, alive
from slosched.clock import now_ns, sleep_ns
from slosched.codes import Code
from slosched.engines.local import LocalEngine
from slosched.functions.errors import FunctionError
from slosched.functions.function import function

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def rig() -> Iterator[FunctionRig]:
    with FunctionRig(call_memory_bytes=2**28) as rig:
        yield rig


def test_each_call_is_a_cold_start_in_a_process_of_its_own(rig: FunctionRig) -> None:
    answers = [rig.call("counts_cold")[1] for _ in range(4)]
    assert len({pid for pid, _ in answers}) == 4  # init ran in each
    assert {count for _, count in answers} == {1}
    warm = rig.call("counts")[1]
    assert warm == (rig.call("counts")[1][0], warm[1])  # the others' processes stay


def test_the_start_of_the_process_is_part_of_the_call(rig: FunctionRig) -> None:
    rig.load("counts_cold")
    op = rig.begin("counts_cold")
    began_ns = now_ns()
    done = rig.done(op)
    assert not done.code, done.reason
    assert done.span.begin_ns <= began_ns  # from its launch on, and not from when it had a process


def test_no_process_waits_for_calls_and_none_is_left(rig: FunctionRig) -> None:
    pids = {rig.call("sleeps_cold", 0.0)[1] for _ in range(3)}
    for pid in pids:
        _gone(pid)


def test_a_call_that_is_given_up_while_its_process_starts_leaves_none(rig: FunctionRig) -> None:
    rig.load("sleeps_cold")
    op = rig.begin("sleeps_cold", 30.0)
    rig.backend.calls.end(op.action_id, "no longer wanted")
    done = rig.done(op)
    assert done.code == Code.PROCESS_ENDED
    after, pid = rig.call("sleeps_cold", 0.0)
    assert not after.code
    _gone(pid)


def test_on_a_gpu_s_lane_it_is_the_same() -> None:
    with FunctionRig(device="emulated") as rig:
        answers = [rig.call("counts_cold_on_gpu", gpu_id=0)[1] for _ in range(3)]
        assert len({pid for pid, _ in answers}) == 3
        assert {count for _, count in answers} == {1}
        for pid, _ in answers:
            _gone(pid)


def _gone(pid: int) -> None:
    until_ns = now_ns() + 10_000_000_000
    while alive(pid) and now_ns() < until_ns:
        sleep_ns(5_000_000)
    assert not alive(pid)


def test_the_local_engine_runs_init_for_each_call() -> None:
    made: list[int] = []

    @function(init=lambda: made.append(1), reset="reload")
    def cold(ctx: object) -> int:
        return len(made)

    with LocalEngine([cold]) as engine:
        assert [engine.call(cold).result() for _ in range(3)] == [1, 2, 3]


def test_dask_says_why_it_cannot() -> None:
    dask_engine = pytest.importorskip("slosched.engines.dask_engine")

    @function(reset="reload")
    def cold(ctx: object) -> None:
        return None

    with pytest.raises(
        dask_engine.NotPossible, match="starts a worker again only with all that it runs"
    ):
        dask_engine.DaskEngine([cold])


def test_an_unknown_reset_names_those_that_there_are() -> None:
    with pytest.raises(FunctionError, match="none, restore, reload"):
        function(reset="never", name="f")(lambda ctx: None)  # type: ignore[call-overload]
