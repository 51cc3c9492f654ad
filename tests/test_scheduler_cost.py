"""What a decision of INFER5 costs, in things looked at and not in time: it must not grow with the cluster."""

from __future__ import annotations

import math
import random

import pytest

from slosched.config import EmulationNoise, GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.scheduler.placement.gain import GainPlacement
from slosched.core.scheduler.policies.infer5 import Infer5
from slosched.sim.harness import Demand, Outcome, Simulation
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
PAGE = 2**24


def profile(copies: int) -> GpuProfile:
    """One model of 2.6 ms (batches as ResNet-50's) and a GPU that holds `copies` of it."""
    exec_ns = {1: 2_600_000, 2: 3_800_000, 4: 5_600_000, 8: 9_100_000}
    model = ModelProfile("net", exec_ns, weights_ns=50_000, weights_bytes=PAGE)
    return GpuProfile("gpu", {"net": model}, weights_cache_bytes=copies * PAGE, page_bytes=PAGE)


def policy_of(simulation: Simulation) -> Infer5:
    policy = simulation.scheduler.policy
    assert isinstance(policy, Infer5)
    return policy


def simulated(
    gpus: int, copies: int, rate: float, slo_ms: tuple[float, float], count: int, max_batch: int = 8
) -> tuple[Infer5, Outcome]:
    """`count` Poisson arrivals over all copies, everything resident; the costs of these alone."""
    simulation = Simulation(
        SchedulerConfig(max_batch=max_batch, max_gpus=gpus),
        profile(copies),
        gpus_per_worker=(1,) * gpus,
        noise=EmulationNoise(exec_sigma=0.01),
        check=False,
    )
    models = simulation.load("net", copies)
    chance = random.Random(1)
    demands, at_ns = [], 0.0
    for _ in range(count):
        at_ns += chance.expovariate(rate) * NS_PER_S
        slo_ns = round(chance.uniform(*slo_ms) * MS)
        demands.append(Demand(round(at_ns), chance.randrange(copies), slo_ns=slo_ns))
    policy = policy_of(simulation)
    policy.gpus_looked_at = policy.gpus_asked = policy.batches.models_looked_at = 0
    simulation.outcome = Outcome()
    return policy, simulation.run(models, demands, settle_ns=5 * NS_PER_S)


@pytest.mark.parametrize("max_batch", [1, 8])
def test_models_looked_at_grow_no_faster_than_the_logarithm_of_those_that_wait(
    max_batch: int,
) -> None:
    """Twice what two GPUs can do: the queues are full all the time, with more models longer."""
    looked_at = {}
    for copies in (10, 200, 4000):
        # A request waits about one SLO, so this many wait at a time: one or two for each model.
        rate = 1600.0 * (2 if max_batch == 8 else 1)
        slo_ms = copies * 1.5 / rate * 1000
        policy, _ = simulated(
            2, copies, rate, (max(8.0, slo_ms / 2), max(12.0, slo_ms)), 2000, max_batch
        )
        looked_at[copies] = policy.batches.models_looked_at / policy.gpus_asked
    for copies, average in looked_at.items():
        assert average <= 4 * math.log2(copies), looked_at


@pytest.mark.parametrize(
    ("rate_per_gpu", "slo_ms"),
    # A quiet cluster; a busy one; overload with little time; what is mostly hopeless from the start (a
    # request takes 3 ms there and back).
    [(100, (20, 30)), (330, (8, 30)), (900, (6, 20)), (300, (2.5, 3.05))],
)
def test_gpus_looked_at_do_not_grow_with_the_cluster(
    rate_per_gpu: float, slo_ms: tuple[float, float]
) -> None:
    asked, looked_at = {}, {}
    for gpus in (6, 25, 150):
        count = 40 * gpus + 400
        policy, _ = simulated(gpus, 12, rate_per_gpu * gpus, slo_ms, count)
        asked[gpus] = policy.gpus_asked / count
        looked_at[gpus] = policy.gpus_looked_at / count
    assert max(asked.values()) <= 2, asked
    assert looked_at[150] <= 2 * looked_at[6] + 4, looked_at
    assert looked_at[150] <= 16, looked_at


def test_wishes_and_victims_do_not_grow_with_the_models() -> None:
    """Memory for a quarter of the models, and more wanted than PCIe can load."""
    tried, looked_at = {}, {}
    for copies in (40, 400, 1600):
        exec_ns = {1: 2_600_000, 2: 3_800_000, 4: 5_600_000, 8: 9_100_000}
        net = ModelProfile("net", exec_ns, weights_ns=8 * MS, weights_bytes=PAGE)
        few = GpuProfile(
            "few", {"net": net}, weights_cache_bytes=copies // 8 * PAGE, page_bytes=PAGE
        )
        simulation = Simulation(SchedulerConfig(), few, gpus_per_worker=(1, 1), check=False)
        models = simulation.load("net", copies)
        placement = policy_of(simulation)._placement
        assert isinstance(placement, GainPlacement)
        simulation.run_until(simulation.now_ns + copies * 20 * MS)
        placement.wishes_tried = placement.victims_looked_at = 0
        chance, at_ns, demands = random.Random(1), 0.0, []
        for _ in range(1500):
            at_ns += chance.expovariate(600) * NS_PER_S
            slo_ns = chance.choice((9, 25, 50)) * MS
            demands.append(Demand(round(at_ns), chance.randrange(copies), slo_ns=slo_ns))
        outcome = simulation.run(models, demands)
        assert 0.2 < outcome.satisfaction() < 0.9
        tried[copies] = placement.wishes_tried / 1500
        looked_at[copies] = placement.victims_looked_at / max(1, placement.wishes_tried)
    assert max(tried.values()) <= 2, tried
    assert max(looked_at.values()) <= 2 * 64, looked_at
