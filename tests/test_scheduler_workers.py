"""Workers join, fall silent, die, come back and lie about old sessions."""

from __future__ import annotations

from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import ActionDone, FromClient, Note, SendFailed
from slosched.core.scheduler.sessions import TICK_NS
from slosched.messages import (
    ControllerHello,
    Heartbeat,
    HeartbeatAck,
    Infer,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadWeights,
    WorkerRefused,
    WorkerWelcome,
)

TICK_MS = TICK_NS / MS


def beat(rig: Rig, worker_id: int = 0, session: int = 50) -> None:
    rig.from_worker(Heartbeat(session, rig.now_ns - MS // 10, 0, 1000), worker_id)


def notes(rig: Rig) -> list[str]:
    return [e.text for e in rig.effects if isinstance(e, Note)]


def test_silent_workers_are_greeted_again_and_named_every_few_seconds() -> None:
    rig = Rig(workers=2)
    for tick in range(40):
        rig.step(tick * TICK_MS)
    hellos = rig.to_worker(ControllerHello, 0)
    assert 10 <= len(hellos) <= 14  # each half second of 6.4
    assert any("no answer from worker(s) 0, 1 of 2" in n for n in notes(rig))


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
    rig.handle(SendFailed(0, Infer(50, 1, 0, 0, 0, 0, 0, 1, 1)))
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


def test_weights_that_a_worker_kept_need_not_be_loaded_again() -> None:
    rig, (model,) = Rig.ready()
    rig.handle(SendFailed(0, Infer(50, 1, 0, 0, 0, 0, 0, 1, 1)))
    rig.step(10)
    rig.effects.clear()
    rig.join(session=51, resident=(model.model_id,))
    rig.prepared()
    assert not rig.to_worker(LoadWeights)
    (gpu,) = rig.scheduler.cluster.gpus.values()
    assert list(gpu.resident) == [model.model_id] and gpu.free_pages == gpu.pages - 1


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


def test_another_protocol_is_refused_in_words() -> None:
    rig = Rig()
    rig.from_worker(WorkerWelcome(99, 1, "9", "h", 1, "cpu", (), ()))
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
