"""Calls of functions in the scheduler: where they run, when, and how each ends."""

from __future__ import annotations

import pytest

from chains_rig import CallRig
from scheduler_rig import MS, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import (
    ActionDone,
    FromClient,
    Note,
    SendFailed,
    ToWorker,
)
from slosched.messages import (
    Call,
    EvictWeights,
    FunctionInfo,
    GpuInfo,
    Infer,
    ListModelsReply,
    ListModelsRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadWeights,
    WorkerGoodbye,
)

# ------------------------------------------------------------------- functions and devices


def test_functions_are_made_ready_when_their_worker_joins() -> None:
    """No client asks for them: a call may chain to any of them."""
    rig = CallRig({"f": FunctionInfo(), "g": FunctionInfo()}, slots=2)
    rig.enter()
    assert [each.name for each in rig.to_worker(LoadModel)] == ["f", "g"]
    assert sorted(each.model_id for each in rig.to_worker(LoadWeights)) == [0, 1]
    joined = [e.text for e in rig.effects if isinstance(e, Note) and "joined" in e.text]
    assert joined[0].endswith("joined: 2 slot(s) for functions, emulated")


def test_a_client_loads_a_function_as_a_model_and_learns_what_it_is() -> None:
    rig = CallRig.serving(info={"slo_ns": 7 * MS, "size_classes": 3})
    rig.handle(FromClient(b"c", LoadModelRequest(1, "f")))
    rig.steps()
    (reply,) = rig.to_client(LoadModelReply)
    (info,) = reply.models
    assert reply.code == 0
    assert info.function == FunctionInfo(slo_ns=7 * MS, size_classes=3)
    rig.handle(FromClient(b"c", ListModelsRequest(2)))
    rig.steps()
    assert rig.to_client(ListModelsReply)[0].loadable == ("f", "net")
    assert rig.to_client(ListModelsReply)[0].functions == ("f",)


def test_a_second_worker_gets_the_functions_that_there_are() -> None:
    rig = CallRig({"f": FunctionInfo()}, workers=2)
    rig.enter(0)
    rig.enter(1)
    assert [each.model_id for each in rig.to_worker(LoadModel, 1)] == [0]
    rig.call()
    rig.call()
    rig.step()
    assert sorted(rig.worker_of(each) for each in rig.outstanding_calls()) == [0, 1]


def test_a_function_that_no_longer_loads_is_noted_and_can_be_asked_for_again() -> None:
    rig = CallRig({"f": FunctionInfo()})
    rig.functions = {"f": FunctionInfo(size_classes=17)}
    rig.enter(resident=False)
    notes = [e.text for e in rig.effects if isinstance(e, Note) and e.level == "warning"]
    assert "1 to 16 size classes, not 17" in notes[0]
    assert "function 'f' cannot be called" in notes[1]
    rig.functions = {"f": FunctionInfo()}
    rig.handle(FromClient(b"c", LoadModelRequest(1, "f")))
    rig.steps()
    assert len(rig.to_worker(LoadModel)) == 2


def test_a_clients_load_of_a_function_waits_for_no_other_that_may_hang() -> None:
    """A child of another function waits for that one where it is asked for (test_chains_unready.py)."""
    rig = CallRig({"f": FunctionInfo(), "slow": FunctionInfo()}, slots=2)
    rig.enter(prepares=("f",))
    rig.handle(FromClient(b"c", LoadModelRequest(1, "f")))
    rig.weights_loaded()
    rig.steps()
    assert [each.code for each in rig.to_client(LoadModelReply)] == [0]


def test_functions_that_a_worker_brings_along_are_used_as_they_are() -> None:
    """After a restart of the controller: nothing is prepared again, and what is ready stays so."""
    rig = CallRig({"f": FunctionInfo(size_classes=2)}, cluster_id="hall", takes_over=True)
    rig.enter(brings=7)
    assert not rig.to_worker(LoadModel) and not rig.to_worker(LoadWeights)
    assert rig.id_of("f") == 7
    rig.call(length=1)
    rig.step()
    assert (rig.one().model_id, rig.one().size_class) == (7, 1)


@pytest.mark.parametrize("policy", ["FIFO", "EDF", "INFER4", "CLOCKWORK", "DIRECT"])
def test_other_policies_leave_hosts_and_functions_alone_and_say_so(policy: str) -> None:
    if policy == "CLOCKWORK":
        config = SchedulerConfig(fidelity="paper")
        policy = "INFER5"
    else:
        config = SchedulerConfig(policy=policy)
    rig = CallRig({"f": FunctionInfo()}, config=config, gpus=1)
    rig.enter(resident=False)
    assert [gpu.host for gpu in rig.scheduler.cluster.gpus.values()] == [False]
    assert "f" not in [each.name for each in rig.to_worker(LoadModel)]
    rig.handle(FromClient(b"c", LoadModelRequest(1, "f")))
    rig.steps()
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.code == Code.INVALID_REQUEST
    assert f"'f' is a function, and {policy} serves models alone" in reply.reason
    rig.handle(FromClient(b"c", ListModelsRequest(2)))
    rig.steps()
    assert rig.to_client(ListModelsReply)[0].loadable == ("net",)


def test_functions_go_to_hosts_or_gpus_and_models_to_gpus_alone() -> None:
    functions = {"host": FunctionInfo(), "gpu": FunctionInfo(gpu=True)}
    rig = CallRig(functions, gpus=2, slots=4)
    rig.enter()
    for name in ("host", "gpu"):
        rig.call(name)
    rig.step()
    calls = {call.model_id: call.gpu_id for call in rig.outstanding_calls()}
    assert calls[rig.id_of("host")] == 2
    assert calls[rig.id_of("gpu")] in (0, 1)
    loaded = {(each.model_id, each.gpu_id) for each in rig.to_worker(LoadWeights)}
    host, gpu = rig.id_of("host"), rig.id_of("gpu")
    assert loaded == {(host, 2), (gpu, 0), (gpu, 1)}


def test_hosts_do_not_count_as_gpus() -> None:
    rig = CallRig({"f": FunctionInfo()}, gpus=3, config=SchedulerConfig(max_gpus=2))
    rig.enter()
    devices = [gpu.host for gpu in rig.scheduler.cluster.gpus.values()]
    assert devices == [False, False, True]
    assert len(rig.scheduler.cluster.workers[0].spare) == 1


@pytest.mark.parametrize(
    ("gpus", "functions", "wrong"),
    [
        ((GpuInfo(0, "gpu", 9, 9, slots=2),), (), "a GPU has 1"),
        ((GpuInfo(0, "host", 9, 9, slots=0, host=True),), (), "a host 1 to 1024"),
        ((GpuInfo(0, "host", 9, 9, slots=2000, host=True),), (), "a host 1 to 1024"),
        ((GpuInfo(0, "host", 9, 9, host=True),), ("f",), "not among what can be loaded"),
    ],
)
def test_what_a_worker_says_of_hosts_is_checked(
    gpus: tuple[GpuInfo, ...], functions: tuple[str, ...], wrong: str
) -> None:
    from made_messages import a_welcome

    rig = CallRig({})
    rig.from_worker(a_welcome(50, gpus, functions=functions))
    rig.step()
    assert not rig.scheduler.cluster.gpus
    assert any(wrong in e.text for e in rig.effects if isinstance(e, Note))


# ---------------------------------------------------------------------------- one call


def test_a_call_takes_its_arguments_along_and_is_answered_with_its_result() -> None:
    rig = CallRig.serving()
    request_id = rig.call(slo_ms=50, size=12)
    rig.step(0)
    call = rig.one()
    assert (call.input_size, call.size_class, call.parent_id) == (12, 0, -1)
    assert call.deadline_ns == rig.at(50)
    assert call.latest_ns == rig.at(50 - 1 - 0.25)  # less its time, and that of its answer
    (sent,) = [e for e in rig.effects if isinstance(e, ToWorker) and e.message is call]
    assert (sent.requests, [value.size for value in sent.inputs if value]) == ((0,), [12])
    rig.now_ns += 2 * MS
    rig.result(call, ran_ms=1.2, size=99)
    rig.step()
    reply, output = rig.reply(request_id), rig.output_of(request_id)
    assert (reply.code, reply.exec_ns, reply.worker_id) == (0, 1_200_000, 0)
    assert output is not None and output.size == 99
    (record,) = rig.calls_done()
    assert (record.function, record.in_bytes, record.out_bytes) == ("f", 12, 99)
    assert (record.exec_ns, record.suspended_ns, record.children) == (1_200_000, 0, 0)
    assert record.start_ns == rig.at(2 - 0.25 - 1.2) and record.end_ns == rig.at(2)
    (part,) = rig.parts_done()
    assert (part.begin_ns, part.end_ns, part.awaits) == (record.start_ns, rig.at(1.75), ())


def test_arguments_and_results_of_no_bytes_have_no_frame() -> None:
    rig = CallRig.serving()
    request_id = rig.call(size=0)
    rig.step()
    assert rig.one().input_size == 0
    rig.now_ns += 2 * MS
    rig.result(rig.one(), size=0)
    rig.step()
    assert rig.reply(request_id).code == 0 and rig.output_of(request_id) is None


def test_a_call_without_an_slo_has_that_of_its_function() -> None:
    rig = CallRig.serving(info={"slo_ns": 30 * MS})
    rig.call(slo_ms=0)
    rig.step(0)
    assert rig.one().deadline_ns == rig.at(30)


def test_calls_of_each_size_class_are_forecast_by_themselves() -> None:
    rig = CallRig.serving(info={"size_classes": 3}, slots=4)
    for _ in range(30):
        rig.call(length=2)
        rig.step()
        rig.now_ns += 42 * MS
        rig.result(rig.one(), ran_ms=40)
        rig.step()
    small, large = rig.call(length=1, slo_ms=20), rig.call(length=2, slo_ms=20)
    rig.step()
    assert rig.reply(large).code == Code.COULD_NOT_START_IN_TIME
    assert "takes 40ms" in rig.reply(large).reason
    assert rig.one().size_class == 1 and not rig.answered(small)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"length": 2}, "size classes of function 'f' end at 1; there is no class 2"),
        ({"length": -1}, "there is no class -1"),
        ({"size": 101}, "the arguments take 101 bytes; function 'f' takes at most 100"),
        ({"slo_factor": float("nan")}, "the SLO factor must be"),
    ],
)
def test_what_cannot_be_called_is_refused_in_words(more: dict[str, float], words: str) -> None:
    rig = CallRig.serving(info={"size_classes": 2, "max_payload_bytes": 100})
    request_id = rig.call(**more)  # type: ignore[arg-type]
    rig.step()
    reply = rig.reply(request_id)
    assert reply.code == Code.INVALID_REQUEST and words in reply.reason
    assert not rig.outstanding_calls()


def test_without_a_worker_a_call_is_refused_at_once() -> None:
    rig = CallRig.serving("f", "gpu", info={"gpu": True})
    request_id = rig.call("gpu")
    rig.step()
    assert rig.reply(request_id).reason == "no connected GPU has this function ready"
    rig = CallRig.serving()
    rig.call()
    rig.step()
    rig.handle(SendFailed(0, rig.one()))
    request_id = rig.call()
    rig.step()
    assert rig.reply(request_id).code == Code.COULD_NOT_START_IN_TIME
    assert rig.reply(request_id).reason == "no host is connected to the controller"


def test_a_cold_start_is_forecast_as_the_load_that_it_is() -> None:
    rig = CallRig({"f": FunctionInfo()})
    rig.enter(resident=False)
    hopeless, in_time = rig.call(slo_ms=8), rig.call(slo_ms=30)
    rig.step()
    assert rig.reply(hopeless).code == Code.COULD_NOT_START_IN_TIME
    assert "after a cold start" in rig.reply(hopeless).reason
    assert not rig.outstanding_calls() and not rig.answered(in_time)
    rig.now_ns += 9 * MS
    rig.weights_loaded()
    rig.step()
    assert len(rig.outstanding_calls()) == 1


# ------------------------------------------------------------------------------ slots


def test_every_slot_gets_a_call_and_each_end_makes_room() -> None:
    rig = CallRig.serving(slots=3)
    requests = [rig.call() for _ in range(12)]
    rig.step(0)
    assert len(rig.outstanding_calls()) == 3  # a decision later knows more
    rig.step(1.0)
    assert len(rig.outstanding_calls()) == 6  # one for each slot is on its way
    for _ in range(4):
        rig.now_ns += 2 * MS
        for call in rig.outstanding_calls()[:3]:
            rig.result(call)
        rig.steps()
    for _ in range(3):
        rig.now_ns += 2 * MS
        for call in rig.outstanding_calls():
            rig.result(call)
        rig.steps()
    assert [rig.reply(each).code for each in requests] == [0] * 12


def test_calls_are_spread_over_hosts() -> None:
    rig = CallRig.serving(workers=2, slots=4)
    for _ in range(4):
        rig.call()
    rig.step()
    assert sorted(rig.worker_of(each) for each in rig.outstanding_calls()) == [0, 0, 1, 1]


def test_a_host_that_holds_an_overdue_call_still_serves_with_its_other_slots() -> None:
    rig = CallRig.serving(slots=2)
    rig.call()
    rig.step(0)
    endless = rig.one()
    for at in range(10, 100, 10):
        rig.now_ns = rig.at(at)
        rig.call()
        rig.steps()
        other = next(each for each in rig.outstanding_calls() if each is not endless)
        rig.now_ns += 2 * MS
        rig.result(other)
        rig.steps()
    assert len(rig.calls_done()) == 9


def test_a_call_over_its_slo_is_not_given_up_before_its_limit() -> None:
    """Its client learns the result late, or that it reached the limit, which the worker says."""
    rig = CallRig.serving(info={"limit_ns": 2000 * MS})
    late = rig.call(slo_ms=10)
    rig.step(0)
    call = rig.one()
    rig.wait(3000, call)
    assert not rig.answered(late) and rig.outstanding_calls() == [call]
    rig.result(call, ran_ms=2999)
    rig.step()
    assert (rig.reply(late).code, rig.reply(late).deadline_met) == (0, False)


def test_a_worker_that_reports_no_end_long_after_the_limit_is_lost() -> None:
    rig = CallRig.serving(info={"limit_ns": 1000 * MS})
    request_id = rig.call(slo_ms=100_000)
    rig.step(0)
    rig.wait(20_000, rig.one())
    assert rig.reply(request_id).code == Code.CANCELLED
    assert "was lost" in rig.reply(request_id).reason


# -------------------------------------------------------------------------------- ends


def test_an_error_is_answered_with_its_traceback_line_by_line() -> None:
    rig = CallRig.serving()
    request_id = rig.call()
    rig.step()
    rig.now_ns += 2 * MS
    text = 'Traceback:\n\tFile "a.py"\x1b[2J\nValueError: 3'
    rig.error(rig.one(), Code.CALL_RAISED, text, ran_ms=1.25)
    rig.step()
    reply = rig.reply(request_id)
    assert reply.code == Code.CALL_RAISED
    assert reply.reason == 'Traceback:\n    File "a.py"?[2J\nValueError: 3'
    (record,) = rig.calls_done()
    assert record.exec_ns == MS * 5 // 4 and record.start_ns == rig.at(0.5)


@pytest.mark.parametrize(
    "code", [Code.MODEL_PROCESS_ENDED, Code.PROCESS_ENDED, Code.CALL_OVER_LIMIT, Code.RUNTIME_ERROR]
)
def test_a_body_that_may_have_begun_does_not_run_again(code: Code) -> None:
    rig = CallRig.serving(slots=2)
    request_id, sibling = rig.call(), rig.call()
    rig.step()
    first, second = rig.outstanding_calls()
    rig.now_ns += 2 * MS
    rig.error(first, code, "it ended")
    rig.steps()
    assert (rig.reply(request_id).code, rig.reply(request_id).reason) == (code, "it ended")
    assert rig.outstanding_calls() == [second]
    rig.result(second)
    rig.step()
    assert rig.reply(sibling).code == 0


@pytest.mark.parametrize("code", [Code.MODEL_PROCESS_ENDED, Code.PROCESS_ENDED])
def test_an_idempotent_body_runs_once_more(code: Code) -> None:
    rig = CallRig.serving(info={"idempotent": True})
    request_id = rig.call()
    rig.step()
    first = rig.one()
    rig.now_ns += 2 * MS
    rig.error(first, code)
    rig.steps()
    second = rig.one()
    assert second.call_id == first.call_id
    rig.now_ns += 2 * MS
    rig.error(second, code, "again")
    rig.steps()
    reply = rig.reply(request_id)
    assert (reply.code, reply.attempts) == (code, 2) and "tried once more" in reply.reason
    assert not rig.outstanding_calls()


def test_a_call_that_waited_for_a_process_of_a_template_that_ended_has_not_begun() -> None:
    """Its worker had given it a slot: it tells of the time in that, and no body ran."""
    rig = CallRig.serving()
    request_id = rig.call(slo_ms=10_000)
    rig.step()
    rig.now_ns += 4 * MS
    rig.error(rig.one(), Code.EXEC_WEIGHTS_MISSING, "its template ended", ran_ms=2)
    rig.steps()
    assert not rig.answered(request_id) and not rig.parts_done()
    rig.weights_loaded()
    rig.steps()
    rig.now_ns += 2 * MS
    rig.result(rig.one())
    rig.step()
    assert rig.reply(request_id).code == Code.OK


@pytest.mark.parametrize(
    "code",
    [
        Code.TOO_MANY_CALLS,
        Code.EXEC_WEIGHTS_MISSING,
        Code.SHUTTING_DOWN,
        Code.CANCELLED,
    ],
)
def test_what_was_refused_before_it_began_is_planned_anew_three_times(code: Code) -> None:
    rig = CallRig.serving()
    request_id = rig.call(slo_ms=10_000)
    rig.step()
    for attempt in range(3):
        call = rig.one()
        rig.now_ns += 2 * MS
        rig.error(call, code, f"attempt {attempt}")
        rig.steps()
        if code == Code.EXEC_WEIGHTS_MISSING and attempt < 2:
            assert not rig.outstanding_calls()
            rig.weights_loaded()
            rig.steps()
    reply = rig.reply(request_id)
    assert (reply.code, reply.attempts) == (code, 3) and "attempt 2" in reply.reason


def test_a_call_behind_one_that_takes_too_long_comes_back_and_runs_elsewhere() -> None:
    rig = CallRig.serving(workers=2)
    rig.call()
    rig.call()
    rig.step(0)
    endless, short = rig.outstanding_calls()
    rig.call()
    rig.step(1.0)  # both are about to end
    behind = rig.outstanding_calls()[2]
    assert rig.worker_of(behind) == rig.worker_of(endless)
    assert behind.latest_ns == rig.at(1.5 + 20)
    rig.step(2)
    rig.result(short)
    rig.step(22)
    rig.error(behind, Code.EXEC_TOO_LATE)
    rig.step()
    again = rig.outstanding_calls()[-1]
    assert again.call_id == behind.call_id
    assert rig.worker_of(again) == rig.worker_of(short)


def test_a_call_that_can_run_in_one_place_alone_waits_there() -> None:
    rig = CallRig.serving()
    rig.call()
    rig.step(0)
    rig.call(slo_ms=500)
    rig.step(1.0)
    assert rig.outstanding_calls()[1].latest_ns == rig.at(500 - 1 - 0.25)


def test_a_call_that_comes_back_for_ever_is_answered() -> None:
    rig = CallRig.serving()
    request_id = rig.call(slo_ms=100_000)
    rig.step()
    for _ in range(200):
        if rig.answered(request_id):
            break
        rig.error(rig.one(), Code.EXEC_TOO_LATE)
        rig.later(2)
    reply = rig.reply(request_id)
    assert (reply.code, reply.attempts) == (Code.EXEC_TOO_LATE, 102)


def test_a_worker_that_leaves_hands_calls_back_that_it_has_not_begun() -> None:
    rig = CallRig.serving(workers=2)
    request_id = rig.call()
    rig.step()
    call = rig.one()
    leaving = rig.worker_of(call)
    rig.from_worker(WorkerGoodbye(call.session), leaving)
    rig.error(call, Code.CANCELLED)
    rig.steps()
    assert rig.worker_of(rig.one()) != leaving
    assert not rig.answered(request_id)


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_call_of_a_lost_worker_is_answered_unless_it_is_idempotent(idempotent: bool) -> None:
    rig = CallRig.serving(workers=2, info={"idempotent": idempotent})
    request_id = rig.call()
    rig.step()
    call = rig.one()
    lost = rig.worker_of(call)
    rig.handle(SendFailed(lost, call))
    rig.steps()
    if idempotent:
        assert rig.worker_of(rig.one()) != lost
    else:
        assert rig.reply(request_id).code == Code.CANCELLED
        assert "was lost while it had" in rig.reply(request_id).reason


def test_a_call_whose_client_cancels_it_is_ended_on_its_worker() -> None:
    rig = CallRig.serving()
    request_id = rig.call()
    rig.step()
    call = rig.one()
    rig.cancel(request_id)
    rig.steps()
    assert rig.reply(request_id).code == Code.CANCELLED
    assert rig.cancels() == [call.action_id]
    assert rig.outstanding_calls() == [call]  # until its worker says that it has ended
    rig.now_ns += 2 * MS
    rig.error(call, Code.CANCELLED)
    rig.steps()
    assert not rig.outstanding_calls() and len(rig.calls_done()) == 1


def test_a_cancelled_call_that_has_returned_meanwhile_is_answered_once() -> None:
    rig = CallRig.serving()
    request_id = rig.call()
    rig.step()
    rig.cancel(request_id)
    rig.now_ns += 2 * MS
    rig.result(rig.one())
    rig.steps()
    assert rig.reply(request_id).code == Code.CANCELLED


def test_a_call_that_its_worker_does_not_know_was_lost_on_the_way() -> None:
    """Also behind one that it does know, and that has no limit."""
    rig = CallRig.serving(slots=2)
    known, lost = rig.call(slo_ms=100_000), rig.call(slo_ms=100_000)
    rig.step(0)
    first, _ = rig.outstanding_calls()
    rig.wait(6000, first)
    assert rig.reply(known).code == rig.reply(lost).code == Code.CANCELLED
    notes = [e.text for e in rig.effects if isinstance(e, Note)]
    assert any("it knows nothing of call 1" in note for note in notes)


def test_calls_are_records_of_actions_too_and_their_device_is_busy() -> None:
    rig = CallRig.serving()
    rig.call()
    rig.step()
    rig.now_ns += 2 * MS
    rig.result(rig.one())
    rig.step()
    (done,) = [e.record for e in rig.effects if isinstance(e, ActionDone)]
    assert (done.action_type, done.code, done.goodput_ns) == (7, 0, MS)
    (host,) = rig.scheduler.cluster.gpus.values()
    assert host.busy_ns == MS


def test_models_run_beside_functions_as_they_do_alone() -> None:
    functions = {"gpu": FunctionInfo(gpu=True), "f": FunctionInfo()}
    rig = CallRig(functions, gpus=1, slots=2)
    rig.enter()
    rig.effects.clear()
    (model,) = rig.load_beside()
    rig.infer(model, slo_ms=100)
    rig.call("f", slo_ms=100)
    rig.step()
    assert [each.gpu_id for each in rig.to_worker(Infer)] == [0]
    assert [each.gpu_id for each in rig.to_worker(Call)] == [1]
    rig.call("gpu", slo_ms=100)
    rig.later(1)
    assert len(rig.to_worker(Call)) == 1  # the GPU is busy
    rig.finish(rig.to_worker(Infer)[0], begin_ms=0.5)
    rig.later(2)
    assert [each.gpu_id for each in rig.to_worker(Call)] == [1, 0]
    assert not rig.to_worker(EvictWeights)


def test_a_rig_without_functions_knows_no_hosts() -> None:
    rig, _ = Rig.ready()
    assert rig.scheduler.cluster.hosts == 0
