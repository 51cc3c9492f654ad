"""INFER4, SMART, DIRECT and STRESS in virtual time: the invariants whatever happens, the same bytes always."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slosched.config import EmulationNoise, GpuProfile, ModelProfile, SchedulerConfig
from slosched.sim.harness import Demand, Simulation
from slosched.sim.node import WorkerNode
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.slo_exp_1 import parse_slo_exp_1

MS = NS_PER_MS
TYPES = ("INFER4", "SMART", "DIRECT", "STRESS")
NAME = "resnet50"  # the one that STRESS runs


def profile_of(pages: int) -> GpuProfile:
    model = ModelProfile(NAME, {1: 2 * MS, 2: 3 * MS, 4: 5 * MS}, 4 * MS, 2**24)
    return GpuProfile("tiny", {NAME: model}, weights_cache_bytes=pages * 2**24)


def poisson(copies: int, rate: float, factor: float, seed: int) -> list[Demand]:
    spec = parse_slo_exp_1(f"net {copies} poisson {rate} {factor} {factor} 2 mul 1".split())
    return [Demand(a.at_ns, a.user_id, a.slo_factor, a.slo_ns) for a in spec.arrivals(seed)]


@settings(
    max_examples=20,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    policy=st.sampled_from(TYPES),
    gpus=st.lists(st.integers(1, 2), min_size=1, max_size=2),
    copies=st.integers(1, 6),
    pages=st.integers(1, 8),
    rate=st.integers(50, 2000),
    factor=st.sampled_from([2.0, 5.0, 40.0]),
    sigma=st.sampled_from([0.0, 0.1]),
    kill_at_ms=st.one_of(st.none(), st.integers(0, 400)),
    seed=st.integers(0, 3),
)
def test_the_invariants_hold_whatever_happens(
    policy: str,
    gpus: list[int],
    copies: int,
    pages: int,
    rate: int,
    factor: float,
    sigma: float,
    kill_at_ms: int | None,
    seed: int,
) -> None:
    profile = profile_of(pages)
    noise = EmulationNoise(
        seed=seed, exec_sigma=sigma, stall_probability=sigma / 10, stall_ns=20 * MS
    )
    config = SchedulerConfig(policy=policy)
    simulation = Simulation(config, profile, gpus_per_worker=tuple(gpus), noise=noise)
    models = simulation.load(NAME, copies)
    if kill_at_ms is not None:
        at_ns = simulation.now_ns + kill_at_ms * MS
        simulation.at(at_ns, lambda: simulation.kill_worker(0))
        simulation.at(
            at_ns + 1500 * MS,
            lambda: simulation.start_worker(0, WorkerNode(profile, gpus[0], incarnation=777)),
        )
    demands = poisson(copies, rate, factor, seed)[:200]
    outcome = simulation.run(models, demands, settle_ns=2 * NS_PER_S)
    assert len(outcome.requests) == simulation.scheduler.arrived == len(demands)
    if policy == "STRESS":
        assert {r.code for r in outcome.requests} <= {6}


def digest() -> str:
    """A fingerprint of everything that a run of each TYPE writes."""
    noise = EmulationNoise(seed=3, exec_sigma=0.03, stall_probability=0.01, stall_ns=5 * MS)
    lines: list[str] = []
    for policy in TYPES:
        simulation = Simulation(
            SchedulerConfig(policy=policy), profile_of(4), gpus_per_worker=(2, 1), noise=noise
        )
        models = simulation.load(NAME, 5)
        outcome = simulation.run(models, poisson(5, 600, 20.0, 1)[:150], settle_ns=NS_PER_S // 3)
        lines += map(repr, [*outcome.requests, *outcome.actions, *outcome.notes])
    assert len(lines) > 800
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_same_run_gives_the_same_bytes_under_any_hash_seed() -> None:
    program = "from test_scheduler_types import digest; print(digest())"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "tests:src"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
        for seed in ("0", "4242")
    }
    assert found == {digest()}
