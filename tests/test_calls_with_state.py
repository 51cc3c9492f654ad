"""Calls that share state, and calls beside models: on emulated GPUs, and on GPUs' exec lanes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from function_rig import FunctionRig
from slosched.clock import now_ns, sleep_ns
from slosched.codes import Code
from slosched.config import WorkerConfig
from slosched.core.worker.interface import CallAwaits, DeviceEvent, Op, OpDone, OpKind
from slosched.daemon.backends.functions.devices import GpuWithFunctions
from slosched.daemon.backends.functions.loaded import LoadedFunction
from slosched.daemon.backends.functions.runner import Runner
from slosched.errors import InvalidConfig
from slosched.functions.state import State, open_store
from slosched.functions.state.folders import root
from slosched.messages import Span
from slosched.units import NS_PER_S

MODULE = "stateful_functions"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shared memory of these tests alone."""
    monkeypatch.setenv("SLOSCHED_STATE_FOLDER", f"slosched-test-{os.getpid()}-calls")
    yield
    shutil.rmtree(root(), ignore_errors=True)


def folders() -> set[str]:
    return {each.name for each in root().iterdir()}


@pytest.mark.processes
def test_calls_share_state_which_ends_with_their_worker(tmp_path: Path) -> None:
    before = folders()
    with FunctionRig(MODULE, state=f"embedded:{tmp_path}", slots=3) as rig:
        ops = [rig.begin("adds", 1) for _ in range(12)]
        for op in ops:
            done = rig.done(op)
            assert not done.code, done.reason
        done, total = rig.call("total")
        assert not done.code, done.reason
        assert total == 12
        assert folders() > before
    assert folders() == before
    assert not [each for each in tmp_path.rglob("*") if each.is_file() and "total" in each.name]


@pytest.mark.processes
def test_the_state_of_a_worker_that_is_killed_is_dropped(tmp_path: Path) -> None:
    store = f"embedded:{tmp_path}"
    script = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from function_rig import FunctionRig\n"
        f"rig = FunctionRig({MODULE!r}, state={store!r})\n"
        "assert not rig.call('adds', 1.0)[0].code\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    give_up_ns = now_ns() + 20 * NS_PER_S
    while open_store(store).namespaces():
        assert now_ns() < give_up_ns, open_store(store).namespaces()
        sleep_ns(10_000_000)


@pytest.mark.processes
def test_a_namespace_with_a_name_outlives_the_worker(tmp_path: Path) -> None:
    store = f"embedded:{tmp_path}"
    with State("mine", store, own=True) as state:
        with FunctionRig(MODULE, state=store, namespace="mine") as rig:
            done, _ = rig.call("adds", 5)
            assert not done.code, done.reason
        array = state.array("total", 1, merge="sum")
        array.pull()
        assert array.get()[0] == 5


@pytest.mark.processes
def test_without_a_store_a_call_says_how_to_get_one() -> None:
    with FunctionRig(MODULE) as rig:
        done, _ = rig.call("total")
        assert done.code == Code.CALL_RAISED
        assert "--state" in done.reason


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="give state"):
        WorkerConfig(functions=(MODULE,), namespace="mine")
    with pytest.raises(InvalidConfig, match="give functions"):
        WorkerConfig(device="none")
    with pytest.raises(InvalidConfig, match="most_calls"):
        WorkerConfig(functions=(MODULE,), most_calls=0)


# ---------------------------------------------------------------------------- a GPU's exec lane


class Inner:
    """A GPU that arms, and ends an exec when a test says so."""

    steady = False
    free_copies = False
    arm_ahead_ns = 1000

    def __init__(self) -> None:
        self.launched: list[Op] = []
        self.done: list[DeviceEvent] = []
        self.at_once = False

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        self.launched.append(op)
        return OpDone(op.op_id, Span(0, 1, 1)) if self.at_once else None

    def withdraw(self, op_id: int) -> OpDone | None:
        return None

    def poll(self, *, now_ns: int) -> Sequence[DeviceEvent]:
        done, self.done = self.done, []
        return done

    def next_event_ns(self) -> int | None:
        return 0 if self.done else None

    def end(self, op: Op) -> None:
        self.done.append(OpDone(op.op_id, Span(0, 1, 1)))


class Calls:
    """Instead of a runner."""

    def __init__(self) -> None:
        self.launched: list[Op] = []

    def launch(self, op: Op) -> None:
        self.launched.append(op)


def make(gpu_id: int, name: str) -> LoadedFunction:
    raise AssertionError("nothing is loaded here")


class Lane:
    """An exec lane that calls and execs share."""

    def __init__(self) -> None:
        self.inner, self.calls = Inner(), Calls()
        runner: Runner = self.calls  # type: ignore[assignment]
        self.gpu = GpuWithFunctions(self.inner, runner, make, {"f"}, now_ns)
        self._next = 0

    def op(self, kind: OpKind, earliest_ns: int = 0) -> Op:
        self._next += 1
        return Op(self._next, kind, 0, 0, self._next, earliest_ns=earliest_ns, latest_ns=2**62)

    def launch(self, kind: OpKind, *, now: int = 10, earliest_ns: int = 0) -> Op:
        op = self.op(kind, earliest_ns)
        assert self.gpu.launch(op, now_ns=now) is None
        return op


def test_a_call_waits_for_the_exec_that_runs_and_holds_the_next_one() -> None:
    lane = Lane()
    first = lane.launch(OpKind.EXEC)
    call = lane.launch(OpKind.CALL)
    second = lane.launch(OpKind.EXEC)
    assert lane.inner.launched == [first]
    assert not lane.calls.launched
    lane.inner.end(first)
    assert [event.op_id for event in lane.gpu.poll(now_ns=20) if isinstance(event, OpDone)] == [1]
    assert lane.calls.launched == [call]
    assert lane.inner.launched == [first]
    assert lane.gpu.next_event_ns() is None
    lane.gpu.over(call)
    assert lane.gpu.next_event_ns() == 0
    lane.gpu.poll(now_ns=30)
    assert lane.inner.launched == [first, second]


def test_a_call_that_is_armed_begins_at_its_time() -> None:
    lane = Lane()
    call = lane.launch(OpKind.CALL, now=10, earliest_ns=50)
    assert not lane.calls.launched
    assert lane.gpu.next_event_ns() == 50
    lane.gpu.poll(now_ns=50)
    assert lane.calls.launched == [call]


def test_what_is_held_can_be_taken_back() -> None:
    lane = Lane()
    call = lane.launch(OpKind.CALL)
    held = lane.launch(OpKind.EXEC)
    done = lane.gpu.withdraw(held.op_id)
    assert done is not None
    assert done.code == Code.CANCELLED
    lane.gpu.over(call)
    lane.gpu.poll(now_ns=20)
    assert not lane.inner.launched


@pytest.mark.processes
def test_a_suspended_call_on_a_gpu_lets_another_one_have_it() -> None:
    with FunctionRig(MODULE, device="emulated") as rig:
        first = rig.begin("awaits_on_gpu", gpu_id=0)
        assert isinstance(rig.wait(first.op_id), CallAwaits)
        second = rig.begin("awaits_on_gpu", gpu_id=0)
        assert isinstance(rig.wait(second.op_id), CallAwaits)
        for op in (second, first):
            rig.answer(op, 0, 7)
            done = rig.resumed(op)
            assert rig.result(op, done) == 7


def test_a_call_that_could_only_begin_after_its_window_does_not() -> None:
    lane = Lane()
    first = lane.launch(OpKind.EXEC)
    call = lane.op(OpKind.CALL)
    late = replace(call, latest_ns=15)
    assert lane.gpu.launch(late, now_ns=10) is None
    lane.inner.end(first)
    ends = [each for each in lane.gpu.poll(now_ns=20) if isinstance(each, OpDone)]
    assert [each.code for each in ends] == [0, Code.EXEC_TOO_LATE]
    assert not lane.calls.launched


def test_an_exec_that_ends_while_it_is_launched_is_reported() -> None:
    """As on a device without streams. It was held while a call ran, and the next exec starts it."""
    lane = Lane()
    call = lane.launch(OpKind.CALL)
    lane.launch(OpKind.EXEC)
    lane.gpu.over(call)
    lane.inner.at_once = True
    lane.launch(OpKind.EXEC)
    assert lane.gpu.next_event_ns() == 0
    ends = [each.op_id for each in lane.gpu.poll(now_ns=20) if isinstance(each, OpDone)]
    assert ends == [2, 3]
