"""What INFER5 promises, whatever arrives: held at every decision of random clusters in virtual time."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slosched.config import EmulationNoise, SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.scheduler.interface import Effect, ToWorker
from slosched.core.scheduler.state import ActionState, Gpu
from slosched.messages import Infer
from slosched.sim.harness import Demand, Network, Simulation
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

SLOS_MS = (4.0, 6.0, 10.0, 25.0, 100.0)


class Witness:
    """Looks at a simulation's scheduler after each of its decisions."""

    def __init__(self, simulation: Simulation) -> None:
        self.scheduler = simulation.scheduler
        self.sent = self.behind_another = 0
        self._decide = self.scheduler.schedule
        self.scheduler.schedule = self._schedule  # type: ignore[method-assign]

    def _schedule(self, *, now_ns: int) -> list[Effect]:
        effects = self._decide(now_ns=now_ns)
        for effect in effects:
            if isinstance(effect, ToWorker) and isinstance(effect.message, Infer):
                self._promised(self.scheduler.cluster.actions[effect.message.action_id])
        for gpu in self.scheduler.cluster.gpus.values():
            if not gpu.exec.outstanding:
                self._not_idle_for_nothing(gpu, now_ns)
        return effects

    def _promised(self, action: ActionState) -> None:
        """Every member can be in time: with margins, or one request alone on an idle GPU likely."""
        self.sent += 1
        gpu, worker = action.gpu, action.gpu.worker
        first_ns = min(r.deadline_ns for r in action.requests)
        estimator = gpu.exec_table(action.queue).estimators[action.batch_class]
        before = [a for a in gpu.exec.outstanding if a.action_id < action.action_id]
        if not before and len(action.requests) == 1:
            likely_ns = action.sent_ns + worker.transit.expected_ns + estimator.expected_ns
            assert likely_ns + worker.returns.expected_ns <= first_ns
            return
        spare_ns = estimator.margin_ns - estimator.expected_ns
        if before:
            self.behind_another += 1
            spare_ns = math.isqrt(spare_ns**2 + before[-1].spread_ns ** 2)
        assert action.expected_end_ns + spare_ns + worker.returns.margin_ns <= first_ns

    def _not_idle_for_nothing(self, gpu: Gpu, now_ns: int) -> None:
        """Nothing waits that this idle GPU could run in time."""
        soonest_ns = now_ns + gpu.worker.transit.expected_ns + gpu.worker.returns.expected_ns
        for model in gpu.resident.values():
            if model.queue.requests:
                needs_ns = gpu.exec_table(model.queue).single.expected_ns
                assert model.queue.requests[-1].deadline_ns < soonest_ns + needs_ns


def world(draw: Any) -> tuple[Simulation, list[Demand], int]:
    """A cluster with some models resident everywhere, and what clients will request."""
    gpus = draw(st.sampled_from([(1,), (3,), (1, 1), (2, 2)]))
    copies = draw(st.integers(1, 6))
    noise = EmulationNoise(
        seed=draw(st.integers(0, 99)),
        exec_sigma=draw(st.sampled_from([0.0, 0.01, 0.05])),
        stall_probability=draw(st.sampled_from([0.0, 0.01])),
        stall_ns=5 * NS_PER_MS,
    )
    network = Network(jitter_ns=draw(st.sampled_from([0, 30 * NS_PER_US])))
    simulation = Simulation(
        SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS, max_batch=16),
        load_profile("v100"),
        gpus_per_worker=gpus,
        network=network,
        noise=noise,
    )
    random = Random(draw(st.integers(0, 10**6)))
    rate = sum(gpus) * draw(st.sampled_from([100, 400, 900, 3000]))
    slos_ms = draw(st.lists(st.sampled_from(SLOS_MS), min_size=1, max_size=3))
    demands, at_s = [], random.expovariate(rate)
    while at_s < 0.25:
        slo_ns = round(random.choice(slos_ms) * NS_PER_MS)
        demands.append(Demand(round(at_s * NS_PER_S), random.randrange(copies), slo_ns=slo_ns))
        at_s += random.expovariate(rate)
    return simulation, demands, copies


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_promises_hold_and_no_gpu_is_idle_for_nothing(data: st.DataObject) -> None:
    simulation, demands, copies = world(data.draw)
    models = simulation.load("resnet50", copies)
    simulation.run_until(simulation.now_ns + NS_PER_S // 2)
    witness = Witness(simulation)
    outcome = simulation.run(models, demands)
    # Each was decided once: the invariants of the run say so at each step; here that all were.
    assert len(outcome.requests) == len(demands)
    # And every answer with code 0 came from an action that was looked at.
    assert witness.sent >= len(
        {(r.gpu_id, r.departure_ns) for r in outcome.requests if r.code == 0}
    )


def test_the_witness_sees_what_it_is_there_for() -> None:
    """Both kinds of promises are looked at, and a broken one is noticed."""
    simulation = Simulation(
        SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS), load_profile("v100"), gpus_per_worker=(1,)
    )
    models = simulation.load("resnet50")
    witness = Witness(simulation)
    simulation.run(models, [Demand(i * NS_PER_MS, 0, slo_ns=30 * NS_PER_MS) for i in range(40)])
    assert witness.sent > 5 and witness.behind_another > 2
    gpu = simulation.scheduler.cluster.gpus[0]
    model = next(iter(gpu.resident.values()))
    waiting = type("Waiting", (), {"deadline_ns": simulation.now_ns + NS_PER_S})()
    model.queue.requests.append(waiting)
    try:
        witness._not_idle_for_nothing(gpu, simulation.now_ns)
    except AssertionError:
        noticed = True
    else:
        noticed = False
    assert noticed
