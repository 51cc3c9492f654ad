"""What a client asks for, rightly and wrongly: each request is answered exactly once, with words."""

from __future__ import annotations

import math

import pytest

from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import CLIENT_LOST_AFTER_NS, SchedulerConfig
from slosched.core.scheduler.interface import ClientLost, Drain, FromClient
from slosched.core.scheduler.sessions import TICK_NS
from slosched.messages import (
    CancelRequest,
    ClientHeartbeat,
    Goodbye,
    Infer,
    InferReply,
    ListModelsReply,
    ListModelsRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    Refused,
    StatusReply,
    StatusRequest,
    Welcome,
)
from slosched.units import tensor_bytes


def test_hello_is_welcomed_and_another_protocol_is_refused_with_both_versions() -> None:
    rig = Rig()
    rig.hello()
    rig.hello(b"old", protocol=99)
    rig.step()
    assert rig.to_client(Welcome)[0].policy == "INFER5"
    assert "99" in rig.to_client(Refused)[0].reason
    assert b"old" not in rig.scheduler.clients


def test_a_stranger_is_told_to_say_hello_first() -> None:
    rig = Rig()
    rig.infer(0, request_id=77)
    rig.step()
    refused = rig.to_client(Refused)[0]
    assert (refused.request_id, refused.code) == (77, Code.INVALID_REQUEST)
    assert "hello" in refused.reason


def test_an_inference_runs_and_its_answer_explains_itself() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=20)
    rig.step()
    (infer,) = rig.outstanding()
    assert (infer.batch_size, infer.request_count, infer.gpu_id) == (1, 1, 0)
    rig.step(3.0)
    rig.finish(infer, begin_ms=0.6)
    rig.step()
    reply = rig.reply(request)
    assert (reply.code, reply.deadline_met, reply.batch_size) == (0, True, 1)
    assert (reply.worker_id, reply.gpu_id, reply.cold) == (0, 0, False)
    assert (reply.predicted_start_ns, reply.predicted_exec_ns) == (MS // 2, 2 * MS)
    assert (reply.start_ns, reply.exec_ns) == (round(0.6 * MS), 2 * MS)
    assert reply.latency_ns == 3 * MS and reply.slo_ns == 20 * MS
    assert rig.scheduler.idle


def test_the_slo_is_absolute_or_a_factor_of_the_frozen_b1_or_the_default() -> None:
    rig, (model,) = Rig.ready()
    assert model.b1_ns == 2 * MS
    ids = [rig.infer(model, slo_ms=7), rig.infer(model, factor=10.0), rig.infer(model)]
    waiting = rig.scheduler.clients[b"c"].requests
    assert [waiting[i].slo_ns for i in ids] == [7 * MS, 20 * MS, 100 * MS]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": 99}, "no model has the id 99"),
        ({"factor": math.nan}, "SLO factor"),
        ({"factor": -1.0}, "SLO factor"),
        ({"factor": math.inf}, "SLO factor"),
        ({"slo_ns": -5}, "SLO must be"),
        ({"shape": (5,), "dtype": "float32", "input_bytes": 20}, "(4,)"),
        ({"shape": (4,), "dtype": "float64", "input_bytes": 32}, "float64"),
        ({"shape": (4,), "dtype": "float32", "input_bytes": 15}, "15 bytes"),
        ({"input_bytes": 16}, "unnamed dtype"),
    ],
)
def test_an_impossible_request_is_answered_with_6_and_what_was_wrong(
    arguments: dict[str, object], words: str
) -> None:
    rig, _ = Rig.ready()
    request = rig.infer(**arguments)  # type: ignore[arg-type]
    rig.step()
    reply = rig.reply(request)
    assert reply.code == Code.INVALID_REQUEST and words in reply.reason
    assert rig.scheduler.idle and not rig.outstanding()


@pytest.mark.parametrize(("late_ns", "met"), [(-1, True), (0, True), (1, False)])
def test_in_time_means_answered_at_the_deadline_or_before(late_ns: int, met: bool) -> None:
    """To the nanosecond, by the controller's clock from arrival to answer; the row says the same."""
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=50)
    rig.step()
    (infer,) = rig.outstanding()
    rig.now_ns = T0 + 50 * MS + late_ns
    rig.finish(infer, begin_ms=0.5)
    rig.step()
    reply = rig.reply(request)
    assert (reply.code, reply.deadline_met, reply.latency_ns) == (0, met, 50 * MS + late_ns)
    assert [record.deadline_met for record in rig.records()] == [met]


def test_a_request_that_comes_twice_is_answered_once() -> None:
    """A reply under its id would be taken for the answer of the first, which runs."""
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=50, request_id=500)
    rig.infer(model, slo_ms=50, request_id=500)
    rig.step()
    assert not rig.to_client(InferReply)
    (infer,) = rig.outstanding()
    assert infer.request_count == 1
    rig.finish(infer, begin_ms=0.5)
    rig.step()
    assert [r.code for r in rig.to_client(InferReply)] == [Code.OK]
    rig.infer(model, slo_ms=50, request_id=500)  # it is free again
    rig.step(20)
    assert len(rig.outstanding()) == 1


LIMITS = SchedulerConfig(max_slo_ns=60 * 10**9, max_client_requests=3, max_requests=5)


def test_what_is_accepted_of_a_client_and_of_all_has_limits_with_a_code_and_a_reason() -> None:
    rig, (model,) = Rig.ready(LIMITS)
    rig.hello(b"other")
    long = rig.infer(model, slo_ns=61 * 10**9)
    rig.step()
    assert (rig.reply(long).code, rig.reply(long).model_id) == (Code.LIMIT_REACHED, model.model_id)
    assert "61s" in rig.reply(long).reason and "--max-slo of 60s" in rig.reply(long).reason
    taken = [rig.infer(model, slo_ms=900) for _ in range(3)]
    fourth = rig.infer(model, slo_ms=900)
    rig.step()
    assert rig.reply(fourth).code == Code.LIMIT_REACHED
    assert "3 requests of this client" in rig.reply(fourth).reason
    taken += [rig.infer(model, slo_ms=900, client=b"other") for _ in range(2)]
    sixth = rig.infer(model, slo_ms=900, client=b"other")
    rig.step()
    assert "5 requests of all clients" in rig.reply(sixth).reason
    assert "--max-requests" in rig.reply(sixth).reason
    rig.step()
    for infer in rig.outstanding():
        rig.finish(infer, begin_ms=0.5)
    again = rig.infer(model, slo_ms=900)
    rig.step()
    assert not rig.answered(again), "answered ones make room"


def test_the_bytes_that_wait_have_limits() -> None:
    rig, (model,) = Rig.ready(SchedulerConfig(max_client_bytes=96, max_bytes=144))
    rig.hello(b"other")
    shape, dtype = model.input_shape, model.input_dtype
    size = tensor_bytes(shape, dtype)
    room = 96 // size

    def ask(client: bytes) -> int:
        request = rig.infer(
            model, slo_ms=900, shape=shape, dtype=dtype, input_bytes=size, client=client
        )
        rig.step()
        return request

    mine = [ask(b"c") for _ in range(room + 1)]
    assert not rig.answered(mine[room - 1])
    assert rig.reply(mine[room]).code == Code.LIMIT_REACHED
    assert "--max-client-bytes" in rig.reply(mine[room]).reason
    theirs = [ask(b"other") for _ in range(144 // size - room + 1)]
    assert "--max-bytes" in rig.reply(theirs[-1]).reason
    rig.handle(FromClient(b"c", Goodbye()))
    assert not rig.answered(ask(b"other")), "a client that leaves makes room"


def test_cancelling_a_queued_request_answers_it_and_it_never_runs() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=50)
    rig.handle(FromClient(b"c", CancelRequest(request)))
    rig.step()
    assert rig.reply(request).code == Code.CANCELLED
    assert not rig.to_worker(Infer) and rig.scheduler.idle


def test_cancelling_a_request_in_flight_answers_it_once() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=50)
    rig.step()
    (infer,) = rig.outstanding()
    rig.handle(FromClient(b"c", CancelRequest(request)))
    rig.handle(FromClient(b"c", CancelRequest(request)))
    rig.step(3.0)
    rig.finish(infer, begin_ms=0.5)
    rig.step()
    assert rig.reply(request).code == Code.CANCELLED
    assert [r.code for r in rig.records()] == [Code.CANCELLED]


def test_a_client_is_lost_after_five_seconds_of_ticks_without_a_word_and_not_before() -> None:
    """As with workers, ticks that happened are counted: the one after its last word counts for that."""
    rig, _ = Rig.ready()
    rig.step(0)
    rig.handle(FromClient(b"c", ClientHeartbeat(rig.now_ns)))
    ticks = CLIENT_LOST_AFTER_NS // TICK_NS
    for tick in range(1, ticks + 1):
        rig.step(tick * TICK_NS / MS)
        assert b"c" in rig.scheduler.clients, tick
    rig.step((ticks + 1) * TICK_NS / MS)
    assert b"c" not in rig.scheduler.clients


@pytest.mark.parametrize("how", ["goodbye", "lost", "silent"])
def test_a_client_that_goes_ends_its_requests_and_frees_its_models(how: str) -> None:
    rig, models = Rig.ready(copies=3)
    rig.hello(b"other")
    rig.infer(models[0], slo_ms=60_000)
    rig.infer(models[0], slo_ms=60_000)
    if how == "goodbye":
        rig.handle(FromClient(b"c", Goodbye()))
    elif how == "lost":
        rig.handle(ClientLost(b"c"))
    else:
        for tick in range(60):
            rig.step(200.0 * tick)
    rig.step()
    assert b"c" not in rig.scheduler.clients
    assert rig.scheduler.idle
    assert {r.code for r in rig.records()} == {Code.CANCELLED}
    assert all(not m.clients for m in rig.scheduler.cluster.models.values())
    # The copies are there for the next client.
    if how != "silent":  # there the other one fell silent too
        before = len(rig.to_worker(LoadModel))
        rig.handle(FromClient(b"other", LoadModelRequest(900, "net", 3)))
        rig.step()
        (reply,) = rig.to_client(LoadModelReply)
        assert [m.model_id for m in reply.models] == [m.model_id for m in models]
        assert len(rig.to_worker(LoadModel)) == before


def test_loading_says_what_is_wrong_with_a_name_and_with_a_count() -> None:
    rig, _ = Rig.ready()
    rig.handle(FromClient(b"c", LoadModelRequest(1001, "nonsuch", 1)))
    rig.handle(FromClient(b"c", LoadModelRequest(1002, "net", 0)))
    rig.step()
    unknown, none = rig.to_client(LoadModelReply)
    assert (
        unknown.code == Code.UNKNOWN_MODEL
        and "nonsuch" in unknown.reason
        and "net" in unknown.reason
    )
    assert none.code == Code.INVALID_REQUEST and "copies" in none.reason


def test_a_load_without_any_worker_is_held_and_then_answered() -> None:
    rig = Rig()
    rig.hello()
    rig.handle(FromClient(b"c", LoadModelRequest(1, "net", 1)))
    rig.step(0)
    assert not rig.to_client(LoadModelReply)
    for tick in range(1, 14):
        rig.hello()
        rig.step(1000.0 * tick)
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.code == Code.INITIALIZING and "no worker" in reply.reason


def test_models_and_status_tell_what_is_there() -> None:
    rig, (_model,) = Rig.ready(gpus=2)
    rig.handle(FromClient(b"c", ListModelsRequest(5)))
    rig.handle(FromClient(b"c", StatusRequest(6)))
    rig.step()
    listed = rig.to_client(ListModelsReply)[0]
    assert listed.loadable == ("net",) and listed.models[0].gpus_resident == 2
    report = rig.to_client(StatusReply)[0].report
    assert report["policy"] == "INFER5" and report["ready"] is True
    assert len(report["workers"][0]["gpus"]) == 2  # type: ignore[index]


def test_draining_refuses_the_new_and_finishes_the_old() -> None:
    rig, (model,) = Rig.ready()
    old = rig.infer(model, slo_ms=50)
    rig.step()
    rig.handle(Drain())
    new = rig.infer(model, slo_ms=50)
    rig.step(3.0)
    rig.finish(rig.outstanding()[0], begin_ms=0.5)
    rig.step()
    assert rig.reply(old).code == Code.OK
    assert rig.reply(new).code == Code.SHUTTING_DOWN
    assert rig.scheduler.idle


def test_what_is_left_at_the_end_is_answered_as_shutting_down() -> None:
    rig, (model,) = Rig.ready()
    ids = [rig.infer(model, slo_ms=90) for _ in range(20)]
    rig.step()
    rig.effects.extend(rig.scheduler.abandon(now_ns=rig.now_ns))
    assert {rig.reply(i).code for i in ids} == {Code.SHUTTING_DOWN}
    assert rig.scheduler.idle
