"""Weights move by demand, within the pages there are."""

from __future__ import annotations

import pytest

from made_messages import an_error
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import PLACEMENTS, SchedulerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies.placements import PLACEMENT_RULES
from slosched.errors import UnknownName
from slosched.messages import (
    EvictWeights,
    EvictWeightsResult,
    Goodbye,
    LoadWeights,
    ModelInfo,
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
            rig.from_worker(
                EvictWeightsResult(
                    evict.session, evict.action_id, span=span, received_ns=0, sent_ns=0
                )
            )


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
        an_error(
            load.session,
            load.action_id,
            Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE,
            "no pages",
            action_type=1,
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
        an_error(
            infer.session, infer.action_id, Code.EXEC_WEIGHTS_MISSING, "not here", action_type=2
        )
    )
    rig.step(1)
    (gpu,) = rig.scheduler.cluster.gpus.values()
    assert [a.model_id for a in rig.to_worker(LoadWeights)] == [0]
    assert gpu.free_pages == gpu.pages - 1  # the one that is loading


def test_a_cold_model_goes_to_the_gpu_where_it_can_start_soonest() -> None:
    rig, models = tight(copies=3, pages=2, gpus=2)
    cluster = rig.scheduler.cluster
    cluster.gpus[0].load.busy_until_ns = rig.now_ns + 50 * MS
    rig.infer(models[2], slo_ms=200)
    rig.step(0)
    (load,) = rig.to_worker(LoadWeights)
    assert load.gpu_id == 1


# ------------------------------------------------------------------------------------- gain


def used(rig: Rig, model: ModelInfo | int, count: int, *, begin_ms: float) -> None:
    """`count` requests of `model`, each served before the next one comes."""
    for number in range(count):
        at_ms = begin_ms + 4 * number
        rig.now_ns = T0 + round(at_ms * MS)
        rig.infer(model, slo_ms=50)
        rig.step()
        (infer,) = rig.outstanding()
        rig.step(at_ms + 3)
        rig.finish(infer, begin_ms=at_ms + 0.5)
        rig.step()


def loaded(rig: Rig) -> list[int]:
    return [a.model_id for a in rig.to_worker(LoadWeights)]


def test_the_least_needed_goes_and_not_the_least_recently_used() -> None:
    rig, models = tight()
    used(rig, models[0], 5, begin_ms=0)
    used(rig, models[1], 1, begin_ms=30)
    assert resident(rig) == [0, 1], "least recently used first"
    rig.infer(models[2], slo_ms=100)
    rig.step(40)
    assert evicted(rig) == [1] and loaded(rig) == [2]


def test_what_is_not_resident_is_loaded_as_soon_as_a_model_in_use_is_not() -> None:
    rig, models = tight(copies=2, pages=1)
    rig.infer(models[0], slo_ms=50)
    rig.step(0)
    (infer,) = rig.outstanding()
    request = rig.infer(models[1], slo_ms=50)
    rig.step(1)
    assert not evicted(rig), "the only page is in use"
    wakeup_ns = rig.scheduler.next_wakeup_ns()
    assert wakeup_ns is not None and wakeup_ns <= rig.now_ns + 2 * MS + 1
    rig.step(3)
    rig.finish(infer, begin_ms=0.5)
    rig.step(3.5)
    assert evicted(rig) == [0] and loaded(rig) == [1] and not rig.answered(request)


def test_the_earliest_deadline_that_a_load_can_make_goes_first() -> None:
    rig, models = tight(copies=5, pages=2)
    for model, slo_ms in ((2, 60), (3, 20), (4, 40)):
        rig.infer(models[model], slo_ms=slo_ms)
    rig.step(0)
    assert loaded(rig) == [3]


def test_many_who_wait_for_one_load_go_before_one_of_the_same_deadline() -> None:
    rig, models = tight(copies=4, pages=2)
    rig.infer(models[2], slo_ms=40)
    for _ in range(3):
        rig.infer(models[3], slo_ms=42)
    rig.step(0)
    assert loaded(rig) == [3]


def test_nothing_is_loaded_for_requests_that_no_load_saves_and_that_have_time_for_one() -> None:
    """A load is under way, the second one would be too late: the next request is served by its own."""
    rig, models = tight(copies=4, pages=2)
    rig.infer(models[2], slo_ms=14)
    rig.step(0)
    late = rig.infer(models[3], slo_ms=14)
    rig.step(0.1)
    assert rig.reply(late).code == Code.COULD_NOT_START_IN_TIME
    report_evictions(rig)
    rig.step(8.5)
    rig.weights_loaded()
    for at_ms in range(9, 40):
        rig.step(at_ms)
    assert loaded(rig) == [2]


def test_what_no_load_could_serve_in_time_is_loaded_only_over_what_is_needed_clearly_less() -> None:
    rig, models = tight(copies=2, pages=1)
    used(rig, models[0], 3, begin_ms=0)  # of 50 ms: a load takes a fifth of their time
    rig.now_ns = T0 + 20 * MS
    rig.infer(models[1], slo_ms=5)
    rig.step()
    assert loaded(rig) == [1], "one that needs it wholly counts more"
    report_evictions(rig)
    rig.step(29)
    rig.weights_loaded()
    rig.infer(models[0], slo_ms=5)
    rig.step(30)
    assert loaded(rig) == [1, 0], "with the three before it"
    report_evictions(rig)
    rig.step(39)
    rig.weights_loaded()
    rig.infer(models[1], slo_ms=11)
    rig.step(40)
    assert loaded(rig) == [1, 0], "a little more is not clearly more"


def test_a_victim_that_would_lose_more_than_is_gained_stays() -> None:
    """It comes 200 times a second and is away for 18 ms: more than one request."""
    rig, models = tight(copies=2, pages=1)
    for number in range(60):
        at_ms = 5 * number
        rig.now_ns = T0 + at_ms * MS
        rig.infer(models[0], slo_ms=6)
        rig.step()
        (infer,) = rig.outstanding()
        rig.step(at_ms + 3)
        rig.finish(infer, begin_ms=at_ms + 0.5)
        rig.step()
    rig.infer(models[1], slo_ms=30)
    rig.step(300)
    assert not evicted(rig)
    for _ in range(7):
        rig.infer(models[1], slo_ms=30)
    rig.step(303)
    assert evicted(rig) == [0], "for eight it goes"


def test_a_second_gpu_takes_a_model_that_loses_requests_only_when_it_is_idle() -> None:
    rig, models = tight(copies=2, pages=1, gpus=2)
    cluster = rig.scheduler.cluster
    rig.scheduler.cluster.send_evict(cluster.gpus[1], cluster.models[0], now_ns=rig.now_ns)
    rig.scheduler.cluster.send_load(
        cluster.gpus[1],
        cluster.models[1],
        now_ns=rig.now_ns,
        start_ns=rig.now_ns,
        latest_ns=T0 + 99 * MS,
    )
    rig.step()
    rig.weights_loaded()
    rig.effects.clear()
    rig.infer(models[1], slo_ms=50)
    for _ in range(60):
        rig.infer(models[0], slo_ms=8)
    for at_ms in range(9):
        rig.step(at_ms)
    assert any(r.code != Code.OK for r in rig.records()) and not loaded(rig)
    infer = next(a for a in rig.outstanding() if a.model_id == 1)
    rig.finish(infer, begin_ms=1)
    rig.infer(models[0], slo_ms=8)
    for at_ms in range(9, 20):
        rig.step(at_ms)
    assert [(a.gpu_id, a.model_id) for a in rig.to_worker(LoadWeights)] == [(1, 0)]


# ------------------------------------------------------------------------- the other rules


def test_lru_loads_in_the_order_of_asking_over_what_was_used_least_recently() -> None:
    rig, models = Rig.ready(SchedulerConfig(placement="lru"), copies=4, pages=2)
    used(rig, models[0], 5, begin_ms=0)
    used(rig, models[1], 1, begin_ms=30)
    rig.infer(models[2], slo_ms=100)
    rig.infer(models[3], slo_ms=20)
    rig.step(40)
    assert evicted(rig) == [0] and loaded(rig) == [2]


def test_demand_loads_the_model_that_most_is_asked_of_as_published() -> None:
    rig, models = Rig.ready(SchedulerConfig(placement="demand"), copies=4, pages=2)
    used(rig, models[0], 5, begin_ms=0)
    used(rig, models[1], 1, begin_ms=30)
    rig.infer(models[2], slo_ms=100)
    for _ in range(2):
        rig.infer(models[3], slo_ms=100)
    rig.step(40)
    assert evicted(rig)[0] == 0 and loaded(rig)[0] == 3


def test_demand_is_gone_when_its_requests_are() -> None:
    rig, models = Rig.ready(SchedulerConfig(placement="demand"), copies=3, pages=2)
    rig.infer(models[0], slo_ms=50)
    rig.infer(models[2], slo_ms=5)  # refused at once, and asks until its deadline
    rig.step(0)
    assert loaded(rig) == [2]
    report_evictions(rig)
    (infer,) = rig.outstanding()
    rig.step(3)
    rig.finish(infer, begin_ms=0.5)
    rig.step(9)
    rig.weights_loaded()
    for at_ms in range(10, 60, 5):
        rig.step(at_ms)
    assert loaded(rig) == [2]


def test_a_rule_that_there_is_not_is_refused() -> None:
    assert tuple(PLACEMENT_RULES) == PLACEMENTS
    with pytest.raises(UnknownName, match="known: demand, gain, lru"):
        SchedulerConfig(placement="fifo")
