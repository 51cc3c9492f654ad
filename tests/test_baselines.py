"""The baselines as whole clusters in virtual time: against what is known of each, and against INFER5."""

from __future__ import annotations

from functools import cache

import pytest

from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.harness import Demand, Outcome, Simulation
from slosched.units import NS_PER_S
from test_sim_clusters import FIG7, MS, poisson

BASELINES = ("FIFO", "EDF", "REJECT", "AIMD")
#: Points by which a baseline may come out ahead of INFER5 in one short run.
MARGIN = 0.5

#: Capacity is 2,069/s at batch 1 and 4,615/s at batch 8.
Cell = tuple[str, float, float]  # (popularity, rate, SLO factor)
LIGHT: list[Cell] = [("even", 600, 1.5), ("even", 600, 2.25)]
HEAVY: list[Cell] = [("even", 2400, 1.5), ("even", 2400, 2.25), ("even", 2400, 5.0625)]
SKEWED: list[Cell] = [("skewed", 2400, 3.375)]


def demands(popularity: str, rate: float, factor: float, seconds: int) -> list[Demand]:
    """Twelve models: all alike, or one with half of the requests and eleven with the rest."""
    if popularity == "even":
        return poisson(12, rate, factor, seconds)
    hot = poisson(1, rate / 2, factor, seconds)
    cold = poisson(11, rate / 2, factor, seconds, seed=2)
    cold = [Demand(d.at_ns, d.index + 1, d.slo_factor, d.slo_ns) for d in cold]
    return sorted([*hot, *cold], key=lambda d: d.at_ns)


@cache
def satisfaction(policy: str, cell: Cell) -> float:
    """Per cent in time on six GPUs of profile fig7, everything resident and known exactly."""
    config = SchedulerConfig(
        policy=policy, schedule_ahead_ns=5 * MS, max_batch=8, max_exec_ns=NS_PER_S
    )
    seconds = 1 if cell[0] == "skewed" else 2
    simulation = Simulation(config, load_profile("fig7"), network=FIG7, check=False)
    models = simulation.load("resnet50", 12)
    simulation.run(models, [Demand(i * 3 * MS, i % 12, 0.0, NS_PER_S) for i in range(240)])
    simulation.outcome = Outcome()
    outcome = simulation.run(models, demands(*cell, seconds), settle_ns=5 * NS_PER_S)
    return 100 * outcome.satisfaction()


@pytest.mark.parametrize(
    "cell", [*LIGHT, *HEAVY, *SKEWED], ids=lambda cell: "-".join(map(str, cell))
)
def test_no_baseline_is_ahead_of_infer5(cell: Cell) -> None:
    ours = satisfaction("INFER5", cell)
    ahead = {p: satisfaction(p, cell) for p in BASELINES if satisfaction(p, cell) > ours + MARGIN}
    assert not ahead, f"INFER5 has {ours:.2f} %"


@pytest.mark.parametrize(
    ("rate", "factor", "expected"),
    # From a separate model of the same rule, six GPUs and twelve models.
    [(1200, 1.5, 94.2), (2400, 1.5, 71.6), (2400, 2.25, 84.1), (2400, 5.0625, 86.5)],
)
def test_reject_serves_what_batch_1_can(rate: float, factor: float, expected: float) -> None:
    assert satisfaction("REJECT", ("even", rate, factor)) == pytest.approx(expected, abs=3)


def test_under_overload_each_baseline_fails_in_its_own_way() -> None:
    """2,400/s are more than batch 1 can serve, and less than batch 8 can."""
    reject, edf, fifo, aimd = (
        satisfaction(policy, ("even", 2400, 2.25)) for policy in ("REJECT", "EDF", "FIFO", "AIMD")
    )
    assert reject > 80, "it refuses what is too much and is in time with the rest"
    assert edf < 30, "it starts what ends too late, and then all is late"
    assert edf < fifo < reject, "batches help, until queues are longer than the SLO"
    assert aimd < fifo, "its batches must grow first, and shrink at each SLO that is broken"
    # With time for large batches both batching ones keep up, and neither batch-1 one does.
    assert satisfaction("FIFO", ("even", 2400, 5.0625)) > 95
    assert satisfaction("EDF", ("even", 2400, 5.0625)) < 50


def tiny(policy: str, *, pages: int) -> Simulation:
    """One GPU, models of one page that take 2 ms (batch 4: 5 ms) and 4 ms to load."""
    net = ModelProfile("net", {1: 2 * MS, 2: 3 * MS, 4: 5 * MS}, 4 * MS, 2**24)
    profile = GpuProfile("tiny", {"net": net}, weights_cache_bytes=pages * 2**24)
    return Simulation(SchedulerConfig(policy=policy), profile, gpus_per_worker=(1,))


@pytest.mark.parametrize("policy", ["FIFO", "AIMD"])
def test_without_deadlines_a_model_that_nobody_makes_room_for_gets_its_turn(policy: str) -> None:
    """One page, and the model on it asked for more than the GPU can serve."""
    simulation = tiny(policy, pages=1)
    models = simulation.load("net", 2)
    busy = [Demand(i * MS, 0, 0.0, 60 * NS_PER_S) for i in range(2500)]
    waits = Demand(100 * MS, 1, 0.0, 60 * NS_PER_S)
    arrivals = sorted([*busy, waits], key=lambda d: d.at_ns)
    outcome = simulation.run(models, arrivals, settle_ns=20 * NS_PER_S)
    assert {r.code for r in outcome.requests} == {0}
    (other,) = [r for r in outcome.requests if r.model_id == models[1].model_id]
    # After a second of patience, and what runs, the swap and the tick that finds it come on top.
    assert NS_PER_S < other.departure_ns - other.arrival_ns < 1.25 * NS_PER_S


@pytest.mark.parametrize("policy", BASELINES)
def test_more_models_than_fit_are_all_served(policy: str) -> None:
    simulation = tiny(policy, pages=2)
    models = simulation.load("net", 5)
    arrivals = [Demand(i * 8 * MS, (i // 25) % 5, 0.0, 60 * MS) for i in range(500)]
    outcome = simulation.run(models, arrivals, settle_ns=20 * NS_PER_S)
    assert outcome.satisfaction() > 0.98
    assert sum(r.cold for r in outcome.requests) >= 10
