"""Weights move by demand, within the pages there are."""

from __future__ import annotations

from scheduler_rig import MS, Rig
from slosched.codes import Code
from slosched.core.scheduler.interface import FromClient
from slosched.messages import (
    ErrorResult,
    EvictWeights,
    EvictWeightsResult,
    Goodbye,
    LoadWeights,
    Span,
)


def tight(copies: int = 3, pages: int = 2, gpus: int = 1) -> tuple[Rig, tuple[int, ...]]:
    """`copies` models of one page each over `pages` pages per GPU."""
    rig, models = Rig.ready(copies=copies, pages=pages, gpus=gpus)
    return rig, tuple(m.model_id for m in models)


def evicted(rig: Rig) -> list[int]:
    return [e.model_id for e in rig.to_worker(EvictWeights)]


def resident(rig: Rig, gpu: int = 0) -> list[int]:
    return list(rig.scheduler.cluster.gpus[gpu].resident)


def report_evictions(rig: Rig) -> None:
    for evict in rig.to_worker(EvictWeights):
        if evict.action_id in rig.scheduler.cluster.actions:
            span = Span(rig.now_ns, rig.now_ns, 0)
            rig.from_worker(EvictWeightsResult(evict.session, evict.action_id, span, 0, 0))


def test_free_pages_are_filled_before_anybody_asks_and_the_load_waits_for_it() -> None:
    rig, _models = tight(copies=3, pages=2)
    assert resident(rig) == [0, 1]
    assert not evicted(rig)


def test_a_cold_model_is_loaded_over_one_that_nobody_asks_for_and_its_request_runs() -> None:
    rig, models = tight()
    request = rig.infer(models[2], slo_ms=100)
    rig.step(0)
    assert evicted(rig) == [0] and [a.model_id for a in rig.to_worker(LoadWeights)] == [2]
    report_evictions(rig)
    rig.step(8.5)
    rig.weights_loaded()
    (infer,) = rig.outstanding()
    rig.step(12)
    rig.finish(infer, begin_ms=9)
    rig.step()
    reply = rig.reply(request)
    assert (reply.code, reply.cold, reply.deadline_met) == (Code.OK, True, True)


def test_a_cold_request_that_the_load_would_make_late_is_refused_at_once_but_starts_the_load() -> (
    None
):
    rig, models = tight()
    request = rig.infer(models[2], slo_ms=9)  # the load alone takes 8, the exec 2
    rig.step(0)
    reply = rig.reply(request)
    assert reply.code == Code.COULD_NOT_START_IN_TIME and "loading its weights" in reply.reason
    assert [a.model_id for a in rig.to_worker(LoadWeights)] == [2]


def test_a_model_in_use_or_in_demand_is_not_evicted() -> None:
    rig, models = tight()
    for model in models[:2]:
        for _ in range(8):
            rig.infer(model, slo_ms=100)
    rig.infer(models[2], slo_ms=100)
    rig.step(0)
    assert not evicted(rig) and not rig.to_worker(LoadWeights)


def test_models_without_clients_are_evicted_first() -> None:
    rig, models = tight()
    rig.hello(b"other")
    for model in (0, 1):
        rig.scheduler.cluster.models[model].clients.clear()
    rig.scheduler.cluster.models[0].clients[b"other"] = None
    rig.infer(models[2], slo_ms=100)
    rig.step(0)
    assert evicted(rig) == [1]
    rig.handle(FromClient(b"other", Goodbye()))


def test_a_failed_load_gives_its_pages_back_and_is_tried_again_while_it_is_wanted() -> None:
    rig, models = tight(copies=3, pages=3)
    rig.scheduler.cluster.send_evict(
        rig.scheduler.cluster.gpus[0], rig.scheduler.cluster.models[2], now_ns=rig.now_ns
    )
    request = rig.infer(models[2], slo_ms=1000)
    rig.step(0)
    (load,) = rig.to_worker(LoadWeights)
    rig.from_worker(
        ErrorResult(
            load.session, load.action_id, 1, Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE, "no pages"
        )
    )
    (gpu,) = rig.scheduler.cluster.gpus.values()
    assert gpu.free_pages == 1
    for at_ms in range(1, 99):
        rig.step(at_ms)
    assert len(rig.to_worker(LoadWeights)) == 1, "not again at once: it would fail again and again"
    rig.step(101)
    assert len(rig.to_worker(LoadWeights)) == 2
    rig.step(110)
    rig.weights_loaded()
    assert rig.outstanding() and not rig.answered(request)


def test_weights_missing_at_the_worker_are_believed_and_loaded_again() -> None:
    rig, models = tight(copies=1)
    rig.infer(models[0], slo_ms=100)
    rig.step(0)
    (infer,) = rig.outstanding()
    rig.from_worker(
        ErrorResult(infer.session, infer.action_id, 2, Code.EXEC_WEIGHTS_MISSING, "not here")
    )
    rig.step(1)
    (gpu,) = rig.scheduler.cluster.gpus.values()
    assert [a.model_id for a in rig.to_worker(LoadWeights)] == [0]
    assert gpu.free_pages == gpu.pages - 1  # the one that is loading


def test_a_cold_model_goes_to_the_gpu_where_it_can_start_soonest() -> None:
    rig, models = tight(copies=3, pages=2, gpus=2)
    cluster = rig.scheduler.cluster
    cluster.gpus[0].weights.busy_until_ns = rig.now_ns + 50 * MS
    rig.infer(models[2], slo_ms=200)
    rig.step(0)
    (load,) = rig.to_worker(LoadWeights)
    assert load.gpu_id == 1
