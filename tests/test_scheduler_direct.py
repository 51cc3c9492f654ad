"""DIRECT: which GPU a request goes to, when its Infer is sent, and what becomes of it when that fails."""

from __future__ import annotations

from itertools import pairwise

from made_messages import a_heartbeat, an_error
from scheduler_rig import MS, T0, Rig
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.messages import (
    CancelRequest,
    EvictWeights,
    Infer,
    LoadWeights,
    LoadWeightsResult,
    Span,
)
from slosched.sim.harness import Demand, Simulation
from slosched.units import NS_PER_S

DIRECT = SchedulerConfig(policy="DIRECT")


def test_even_request_ids_go_to_the_second_gpu_of_worker_0_and_odd_ones_to_its_first() -> None:
    rig, (model,) = Rig.ready(DIRECT, gpus=3, workers=2)
    for request_id in (10, 11, 12, 13):
        rig.infer(model, request_id=request_id)
    rig.step(0)
    assert [a.gpu_id for a in rig.to_worker(LoadWeights, 0)] == [1, 0]  # one each, at once
    assert not rig.to_worker(LoadWeights, 1)
    rig.now_ns = T0 + 9 * MS
    rig.weights_loaded()
    sent = rig.to_worker(Infer)
    assert [(a.gpu_id, a.batch_size, a.request_count) for a in sent] == [
        (1, 1, 1),
        (0, 1, 1),
        (1, 1, 1),
        (0, 1, 1),
    ]
    assert all(a.latest_ns - a.earliest_ns == 10 * NS_PER_S for a in sent)


def test_with_one_gpu_it_takes_all() -> None:
    rig, (model,) = Rig.ready(DIRECT, gpus=1)
    for request_id in (10, 11):
        rig.infer(model, request_id=request_id)
    rig.step(0)
    rig.now_ns = T0 + 9 * MS
    rig.weights_loaded()
    assert [a.gpu_id for a in rig.to_worker(Infer)] == [0, 0]


def report_load(rig: Rig, took_ms: float) -> None:
    (load,) = rig.to_worker(LoadWeights)
    span = Span(T0, T0 + round(took_ms * MS), round(took_ms * MS))
    rig.from_worker(
        LoadWeightsResult(
            load.session, load.action_id, span=span, received_ns=T0, sent_ns=span.end_ns
        )
    )


def test_a_load_is_taken_to_last_7_ms_even_if_it_is_faster() -> None:
    rig, (model,) = Rig.ready(DIRECT)
    request = rig.infer(model, slo_ms=1)  # deadlines are not looked at
    rig.step(0)
    rig.step(3)
    report_load(rig, 3)
    rig.step()
    assert not rig.to_worker(Infer)
    assert rig.scheduler.next_wakeup_ns() == T0 + 7 * MS
    rig.step(7)
    (infer,) = rig.to_worker(Infer)
    rig.now_ns = T0 + 10 * MS
    rig.finish(infer, begin_ms=7.5)
    rig.step()
    reply = rig.reply(request)
    assert (reply.code, reply.deadline_met) == (0, False)
    rig.infer(model)
    rig.step(11)
    assert len(rig.to_worker(Infer)) == 2 and len(rig.to_worker(LoadWeights)) == 1


def test_a_failed_load_fails_those_that_wait_for_it_and_is_tried_anew_by_the_next() -> None:
    rig, (model,) = Rig.ready(DIRECT)
    requests = [rig.infer(model) for _ in range(2)]
    rig.step(0)
    (load,) = rig.to_worker(LoadWeights)
    rig.from_worker(an_error(load.session, load.action_id, 51, "late", action_type=1))
    rig.step(1)
    assert [rig.reply(r).code for r in requests] == [51, 51]
    assert "could not be loaded" in rig.reply(requests[0]).reason
    rig.infer(model)
    rig.step(1)
    assert len(rig.to_worker(LoadWeights)) == 2


def test_a_failed_infer_is_not_tried_again() -> None:
    rig, (model,) = Rig.ready(DIRECT)
    request = rig.infer(model, slo_ms=1000)
    rig.step(0)
    rig.now_ns = T0 + 9 * MS
    rig.weights_loaded()
    (infer,) = rig.to_worker(Infer)
    rig.from_worker(an_error(infer.session, infer.action_id, 81, "late", action_type=2))
    rig.step(10)
    assert rig.reply(request).code == 81


def test_nothing_is_evicted_so_a_full_gpu_says_so() -> None:
    rig, models = Rig.ready(DIRECT, copies=2, pages=3, model_pages=2)
    rig.infer(models[0])
    refused = rig.infer(models[1])
    rig.step(0)
    assert rig.reply(refused).code == 53
    assert rig.reply(refused).reason == (
        "W0-GPU0 has 1 free page(s), the weights take 2, and DIRECT evicts nothing"
    )
    assert not rig.to_worker(EvictWeights)


def test_a_lost_worker_0_is_named_and_the_others_are_no_help() -> None:
    rig, (model,) = Rig.ready(DIRECT, workers=2)
    waiting = rig.infer(model, slo_ms=100_000)
    rig.step(0)
    for at_ms in range(160, 1200, 160):
        rig.now_ns = T0 + at_ms * MS
        rig.from_worker(
            a_heartbeat(51, rig.now_ns - MS),
            1,
        )
        rig.step()
    assert rig.reply(waiting).code == 1
    assert "DIRECT uses no other" in rig.reply(waiting).reason
    late = rig.infer(model)
    rig.step()
    assert rig.reply(late).code == 8
    assert "worker 0 alone, and it is not connected" in rig.reply(late).reason


def test_a_cancelled_request_is_not_sent_when_its_weights_come() -> None:
    rig, (model,) = Rig.ready(DIRECT)
    gone = rig.infer(model)
    rig.step(0)
    rig.handle(FromClient(b"c", CancelRequest(gone)))
    rig.now_ns = T0 + 9 * MS
    rig.weights_loaded()
    assert rig.reply(gone).code == 1 and not rig.to_worker(Infer)


def test_it_runs_in_virtual_time_and_answers_all_in_order_per_gpu() -> None:
    net = ModelProfile("net", {1: 2 * MS, 2: 3 * MS}, 5 * MS, 2**24)
    profile = GpuProfile("two", {"net": net}, weights_cache_bytes=8 * 2**24)
    simulation = Simulation(DIRECT, profile, gpus_per_worker=(2, 1))
    models = simulation.load("net", 3)
    demands = [Demand(i * MS, i % 3, 0.0, NS_PER_S) for i in range(300)]
    outcome = simulation.run(models, demands, settle_ns=2 * NS_PER_S)
    assert {r.code for r in outcome.requests} == {0} and len(outcome.requests) == 300
    for gpu in (0, 1):
        mine = [r for r in outcome.requests if r.gpu_id == gpu]
        assert len(mine) == 150 and {r.request_id % 2 for r in mine} == {1 - gpu}
        assert all(a.departure_ns - b.departure_ns <= -2 * MS for a, b in pairwise(mine))
    assert {a.worker_id for a in outcome.actions} == {0}
