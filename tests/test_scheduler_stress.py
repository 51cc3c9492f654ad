"""STRESS: its own models, its own load, its limits, and what it says each second."""

from __future__ import annotations

import re

import pytest

from made_messages import an_error
from scheduler_rig import T0, Rig
from slosched.codes import ActionType
from slosched.config import EmulationNoise, GpuProfile, ModelProfile, SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.scheduler.interface import Note
from slosched.core.scheduler.policies.published import stress
from slosched.core.scheduler.state import Gpu
from slosched.messages import (
    InferReply,
    LoadModelReply,
    LoadWeights,
    LoadWeightsResult,
    Span,
)
from slosched.sim.harness import Demand, Simulation
from slosched.sim.node import WorkerNode
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
STRESS = SchedulerConfig(policy="STRESS")
WARM_NS = NS_PER_S + NS_PER_S // 2


def stressed(
    profile: GpuProfile | None = None,
    *,
    gpus: tuple[int, ...] = (3,),
    noise: EmulationNoise | None = None,
) -> Simulation:
    """Some of it: the models are prepared and loads go round."""
    simulation = Simulation(
        STRESS, profile or load_profile("v100"), gpus_per_worker=gpus, noise=noise
    )
    simulation.run_until(simulation.now_ns + WARM_NS)
    return simulation


def gpus_of(simulation: Simulation) -> list[Gpu]:
    return list(simulation.scheduler.cluster.gpus.values())


def test_forty_copies_are_prepared_without_a_client_and_two_gpus_are_loaded() -> None:
    simulation = stressed()
    models = simulation.scheduler.cluster.models
    assert len(models) == 40 and {m.name for m in models.values()} == {"resnet50"}
    first, second, third = gpus_of(simulation)
    assert first.resident and second.resident and not third.resident
    assert {a.gpu_id for a in simulation.outcome.actions} == {0, 1}
    assert simulation.scheduler.idle and simulation.scheduler.arrived == 0
    assert not any(isinstance(r, LoadModelReply) for r in simulation.replies)


def test_two_loads_and_two_infers_are_outstanding_and_twenty_stay() -> None:
    simulation = stressed()
    for _ in range(500):
        simulation.run_until(simulation.now_ns + MS)
        for gpu in gpus_of(simulation)[:2]:
            assert len(gpu.loading) == 2
            assert len(gpu.exec.outstanding) == 2
            assert 18 <= len(gpu.resident) <= 21


def test_the_oldest_is_evicted_when_more_than_twenty_are_resident_and_not_before() -> None:
    simulation = Simulation(STRESS, load_profile("v100"), gpus_per_worker=(1,))
    most, evicted_at = 0, None
    for _ in range(1500):
        simulation.run_until(simulation.now_ns + MS)
        for gpu in gpus_of(simulation):
            most = max(most, len(gpu.resident))
        actions = simulation.outcome.actions
        loads = [a for a in actions if a.action_type == ActionType.LOAD_WEIGHTS]
        if evicted_at is None and any(a.action_type == ActionType.EVICT_WEIGHTS for a in actions):
            evicted_at = len(loads)
    assert evicted_at is not None and 21 <= evicted_at <= 23  # with what came while it was evicted
    assert most == 20 and len(loads) > 40


def test_loads_go_round_in_order_and_infers_run_the_seventh_and_eighth_oldest() -> None:
    simulation = stressed(gpus=(1,))
    actions = simulation.outcome.actions
    loads = [a.model_id for a in actions if a.action_type == ActionType.LOAD_WEIGHTS]
    evictions = [a.model_id for a in actions if a.action_type == ActionType.EVICT_WEIGHTS]
    assert loads == [i % 40 for i in range(len(loads))] and len(loads) > 100
    assert evictions == loads[: len(evictions)]
    infers = [a for a in actions if a.action_type == ActionType.INFER]
    assert infers[0].model_id == loads[6]
    assert {a.code for a in actions} == {0}
    assert {a.batch_size for a in infers} == {1}
    ran = infers[-50]  # everything from before it has been reported
    loaded = [
        a.model_id
        for a in actions
        if a.action_type == ActionType.LOAD_WEIGHTS and a.result_received_ns <= ran.sent_ns
    ]
    gone = sum(
        a.action_type == ActionType.EVICT_WEIGHTS and a.sent_ns <= ran.sent_ns for a in actions
    )
    assert gone > 50 and loaded[gone:].index(ran.model_id) in (6, 7)


def test_each_second_a_line_per_gpu_and_kind_says_what_was_measured() -> None:
    simulation = stressed()
    simulation.outcome.notes.clear()
    simulation.run_until(simulation.now_ns + 2 * NS_PER_S)
    lines = simulation.outcome.notes
    assert [line.split(" errors")[0] for line in lines] == [
        "W0-GPU0 LoadWeights",
        "W0-GPU1 LoadWeights",
        "W0-GPU0 Infer",
        "W0-GPU1 Infer",
    ] * 2
    profile = load_profile("v100").model("resnet50")
    for line in lines:
        found = re.search(
            r"errors=0 profiled=\S+ min=\S+ max=\S+ mean=(\S+)ms e2e=(\S+)ms "
            r"throughput=([\d.]+) efficiency=([\d.]+)$",
            line,
        )
        assert found, line
        mean_ms, from_decision_ms, throughput, efficiency = map(float, found.groups())
        duration_ns = profile.weights_ns if "LoadWeights" in line else profile.exec_ns[1]
        assert mean_ms == pytest.approx(duration_ns / MS, rel=0.01)
        # With two outstanding the executor never waits, and each waits for the one before it.
        assert efficiency == pytest.approx(1.0, abs=0.03)
        assert throughput == pytest.approx(NS_PER_S / duration_ns, rel=0.03)
        assert from_decision_ms == pytest.approx(2 * mean_ms, rel=0.15)


def test_clients_are_turned_away() -> None:
    simulation = stressed(gpus=(1,))
    models = simulation.load("resnet50", 2)
    outcome = simulation.run(models, [Demand(0, 0, 0.0, NS_PER_S)])
    (record,) = outcome.requests
    assert record.code == 6 and "serves no clients" in record.reason
    assert not any(isinstance(r, InferReply) for r in simulation.replies)


def test_a_gpu_that_cannot_hold_twenty_has_as_many_as_fit() -> None:
    net = ModelProfile("resnet50", {1: 2 * MS}, 4 * MS, 2**25)  # two pages
    profile = GpuProfile("small", {"resnet50": net}, weights_cache_bytes=9 * 2**24)
    simulation = stressed(profile, gpus=(1,))
    (gpu,) = gpus_of(simulation)
    assert 2 <= len(gpu.resident) + len(gpu.loading) <= 4
    kinds = [a.action_type for a in simulation.outcome.actions]
    assert kinds.count(ActionType.LOAD_WEIGHTS) > 200 and kinds.count(ActionType.INFER) > 200


def test_workers_without_the_model_are_named() -> None:
    other = ModelProfile("other", {1: 2 * MS}, 4 * MS, 2**24)
    profile = GpuProfile("other", {"other": other}, weights_cache_bytes=2**27)
    simulation = stressed(profile, gpus=(1,))
    assert any(
        "STRESS cannot have its models: no worker offers 'resnet50'" in note
        for note in simulation.outcome.notes
    )
    assert not simulation.outcome.actions


def test_errors_are_counted_and_the_loads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress, "_MODEL", "net")  # what the rig's worker offers
    rig = Rig(STRESS)
    rig.join()
    rig.prepared()
    first, second = rig.to_worker(LoadWeights)
    rig.from_worker(an_error(first.session, first.action_id, 51, "late", action_type=1))
    rig.step(5)
    third = rig.to_worker(LoadWeights)[2]
    assert [a.model_id for a in (first, second, third)] == [0, 1, 2]
    rig.step(1001)
    notes = [e.text for e in rig.effects if isinstance(e, Note) and "LoadWeights" in e.text]
    assert notes == ["W0-GPU0 LoadWeights errors=1 throughput=0"]
    for load in (second, third):
        span = Span(T0 + MS, T0 + 9 * MS, 8 * MS)
        rig.from_worker(
            LoadWeightsResult(
                load.session, load.action_id, span=span, received_ns=T0, sent_ns=T0 + 9 * MS
            )
        )
    rig.step(2002)
    notes = [e.text for e in rig.effects if isinstance(e, Note) and "LoadWeights" in e.text]
    assert notes[1].startswith("W0-GPU0 LoadWeights errors=0 profiled=8ms min=8ms")


def test_a_worker_that_comes_back_is_stressed_again() -> None:
    profile = load_profile("v100")
    simulation = stressed(profile, gpus=(1, 2), noise=EmulationNoise(seed=1, exec_sigma=0.1))
    simulation.kill_worker(1)
    simulation.run_until(simulation.now_ns + NS_PER_S)
    assert len(gpus_of(simulation)) == 1
    simulation.start_worker(1, WorkerNode(profile, 2, incarnation=900))
    simulation.run_until(simulation.now_ns + NS_PER_S)
    assert len(gpus_of(simulation)) == 3
    assert all(len(g.loading) == 2 and len(g.exec.outstanding) == 2 for g in gpus_of(simulation))
    assert len(simulation.scheduler.cluster.models) == 40
