"""Simulated runs that reports are made of: a sweep, and an overloaded mix of more models than fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slosched.config import EmulationNoise, SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.network import Network
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US
from slosched.workloads import Workload, parse_workload
from slosched.workloads.mix import MixEntry, mix

_NOISE = EmulationNoise(exec_sigma=0.02, stall_probability=0.002, stall_ns=15 * NS_PER_MS)
_NETWORK = Network(jitter_ns=100 * NS_PER_US)


def sweep_run(directory: Path) -> Path:
    """Six steps of the SLO, from impossible to easy, on two noisy GPUs."""
    words = ["resnet50_v2", "3", "poisson", "500", "1", "10", "1.6", "mul", "1"]
    simulate(_spec(parse_workload("slo-exp-1", words)), out=directory)
    return directory


def mix_run(directory: Path) -> Path:
    """Sixty models of which a GPU holds a few, and twice the requests that two GPUs can serve."""
    entries = [MixEntry("resnet50_v2", 60, 1_800.0, (0.0, 40 * NS_PER_MS))]
    # Room for some twenty of them.
    small = replace(load_profile("v100"), weights_cache_bytes=140 * 16 * 2**20)
    simulate(replace(_spec(mix(entries, 2 * NS_PER_S)), profiles=(small,)), out=directory)
    return directory


def _spec(workload: Workload) -> SimSpec:
    return SimSpec(
        workload=workload,
        scheduler=SchedulerConfig(),
        profiles=(load_profile("v100"),),
        gpus=2,
        noise=_NOISE,
        network=_NETWORK,
    )
