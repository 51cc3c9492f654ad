"""Workers join, fall silent, die, come back and lie about old sessions."""

from __future__ import annotations

import re
from typing import Any

import pytest

from made_messages import a_heartbeat, a_welcome, an_error, an_infer, an_infer_result
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import (
    ActionDone,
    FromClient,
    Note,
    SendFailed,
    StatusAsked,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.sessions import TICK_NS
from slosched.daemon.status import status_report
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    ControllerHello,
    GpuInfo,
    GpuStats,
    HeartbeatAck,
    InferReply,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    LoadWeights,
    Span,
    StatusReply,
    StatusRequest,
    WorkerRefused,
)

TICK_MS = TICK_NS / MS


def beat(rig: Rig, worker_id: int = 0, session: int = 50, preparing: int = 0) -> None:
    rig.from_worker(a_heartbeat(session, rig.now_ns - MS // 10, preparing=preparing), worker_id)


def notes(rig: Rig) -> list[str]:
    return [e.text for e in rig.effects if isinstance(e, Note)]


def test_silent_workers_are_greeted_again_and_named_every_few_seconds() -> None:
    rig = Rig(workers=2)
    for tick in range(40):
        rig.step(tick * TICK_MS)
    hellos = rig.to_worker(ControllerHello, 0)
    assert 10 <= len(hellos) <= 14  # each half second of 6.4
    assert any("workers 0, 1 do not answer; 0 of 2 joined" in n for n in notes(rig))


def test_a_worker_is_lost_at_the_fourth_tick_without_a_word_and_not_before_or_after() -> None:
    rig, _ = Rig.ready()
    beat(rig)
    rig.step(TICK_MS)  # what was heard counts for this one
    for tick in (2, 3, 4):
        rig.step(tick * TICK_MS)
        assert rig.scheduler.ready(), tick
    rig.step(5 * TICK_MS)
    assert not rig.scheduler.ready()


def test_a_worker_that_falls_silent_is_lost_within_a_second_and_its_requests_are_answered() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=60_000)
    rig.step(0)
    at_ms = 0.0
    while rig.scheduler.ready():
        at_ms += TICK_MS
        rig.step(at_ms)
    assert at_ms <= 1000
    reply = rig.reply(request)
    assert reply.code == Code.CANCELLED and "lost" in reply.reason
    assert rig.scheduler.idle


def test_one_long_stall_of_the_machine_loses_nobody() -> None:
    rig, _ = Rig.ready()
    rig.step(0)
    rig.step(10_000.0)  # ten seconds in which nothing ran, heartbeats neither
    beat(rig)
    rig.step(10_000.0 + TICK_MS)
    assert rig.scheduler.ready()


def test_heartbeats_keep_a_worker_and_are_acknowledged_for_its_clock() -> None:
    rig, _ = Rig.ready()
    for i in range(30):
        rig.now_ns = T0 + 200 * MS * i
        beat(rig)
        rig.step()
    assert rig.scheduler.ready()
    ack = rig.to_worker(HeartbeatAck)[-1]
    assert ack.heartbeat_sent_ns == rig.now_ns - MS // 10 and ack.received_ns == rig.now_ns


def test_requests_of_a_lost_worker_move_to_another_and_end_once() -> None:
    rig, (model,) = Rig.ready(workers=2)
    first = rig.infer(model, slo_ms=5000)
    rig.step(0)
    assert len(rig.outstanding(0)) == 1
    rig.handle(SendFailed(0, rig.outstanding(0)[0]))
    rig.step(1)
    assert not rig.answered(first)
    (again,) = rig.outstanding(1)
    rig.step(4)
    rig.finish(again, begin_ms=1.5, worker_id=1)
    rig.step()
    reply = rig.reply(first)
    assert (reply.code, reply.worker_id, reply.attempts) == (Code.OK, 1, 2)
    lost = [e.record for e in rig.effects if isinstance(e, ActionDone) and e.record.code]
    assert [(r.worker_id, r.code) for r in lost] == [(0, Code.CANCELLED)]


def test_a_worker_that_returns_is_given_its_models_and_used_again() -> None:
    rig, (model,) = Rig.ready()
    rig.handle(
        SendFailed(
            0,
            an_infer(50, 1),
        )
    )
    rig.step(10)
    assert not rig.scheduler.ready()
    rig.effects.clear()
    rig.join(session=51)
    (load,) = rig.to_worker(LoadModel)
    assert (load.session, load.name, load.model_id) == (51, "net", model.model_id)
    rig.prepared()
    assert len(rig.to_worker(LoadWeights)) == 1
    rig.weights_loaded()
    request = rig.infer(model, slo_ms=50)
    rig.step()
    rig.now_ns += 3 * MS
    rig.finish(rig.outstanding()[0], begin_ms=(rig.now_ns - T0) / MS - 2.2)
    rig.step()
    assert rig.reply(request).code == Code.OK
    assert rig.scheduler.cluster.workers[0].times_lost == 1


def test_a_new_session_starts_with_empty_pages() -> None:
    rig, (model,) = Rig.ready()
    rig.handle(
        SendFailed(
            0,
            an_infer(50, 1),
        )
    )
    rig.step(10)
    rig.effects.clear()
    rig.join(session=51)
    (gpu,) = rig.scheduler.cluster.gpus.values()
    assert gpu.free_pages == gpu.pages
    rig.prepared()
    assert [a.model_id for a in rig.to_worker(LoadWeights)] == [model.model_id]


def test_a_failed_send_of_an_old_session_leaves_the_new_one_alone() -> None:
    rig, _ = Rig.ready()
    rig.join(session=60)
    rig.handle(
        SendFailed(
            0,
            an_infer(50, 1),
        )
    )
    assert rig.scheduler.ready()


def test_a_hello_that_could_not_be_said_is_said_at_the_next_tick() -> None:
    rig = Rig()
    rig.step(0)
    (hello,) = rig.to_worker(ControllerHello)
    rig.handle(SendFailed(0, hello))
    rig.step(TICK_MS)
    assert len(rig.to_worker(ControllerHello)) == 2


def test_a_worker_that_beats_but_does_not_report_is_lost_and_its_requests_end() -> None:
    rig, (model,) = Rig.ready(workers=2)
    request = rig.infer(model, slo_ms=60_000)
    rig.step(0)
    assert len(rig.outstanding(0)) == 1
    at_ms = 0.0
    while not rig.outstanding(1) and at_ms < 20_000:
        at_ms += TICK_MS
        rig.now_ns = T0 + round(at_ms * MS)
        beat(rig, 0, 50)
        beat(rig, 1, 51)
        rig.step()
    assert 4_000 < at_ms < 6_000
    assert any("does not report action" in n for n in notes(rig))
    (again,) = rig.outstanding(1)
    rig.now_ns += 4 * MS
    rig.finish(again, begin_ms=at_ms + 1, worker_id=1)
    rig.step()
    assert rig.reply(request).code == Code.OK


def test_a_pause_teaches_nothing_about_the_path() -> None:
    rig, (model,) = Rig.ready()
    rig.now_ns = T0 + 20_000 * MS
    for i in range(100):  # heartbeats of twenty seconds, read at once
        rig.from_worker(a_heartbeat(50, T0 + i * 200 * MS))
    request = rig.infer(model, slo_ms=20)
    rig.step()
    assert not rig.answered(request) and len(rig.outstanding()) == 1


def test_a_result_that_lies_about_time_is_cut_to_what_can_be() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=50)
    rig.step(0)
    (infer,) = rig.outstanding()
    span = Span(rig.now_ns, 2**62, -(10**18))
    rig.now_ns = T0 + 3 * MS
    rig.from_worker(
        an_infer_result(infer.session, infer.action_id, span, received_ns=T0, sent_ns=2**62)
    )
    rig.step()
    later = rig.infer(model, slo_ms=20)
    rig.step()
    assert not rig.answered(later)
    (again,) = rig.outstanding()
    assert again.expected_duration_ns == 2 * MS


def test_a_worker_cannot_report_another_ones_action() -> None:
    rig, (model,) = Rig.ready(workers=2)
    request = rig.infer(model, slo_ms=50)
    rig.step(0)
    (infer,) = rig.outstanding(0)
    rig.now_ns = T0 + 3 * MS
    span = Span(T0 + MS, T0 + 3 * MS, 2 * MS)
    rig.from_worker(
        an_infer_result(51, infer.action_id, span, received_ns=T0, sent_ns=T0),
        1,
    )
    rig.step()
    assert not rig.answered(request)


def test_impossible_gpus_and_models_are_refused_in_words_and_the_controller_goes_on() -> None:
    rig = Rig()
    rig.hello()
    for gpus in ((), (GpuInfo(0, "g", -5, 1),), (GpuInfo(0, "g", 5, 1), GpuInfo(0, "g", 5, 1))):
        rig.from_worker(a_welcome(50, gpus, version="t", host="h", device="cpu"))
    rig.step()
    assert not rig.scheduler.ready()
    assert sum("is not used" in n for n in notes(rig)) == 3
    rig.join()
    rig.handle(FromClient(b"c", LoadModelRequest(9, "net", 1)))
    rig.step()
    (load,) = rig.to_worker(LoadModel)
    rig.from_worker(
        LoadModelResult(
            50,
            load.action_id,
            span=Span(0, 0, 0),
            copies=1,
            batch_sizes=(1, 2),
            exec_ns=(5,),
            weights_ns=1,
            weights_bytes=1,
            pages=1,
            input_shape=(4,),
            input_dtype="float32",
            output_shape=(2,),
            output_dtype="float32",
            random_weights=True,
            received_ns=0,
            sent_ns=0,
        )
    )
    rig.step()
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.code == Code.RUNTIME_ERROR and "2 batch sizes and 1 exec times" in reply.reason


def test_the_last_worker_that_prepared_a_model_dies_while_another_fails() -> None:
    rig = Rig(workers=2)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    rig.handle(FromClient(b"c", LoadModelRequest(9, "net", 1)))
    rig.step()
    rig.prepared(0)
    rig.handle(
        SendFailed(
            0,
            an_infer(50, 1),
        )
    )
    (load,) = rig.to_worker(LoadModel, 1)
    rig.from_worker(
        an_error(51, load.action_id, Code.RUNTIME_ERROR, "no memory"),
        1,
    )
    rig.step()
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.code == Code.RUNTIME_ERROR and "no memory" in reply.reason


def test_every_waiting_client_hears_the_same_reason_and_the_next_one_a_new_try() -> None:
    rig = Rig()
    rig.hello()
    rig.hello(b"d")
    rig.join()
    rig.handle(FromClient(b"c", LoadModelRequest(1, "net", 1)))
    rig.handle(FromClient(b"d", LoadModelRequest(2, "net", 1)))
    rig.step()
    (load,) = rig.to_worker(LoadModel)
    rig.from_worker(an_error(50, load.action_id, Code.INVALID_MODEL_PATH, "torn file"))
    rig.step()
    assert [r.reason for r in rig.to_client(LoadModelReply)] == ["cannot load 'net': torn file"] * 2
    rig.handle(FromClient(b"d", LoadModelRequest(3, "net", 1)))
    rig.step()
    assert len(rig.to_worker(LoadModel)) == 2
    rig.prepared()
    rig.weights_loaded()
    assert rig.to_client(LoadModelReply)[-1].code == 0


def test_a_joining_worker_does_not_hold_up_models_that_others_have() -> None:
    rig, (model,) = Rig.ready(workers=2)
    rig.join(1, session=77)  # it prepares `net` and never answers
    rig.hello(b"d")
    rig.handle(FromClient(b"d", LoadModelRequest(30, "net", 1)))
    rig.step()
    assert [m.model_id for m in rig.to_client(LoadModelReply)[-1].models] == [model.model_id]


def test_a_preparation_that_never_ends_is_given_up() -> None:
    rig = Rig()
    rig.hello()
    rig.join()
    rig.handle(FromClient(b"c", LoadModelRequest(1, "net", 1)))
    rig.step()
    rig.now_ns = T0 + 601_000 * MS
    beat(rig, preparing=1)
    rig.step()
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.code == Code.LOAD_MODEL_TOO_LATE


def test_b1_is_not_taken_from_a_worker_that_offers_another_model_of_that_name() -> None:
    rig = Rig(workers=2)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    rig.handle(FromClient(b"c", LoadModelRequest(9, "net", 1)))
    rig.step()
    rig.prepared(0)
    rig.prepared(1, scale=0.001, pages=7)
    rig.weights_loaded(0)
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.models[0].b1_ns == 2 * MS
    assert any("offers another" in n for n in notes(rig))


def test_a_restarted_worker_is_noticed_by_its_new_session() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=60_000)
    rig.step(0)
    rig.join(session=99)
    assert rig.reply(request).code == Code.CANCELLED
    assert rig.scheduler.ready() and any("restarted" in n for n in notes(rig))


def test_results_of_an_old_session_change_nothing() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=60_000)
    rig.step(0)
    (infer,) = rig.outstanding()
    rig.join(session=99)
    rig.step(5)
    rig.finish(infer, begin_ms=1)  # it carries session 50
    rig.step()
    assert [r.code for r in rig.records()] == [Code.CANCELLED]
    assert rig.answered(request)


@pytest.mark.parametrize("session", [49, 51])
def test_what_another_session_reports_is_not_believed_though_its_numbers_are_ours(
    session: int,
) -> None:
    """A worker numbers nothing itself: the actions of two controllers have the same numbers."""
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=60_000)
    rig.step(0)
    (infer,) = rig.outstanding()
    span = Span(T0 + MS, T0 + 3 * MS, 2 * MS)
    rig.from_worker(an_infer_result(session, infer.action_id, span))
    rig.from_worker(an_error(session, infer.action_id, Code.RUNTIME_ERROR, "theirs"))
    rig.step(4)
    assert rig.outstanding() == [infer] and not rig.answered(request)
    for tick in range(1, 7):
        beat(rig, session=session)
        rig.step(4 + tick * TICK_MS)
    assert not rig.scheduler.ready(), "nor do its heartbeats keep ours alive"


def test_another_protocol_is_refused_in_words() -> None:
    rig = Rig()
    rig.from_worker(a_welcome(1, (), protocol=99, version="9", host="h", device="cpu", loadable=()))
    rig.from_worker(WorkerRefused(6, "it serves another controller"))
    rig.step()
    assert not rig.scheduler.ready()
    assert any("protocol 99" in n for n in notes(rig))
    assert any("serves another controller" in n for n in notes(rig))


def test_max_gpus_limits_what_is_used() -> None:
    rig = Rig(SchedulerConfig(max_gpus=3), workers=2)
    rig.join(0, gpus=2)
    rig.join(1, gpus=2, session=51)
    assert [g.name for g in rig.scheduler.cluster.gpus.values()] == [
        "W0-GPU0",
        "W0-GPU1",
        "W1-GPU0",
    ]


def test_b1_is_the_fastest_gpus_and_stays_when_a_faster_one_joins() -> None:
    rig = Rig(workers=3)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    rig.handle(FromClient(b"c", LoadModelRequest(9, "net", 1)))
    rig.step()
    rig.prepared(0, scale=2.0)
    rig.prepared(1, scale=1.0)
    rig.weights_loaded(0)
    rig.weights_loaded(1)
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.models[0].b1_ns == 2 * MS
    rig.join(2, session=52)
    rig.prepared(2, scale=0.5)
    assert rig.scheduler.cluster.models[0].b1_ns == 2 * MS


def test_a_worker_that_knows_nothing_of_its_load_model_is_lost() -> None:
    rig = Rig()
    rig.hello()
    rig.join(0)
    rig.handle(FromClient(b"c", LoadModelRequest(1, "net")))
    rig.step(0)
    (lost,) = rig.to_worker(LoadModel)

    def beats(until_ms: float, preparing: int) -> None:
        while rig.now_ns < T0 + round(until_ms * MS):
            rig.now_ns += TICK_NS
            beat = a_heartbeat(50, rig.now_ns - MS // 10, preparing=preparing)
            rig.from_worker(beat)
            rig.step()

    beats(60_000, preparing=1)  # however long it takes, it is at it
    assert rig.scheduler.ready() and len(rig.to_worker(LoadModel)) == 1
    beats(121_000, preparing=0)
    assert not rig.scheduler.ready()
    assert any(f"it knows nothing of LoadModel {lost.action_id}" in n for n in notes(rig))
    rig.join(0, session=51)
    assert rig.scheduler.ready()


def test_a_negative_number_of_preparations_means_none() -> None:
    rig, _ = Rig.ready()
    for _ in range(100):
        rig.now_ns += TICK_NS
        rig.from_worker(a_heartbeat(50, rig.now_ns - MS // 10, preparing=-1))
        rig.step()
    assert rig.scheduler.ready()


@pytest.mark.parametrize("policy", ["INFER5", "FIFO"])
def test_a_request_aboard_a_worker_that_falls_silent_is_answered_when_it_is_hopeless(
    policy: str,
) -> None:
    """The worker is not lost yet; a request that has time left waits for it."""
    rig, (model,) = Rig.ready(SchedulerConfig(policy=policy))
    hopeless, patient = rig.infer(model, slo_ms=100), rig.infer(model, slo_ms=5_000)
    rig.step()
    assert rig.outstanding()
    for ms in range(10, 180, 10):
        rig.step(ms)
        assert rig.answered(hopeless) <= (ms > 100)
    assert rig.reply(hopeless).code == Code.TIMED_OUT
    assert "worker 0 has not reported" in rig.reply(hopeless).reason
    assert not rig.answered(patient)
    (infer,) = rig.outstanding()[:1]
    rig.finish(infer, begin_ms=1)
    rig.step(190)
    assert len([r for r in rig.to_client(InferReply) if r.request_id == hopeless]) == 1


def test_workers_are_told_a_number_that_no_client_hears() -> None:
    """A worker's hello has the number of its controller gets its session."""
    scheduler = Scheduler(
        SchedulerConfig(), worker_count=1, incarnation=7, secret=11, version="test"
    )
    scheduler.handle(FromClient(b"c", ClientHello(PROTOCOL_VERSION, 1)), now_ns=10**18)
    scheduler.handle(FromClient(b"c", StatusRequest(1)), now_ns=10**18)
    told: list[Any] = []
    for tick in range(10):
        told += scheduler.schedule(now_ns=10**18 + tick * TICK_NS)
    hellos = [e.message for e in told if isinstance(e, ToWorker)]
    assert {hello.incarnation for hello in hellos if isinstance(hello, ControllerHello)} == {11}
    to_client: list[Any] = [e.message for e in told if isinstance(e, ToClient)]
    assert len(to_client) == 1
    assert [e for e in told if isinstance(e, StatusAsked)] == [StatusAsked(b"c", 1, False)]
    to_client.append(status_report(scheduler, now_ns=10**18))
    assert not re.search(r"\b11\b", repr(to_client))


def test_words_of_a_worker_are_safe_to_show() -> None:
    escape = "\x1b[2J\x1b]0;title\x07 gone\nsecond line\u202e"
    rig = Rig()
    rig.hello()
    gpus = (GpuInfo(0, escape, 10, 2**24),)
    rig.from_worker(
        a_welcome(50, gpus, version=escape, host=escape, device=escape, loadable=("net", escape))
    )
    rig.from_worker(
        a_heartbeat(
            50,
            T0,
            clock_error_ns=0,
            activity=escape,
            gpus=(GpuStats(gpu_id=0, name=escape, uuid=escape, driver=escape),),
        )
    )
    rig.step()
    rig.handle(FromClient(b"c", LoadModelRequest(5, "net", 1)))
    rig.step()
    (load,) = rig.to_worker(LoadModel)
    rig.from_worker(an_error(50, load.action_id, 2, escape))
    rig.from_worker(WorkerRefused(6, escape))
    rig.handle(FromClient(b"c", StatusRequest(9)))
    rig.step()
    shown = [e.text for e in rig.effects if isinstance(e, Note)]
    shown += [r.reason for r in rig.to_client(LoadModelReply)]
    shown += strings(rig.to_client(StatusReply)[-1].report)
    assert any("gone second line" in text for text in shown)
    assert all(text.isprintable() for text in shown), [t for t in shown if not t.isprintable()]
    assert rig.scheduler.catalog.loadable() == ("net",)


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for each in pair for text in strings(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in strings(each)]
    return []
