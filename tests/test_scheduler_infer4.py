"""INFER4: strategies, the three rules a popped one is judged by, the codes of those left behind, loads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from made_messages import an_error
from scheduler_rig import MS, T0, Rig
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies import resolved
from slosched.core.scheduler.policies.published.deadlines import internal_slos_ns
from slosched.messages import CancelRequest, EvictWeights, Infer, LoadWeights
from slosched.sim.harness import Demand, Network, Outcome, Simulation
from slosched.units import NS_PER_S
from slosched.workloads.slo_exp_1 import parse_slo_exp_1

INFER4 = SchedulerConfig(policy="INFER4", schedule_ahead_ns=5 * MS)


def warm(copies: int = 1, gpus: int = 1) -> tuple[Rig, tuple[int, ...]]:
    return Rig.warm(INFER4, copies=copies, gpus=gpus)


def sizes(rig: Rig) -> list[tuple[int, int]]:
    """(model, batch) of every Infer sent, in order."""
    return [(a.model_id, a.batch_size) for a in rig.to_worker(Infer)]


def busy(rig: Rig, model: int, batches: int = 1) -> None:
    """Full batches from T0 + 200 ms on: the GPU opens again 4 ms after, or 13 for two of them."""
    for _ in range(8 * batches):
        rig.infer(model, slo_ms=1000)
    rig.step(200)
    if batches == 2:
        rig.step(204.001)
    assert sizes(rig) == [(model, 8)] * batches
    rig.effects.clear()


def test_defaults_are_the_published_codes_whatever_the_fidelity() -> None:
    for fidelity in ("best", "paper"):
        config = resolved(SchedulerConfig(policy="INFER4", fidelity=fidelity, generate_inputs=True))
        assert (config.schedule_ahead_ns, config.default_slo_ns) == (10 * MS, 100 * MS)
        assert (config.max_exec_ns, config.max_batch) == (250 * MS, 16)


@pytest.mark.parametrize(
    ("slo_ms", "done_ms", "weights_ms"),
    [
        (100, 95, 25),  # 5 ms early; weights within 25 ms at most
        (30, 25, 10),  # 30 - (8 + 2 + 5 + 5) = 10
        (21, 16, 10),  # 1 is left for weights: the floor of 10 counts
        (12, 10, 12),  # nothing is left for weights: the whole SLO; exec has the floor
        (2, 10, 10),
    ],
)
def test_internal_deadlines_are_early_but_never_below_the_floor(
    slo_ms: int, done_ms: int, weights_ms: int
) -> None:
    found = internal_slos_ns(slo_ms * MS, single_ns=2 * MS, transfer_ns=8 * MS, ahead_ns=5 * MS)
    assert found == (done_ms * MS, weights_ms * MS)


def test_the_latest_start_goes_first_and_the_queue_fills_its_batch() -> None:
    rig, (a, b) = warm(copies=2)
    rig.infer(a, slo_ms=51)
    for _ in range(4):
        rig.infer(b, slo_ms=50)
    rig.step(200)
    # b's batch of 4 must start at 45 - 5 ms; a's pair, at 46 - 3, has no second request.
    assert sizes(rig) == [(b, 4)]
    first = rig.outstanding()[0]
    assert first.expected_duration_ns == 5 * MS
    assert first.latest_ns == T0 + 206 * MS  # 1 ms of lead and schedule_ahead
    rig.now_ns = T0 + round(206.25 * MS)
    rig.finish(first, begin_ms=201)
    rig.step()
    assert sizes(rig) == [(b, 4), (a, 1)]


def test_a_gpu_is_drained_until_its_window_is_full() -> None:
    rig, (model,) = warm()
    for _ in range(3):
        rig.infer(model, slo_ms=1000)
    rig.step(200)
    assert sizes(rig) == [(model, 2), (model, 1)]  # 3 ms of work are fewer than 5; then 5 are not
    rig.infer(model, slo_ms=1000)
    rig.step(200)
    assert len(rig.outstanding()) == 2
    opens_ns = rig.scheduler.next_wakeup_ns()
    assert opens_ns == T0 + 200 * MS + 1
    rig.step(200.001)
    assert len(rig.outstanding()) == 3


def test_a_request_gives_way_to_a_larger_batch_that_it_is_too_old_for() -> None:
    """Rule 3. Alone it would be in time; the four that stand there from it on would not."""
    rig, (model,) = warm()
    busy(rig, model)
    old = rig.infer(model, slo_ms=16.5)  # internally until 211.5
    late = [rig.infer(model, slo_ms=900) for _ in range(3)]
    rig.step(204.001)  # the next start is 209: alone until 211, a pair until 212, four until 214
    (infer,) = rig.to_worker(Infer)
    taken = [r.request_id for r in rig.scheduler.cluster.actions[infer.action_id].requests]
    assert taken == late[:2]
    rig.step(211.499)
    assert not rig.answered(old)
    rig.step(211.5)
    assert rig.reply(old).code == 7
    assert "larger batch" in rig.reply(old).reason


def test_a_batch_is_raised_when_the_larger_one_ends_in_time() -> None:
    rig, (a, b) = warm(copies=2)
    rig.infer(a, slo_ms=100)
    for _ in range(4):
        rig.infer(b, slo_ms=101)
    rig.step(200)
    # Latest starts: a's four 90 (popped, one is there), b's four 91 (sent), a's pair 92 (still there).
    assert sizes(rig) == [(b, 4)]
    for _ in range(3):
        rig.infer(a, slo_ms=200)
    rig.step(200.001)
    assert sizes(rig) == [(b, 4), (a, 4)]


def test_the_newest_run_together_when_too_few_stand_behind_the_strategys_request() -> None:
    rig, (model,) = warm()
    busy(rig, model)
    first = rig.infer(model, slo_ms=300)
    rig.infer(model, slo_ms=20)  # internally 215; its pair is the most urgent strategy
    rig.step(204.001)
    (infer,) = rig.to_worker(Infer)
    taken = [r.request_id for r in rig.scheduler.cluster.actions[infer.action_id].requests]
    assert taken == [first, first + 1]


@pytest.mark.parametrize("another", [True, False])
def test_who_cannot_start_in_time_is_told_at_its_deadline(another: bool) -> None:
    rig, (model,) = warm()
    busy(rig, model, batches=2)  # until 218
    hopeless = rig.infer(model, slo_ms=10)  # internally until 214.001: the floor
    lucky = rig.infer(model, slo_ms=500) if another else None
    rig.step(213.002)
    assert len(rig.to_worker(Infer)) == (lucky is not None)
    rig.step(214)
    assert not rig.answered(hopeless)
    rig.step(214.001)
    # Only when another one's turn comes is it found out that this one can never start.
    assert rig.reply(hopeless).code == (8 if another else 4)


def test_a_failed_action_fails_its_requests_and_a_cancelled_request_runs_nothing() -> None:
    rig, (model,) = warm()
    request = rig.infer(model, slo_ms=100)
    rig.step(200)
    (infer,) = rig.outstanding()
    rig.from_worker(
        an_error(
            infer.session, infer.action_id, 81, "late", action_type=2, received_ns=T0, sent_ns=T0
        ),
    )
    rig.step(206)
    assert rig.reply(request).code == 81
    gone = rig.infer(model, slo_ms=100)
    rig.handle(FromClient(b"c", CancelRequest(gone)))
    rig.step(206)
    assert rig.reply(gone).code == 1 and len(rig.to_worker(Infer)) == 1


# ------------------------------------------------------------------------------------- weights


def test_two_loads_are_outstanding_at_most_and_100_us_apart() -> None:
    ahead = replace(INFER4, schedule_ahead_ns=20 * MS)  # three loads of 8 ms would fit
    rig, models = Rig.ready(ahead, copies=3)
    for model in models:
        rig.infer(model, slo_ms=1000)
    rig.step(0)
    assert len(rig.to_worker(LoadWeights)) == 1
    assert rig.scheduler.next_wakeup_ns() == T0 + MS // 10
    rig.step(0.099)
    assert len(rig.to_worker(LoadWeights)) == 1
    rig.step(0.1)
    assert len(rig.to_worker(LoadWeights)) == 2
    rig.step(3)
    assert len(rig.to_worker(LoadWeights)) == 2
    rig.now_ns = T0 + 9 * MS
    assert rig.weights_loaded() == 3


def test_the_least_recently_used_gives_way() -> None:
    rig, models = Rig.ready(INFER4, copies=3, pages=2)
    for position, model in enumerate(models[:2]):
        rig.now_ns = T0 + position * 40 * MS
        rig.infer(model, slo_ms=30)
        rig.step()
        rig.now_ns += 8 * MS
        rig.weights_loaded()
        rig.now_ns += 3 * MS
        rig.finish(rig.outstanding()[0], begin_ms=position * 40 + 9)
        rig.step()
    rig.now_ns = T0 + 100 * MS
    rig.infer(models[2], slo_ms=30)
    rig.step()
    assert [a.model_id for a in rig.to_worker(EvictWeights)] == [models[0].model_id]


# ------------------------------------------------------------------------------ in virtual time


def run(rate: float, factor: float, seconds: int = 1) -> Outcome:
    config = SchedulerConfig(policy="INFER4", schedule_ahead_ns=5 * MS, max_batch=8)
    network = Network(to_worker_ns=900_000, from_worker_ns=250_000)
    simulation = Simulation(config, load_profile("fig7"), network=network)
    models = simulation.load("resnet50", 12)
    simulation.run(models, [Demand(i * 3 * MS, i % 12, 0.0, NS_PER_S) for i in range(240)])
    simulation.outcome = Outcome()
    spec = parse_slo_exp_1(f"net 12 poisson {rate} {factor} {factor} 2 mul {seconds}".split())
    demands = [Demand(a.at_ns, a.user_id, a.slo_factor, a.slo_ns) for a in spec.arrivals(1)]
    return simulation.run(models, demands)


def test_it_serves_what_one_can_serve_and_batches_when_it_must() -> None:
    assert run(600, 3.375).satisfaction() == 1.0
    crowded = run(2400, 7.59375)
    assert crowded.satisfaction() > 0.98  # 2,069/s is all that batch 1 could do
    assert {r.code for r in crowded.requests} <= {0, 4, 7, 8}


def test_cold_models_come_and_go_within_the_pages_there_are() -> None:
    small = ModelProfile("net", {1: 2 * MS, 2: 3 * MS, 4: 5 * MS}, 4 * MS, 3 * 2**24)
    profile = GpuProfile("small", {"net": small}, weights_cache_bytes=8 * 2**24)
    simulation = Simulation(INFER4, profile, gpus_per_worker=(2,))
    models = simulation.load("net", 8)
    demands = [Demand(i * 20 * MS, (i // 10) % 8, 0.0, 100 * MS) for i in range(400)]
    outcome = simulation.run(models, demands)
    assert outcome.satisfaction() > 0.95
    assert sum(r.cold for r in outcome.requests) > 20
