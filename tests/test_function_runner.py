"""The runner of functions, alone: what a call does costs this call, and nothing of it stays."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from function_rig import Ended, FunctionRig, alive, children_of, open_files
from slosched.clock import now_ns, sleep_ns
from slosched.codes import Code
from slosched.core.worker.interface import CallAwaits, CallLost, WeightsLost
from slosched.daemon.backends.functions import loaded
from slosched.daemon.backends.functions.running_call import MOST_PROCESSES
from slosched.errors import ExtensionError, InvalidConfig
from slosched.units import NS_PER_S

pytestmark = pytest.mark.processes

DIED = Code.MODEL_PROCESS_ENDED
#: (function, arguments, the code, what the reason says).
ENDS = {
    "raises": (("boo",), Code.CALL_RAISED, "ValueError: boo"),
    "exits": ((3,), DIED, "exit code 3"),
    "leaves": ((), DIED, "exit code 7"),
    "segfaults": ((), DIED, "signal 11"),
    "kills_itself": ((), DIED, "signal 9"),
    "sleeps": ((60,), Code.CALL_OVER_LIMIT, "the time of a call, 1s"),
    "spins": ((), Code.CALL_OVER_LIMIT, "the time of a call, 500ms"),
    "eats": ((2**30,), Code.CALL_OVER_LIMIT, "the memory of a call, 256MiB"),
    "bombs": ((), Code.CALL_OVER_LIMIT, f"may have started, {MOST_PROCESSES}"),
    "many_eat": ((8, 2**26), Code.CALL_OVER_LIMIT, "with the processes it started"),
    "scribbles": ((), DIED, "sent nonsense"),
    "returns": ((2**21,), Code.CALL_OVER_LIMIT, "at most 1,048,576 travel"),
    "wrong_type": ((), Code.CALL_RAISED, 'result["a"][0]: a set'),
}


@pytest.fixture(scope="module")
def rig() -> Iterator[FunctionRig]:
    with FunctionRig(call_memory_bytes=2**28) as rig:
        yield rig


def others_are_served(rig: FunctionRig) -> None:
    done, value = rig.call("echo", ["x", 1])
    assert (done.code, done.reason, value) == (0, "", ["x", 1])


def soon(condition: object, within_s: float = 10) -> bool:
    """Whether `condition()` becomes true."""
    assert callable(condition)
    give_up_ns = now_ns() + round(within_s * NS_PER_S)
    while now_ns() < give_up_ns:
        if condition():
            return True
        sleep_ns(5_000_000)
    return bool(condition())


@pytest.mark.parametrize("name", ENDS)
def test_what_a_call_does_costs_this_call_alone(rig: FunctionRig, name: str) -> None:
    args, code, words = ENDS[name]
    suspended = rig.begin("parent", 1)
    assert isinstance(rig.wait(suspended.op_id), CallAwaits)
    for _ in range(2):  # the function is served again after it
        done, _ = rig.call(name, *args)
        assert (done.code, words in done.reason) == (code, True), done.reason
        others_are_served(rig)
    rig.answer(suspended, 0, 5)
    done = rig.resumed(suspended)
    assert rig.result(suspended, done) == 5
    assert not rig.lost


def test_a_call_that_ends_its_template_costs_the_function_which_can_be_loaded_again(
    rig: FunctionRig,
) -> None:
    done, _ = rig.call("kills_parent")
    assert done.code == DIED
    while not rig.lost:
        rig.poll()
    lost = rig.lost[0]
    rig.events.remove(lost)
    others_are_served(rig)
    rig.load("kills_parent")
    done, _ = rig.call("kills_parent")
    assert done.code == DIED
    while not rig.lost:
        rig.poll()
    rig.events.remove(rig.lost[0])


def test_what_is_printed_is_shown_in_part_and_never_kept(rig: FunctionRig) -> None:
    rig.said.clear()
    done, value = rig.call("prints", 10**9, within_s=120)
    assert (done.code, value) == (0, 10**9)
    assert soon(lambda: rig.polled() and bool(rig.said))
    others_are_served(rig)
    assert len(rig.said) < 5000
    assert max(map(len, rig.said)) < 1000


@pytest.mark.parametrize("session", [False, True])
def test_a_process_that_a_call_leaves_is_ended(rig: FunctionRig, session: bool) -> None:
    done, left = rig.call("leaves_child", session)
    assert not done.code, done.reason
    assert soon(lambda: rig.polled() and not alive(left))


def test_a_call_that_forks_answers_once(rig: FunctionRig) -> None:
    done, first = rig.call("forks")
    assert not done.code, done.reason
    _, second = rig.call("forks")
    assert first != second  # its process left another one behind, so that it was not used again
    others_are_served(rig)


def test_a_process_with_a_thread_left_over_is_not_used_again(rig: FunctionRig) -> None:
    assert rig.call("leaves_thread")[1] != rig.call("leaves_thread")[1]


def test_a_function_that_leaks_costs_no_later_call_its_memory(rig: FunctionRig) -> None:
    calls = [rig.call("leaks", 2**25) for _ in range(30)]  # 1 GiB in all, of 256 MiB for a process
    assert [(done.code, done.reason) for done, _ in calls] == [(0, "")] * 30
    assert 1 < len({pid for _, pid in calls}) < 30  # several used one process


def test_reset_says_what_the_next_call_sees(rig: FunctionRig) -> None:
    kept = [rig.call("counts")[1] for _ in range(8)]
    assert len({pid for pid, _ in kept}) == 1  # init ran once
    assert max(count for _, count in kept) > 1
    anew = [rig.call("counts_anew")[1] for _ in range(8)]
    assert len({pid for pid, _ in anew}) == 1
    assert {count for _, count in anew} == {1}


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, 64 * 1024 + 1, 9 * 2**20])
def test_payloads_of_any_size_travel(rig: FunctionRig, size: int) -> None:
    array = np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8)
    done, value = rig.call("double", array)
    assert not done.code, done.reason
    assert np.array_equal(value, array * 2)


def test_an_empty_frame_is_a_call_without_arguments(rig: FunctionRig) -> None:
    op = rig.begin("pid", frame=b"")
    done = rig.done(op)
    assert not done.code
    assert rig.result(op, done) in rig.backend.calls.pids("pid")


def test_a_frame_that_is_no_payload_is_said_to_be_one(rig: FunctionRig) -> None:
    op = rig.begin("echo", frame=b"\x00" * 100)
    done = rig.done(op)
    assert done.code == Code.INVALID_INPUT
    assert "payload" in done.reason
    others_are_served(rig)


def test_children_are_asked_for_awaited_and_answered(rig: FunctionRig) -> None:
    op = rig.begin("parent", 4)
    awaits = rig.wait(op.op_id)
    assert isinstance(awaits, CallAwaits)
    assert awaits.children == (0, 1, 2, 3)
    assert [(e.child, e.function, args) for e, args in rig.chained(op)] == [
        (i, "echo", (i,)) for i in range(4)
    ]
    for child in (2, 0, 3, 1):
        rig.answer(op, child, 10 * child)
    done = rig.resumed(op)
    assert rig.result(op, done) == 60


def test_a_child_that_is_named_by_a_text_has_its_size_class_also_from_another_module() -> None:
    modules = ("called_functions", "sized_functions")
    with FunctionRig(functions=modules) as rig:
        for n, size_class in ((3, 0), (31, 3), (10_000, 15)):
            op = rig.begin("catches", "sized", n)
            rig.wait(op.op_id)
            [(chained, args)] = rig.chained(op)
            assert (chained.function, args, chained.size_class) == ("sized", (n,), size_class)
            rig.answer(op, 0, n)
            rig.resumed(op)
        op = rig.begin("catches", "sized", "no number")
        assert "TypeError" in rig.done(op).reason  # its class cannot be computed


def test_the_error_of_a_child_is_raised_in_its_parent(rig: FunctionRig) -> None:
    op = rig.begin("catches", "echo", 1)
    rig.wait(op.op_id)
    rig.answer(op, 0, code=Code.CALL_RAISED, reason="Traceback: no")
    done = rig.resumed(op)
    assert rig.result(op, done) == (Code.CALL_RAISED, "Traceback: no")


def test_a_large_answer_of_a_child_comes_before_the_call_goes_on(rig: FunctionRig) -> None:
    op = rig.begin("catches", "echo", b"x")
    rig.wait(op.op_id)
    rig.answer(op, 0, bytes(20 * 2**20))
    done = rig.resumed(op)
    assert rig.result(op, done) == (0, "")


def test_64_calls_are_suspended_each_in_its_process(rig: FunctionRig) -> None:
    ops = [rig.begin("parent", 1) for _ in range(64)]
    for op in ops:
        assert isinstance(rig.wait(op.op_id), CallAwaits)
    others_are_served(rig)
    for place, op in enumerate(ops):
        rig.answer(op, 0, place)
    for place, op in enumerate(ops):
        done = rig.resumed(op)
        assert rig.result(op, done) == place


def test_a_suspended_call_whose_process_ends_is_answered(rig: FunctionRig) -> None:
    op = rig.begin("parent", 1)
    rig.wait(op.op_id)
    os.kill(rig.backend.calls.pid_of(op.action_id), signal.SIGKILL)
    [lost] = rig.reported(CallLost)
    assert (lost.action_id, lost.code) == (op.action_id, DIED)
    assert "signal 9" in lost.reason
    done = rig.resumed(op)
    assert done.code == DIED
    others_are_served(rig)


def test_what_a_suspended_call_started_is_bounded_too(rig: FunctionRig) -> None:
    op = rig.begin("starts_and_awaits", MOST_PROCESSES + 6)
    ended: Ended | CallLost = rig.wait(op.op_id)  # at the limit already, if the machine is slow
    if isinstance(ended, CallAwaits):
        [ended] = rig.reported(CallLost)
    assert not isinstance(ended, CallAwaits)
    assert ended.code == Code.CALL_OVER_LIMIT
    assert "may have started" in ended.reason


@pytest.mark.parametrize("name", ["parent", "sleeps"])
def test_a_call_is_ended_where_it_stands(rig: FunctionRig, name: str) -> None:
    op = rig.begin(name, 0.9)
    if name == "parent":
        rig.events.clear()
    pid = rig.backend.calls.pid_of(op.action_id)
    rig.backend.calls.end(op.action_id, "it was taken back")
    done = rig.done(op)
    assert (done.code, done.reason) == (Code.PROCESS_ENDED, "it was taken back")
    assert soon(lambda: rig.polled() and not alive(pid))
    others_are_served(rig)


def test_what_cannot_be_prepared_says_why(rig: FunctionRig) -> None:
    prepared = rig.prepare("cannot_start")
    assert prepared.code == Code.INVALID_MODEL_PATH
    assert "RuntimeError: init says no" in prepared.reason
    assert "root.py" not in prepared.reason


def test_a_preparation_measures_the_cold_start(rig: FunctionRig) -> None:
    prepared = rig.prepare("counts")
    assert prepared.profile is not None
    assert prepared.profile.weights_ns == prepared.span.duration_ns > 0
    assert prepared.function is not None
    assert not prepared.function.gpu
    again = rig.prepare("counts")
    assert again.profile == prepared.profile


def test_an_evicted_function_runs_no_more_until_it_is_loaded(rig: FunctionRig) -> None:
    rig.call("nothing")
    pids = rig.backend.calls.pids("nothing")
    rig.unload("nothing")
    assert soon(lambda: rig.polled() and not any(map(alive, pids)))
    op = rig.begin("nothing", load=False)
    done = rig.done(op)
    assert done.code == Code.EXEC_WEIGHTS_MISSING
    assert not rig.load("nothing").code
    assert rig.call("nothing")[0].code == 0


# --------------------------------------------------------------------------- a worker's life


def test_nothing_is_left_when_the_backend_closes() -> None:
    gc.collect()
    before, mine = open_files(), children_of(os.getpid())
    with FunctionRig() as rig:
        for _ in range(3):
            rig.call("echo", bytes(10**6))
        op = rig.begin("parent", 2)
        rig.wait(op.op_id)
        rig.begin("sleeps", 30)
        made = children_of(os.getpid()) - mine
        assert len(made) > 4
    gc.collect()
    assert not [pid for pid in made if alive(pid)]
    assert open_files() == before


def test_a_root_that_is_killed_costs_what_ran_and_another_one_is_started() -> None:
    with FunctionRig() as rig:
        rig.call("nothing")
        op = rig.begin("sleeps", 0.9)
        made = children_of(rig.backend.root_pid) | {rig.backend.root_pid}
        os.kill(rig.backend.root_pid, signal.SIGKILL)
        done = rig.done(op)
        assert done.code == DIED
        while len(rig.lost) < 2:
            rig.poll()
        assert soon(lambda: not any(map(alive, made)))
        assert not rig.load("nothing").code
        assert rig.call("nothing")[0].code == 0


def test_a_template_that_hangs_is_found_and_costs_the_function_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaded, "_TRIM_NS", NS_PER_S // 10)
    monkeypatch.setattr(loaded, "_ANSWER_WITHIN_NS", NS_PER_S // 2)
    with FunctionRig() as rig:
        rig.call("nothing")
        assert soon(lambda: len(rig.templates()) == 1)  # what found the functions has ended
        [template] = rig.templates()
        rig.call("echo", 1)
        os.kill(template, signal.SIGSTOP)
        for pid in rig.backend.calls.pids("nothing"):
            os.kill(pid, signal.SIGKILL)
        # More calls than processes were waiting: the first get one of those, and for others one is asked for.
        calls = [rig.begin("nothing") for _ in range(40)]
        [lost] = rig.reported(WeightsLost)
        assert lost.model_ids == (0,)
        codes = [rig.done(call).code for call in calls]
        assert codes[0] == DIED and set(codes) <= {DIED, Code.EXEC_WEIGHTS_MISSING}
        assert any("does not answer" in each for each in rig.said)
        assert soon(lambda: rig.polled() and not alive(template))
        others_are_served(rig)
        assert not rig.load("nothing").code
        assert rig.call("nothing")[0].code == 0


def test_a_module_that_cannot_be_imported_is_an_error_of_the_config() -> None:
    with pytest.raises(ExtensionError, match="no_such_module"):
        FunctionRig("no_such_module")


def test_a_module_without_functions_is_an_error_of_the_config() -> None:
    with pytest.raises(InvalidConfig, match="has no functions"):
        FunctionRig("function_rig")


def test_functions_for_a_gpu_run_in_processes_of_their_own_and_are_never_forked() -> None:
    with FunctionRig(device="emulated") as rig:
        first = rig.call("counts_on_gpu", gpu_id=0)[1]
        second = rig.call("counts_on_gpu", gpu_id=0)[1]
        assert (first[1], second[1]) == (1, 2)
        assert first[0] == second[0] in rig.backend.calls.pids("counts_on_gpu")  # init ran there
        anew = [rig.call("counts_anew_on_gpu", gpu_id=0)[1] for _ in range(3)]
        assert {count for _, count in anew} == {1}
        assert len({pid for pid, _ in anew}) == 1
