"""The three golden simulated runs, and the one command that makes them anew:

    .venv/bin/python tests/golden_runs.py

Their logs are committed under tests/golden/. A change that is meant to keep decisions as they are must
keep every byte; one that means to change them makes them anew and says so.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slosched.config import EmulationNoise, SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.network import Network
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec, WorkerClocks
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US
from slosched.workloads import Workload, parse_workload
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.streams import ClosedLoop

GOLDEN = Path(__file__).parent / "golden"
LOGS = ("clockwork_request_log.tsv", "clockwork_action_log.tsv", "client_log.tsv")
MS, US = NS_PER_MS, NS_PER_US


@dataclass(frozen=True)
class TakingTurns:
    """Two closed loops take five copies in turn where a GPU holds two: most requests find none."""

    copies: int = 5
    name: str = "taking-turns"
    duration_ns: int = 2 * NS_PER_S
    groups: tuple[str, ...] = ("",)

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse("resnet50_v2", self.copies),)

    def steps(self) -> tuple[Step, ...]:
        return (Step(0, 0, slo_ns=100 * MS),)

    def streams(self, seed: int) -> Sequence[ClosedLoop]:
        return [ClosedLoop(1, (0, 1, 2), user_id=0), ClosedLoop(1, (3, 4), user_id=1)]

    def describe(self) -> str:
        return f"{self.name}: closed loops over {self.copies} copies"


def slo_exp_1(values: str) -> Workload:
    return parse_workload("slo-exp-1", values.split())


def sweep(values: str) -> SimSpec:
    """A sweep on two GPUs, with every invariant checked."""
    return SimSpec(
        workload=slo_exp_1(values),
        scheduler=SchedulerConfig(schedule_ahead_ns=5 * MS),
        profiles=(load_profile("v100"),),
        gpus=2,
        check=True,
    )


def golden_specs() -> dict[str, SimSpec]:
    """The runs by name."""
    plain = sweep("resnet50_v2 3 poisson 800 1.5 3.4 1.5 mul 0.15")
    small = replace(
        load_profile("v100"), weights_cache_bytes=16 * 16 * 2**20
    )  # two models and a bit
    return {
        "slo-exp-1": replace(plain, seed=1),
        "cold-closed-loops": replace(plain, workload=TakingTurns(), profiles=(small,), gpus=1),
        "noise-and-jitter": replace(
            sweep("resnet50_v2 3 poisson 800 3.4 7.7 1.5 mul 0.15"),
            seed=3,
            gpus_per_worker=2,
            inputs=True,
            network=Network(jitter_ns=50 * US, bandwidth_bits_per_s=10**10),
            noise=EmulationNoise(
                exec_sigma=0.03,
                stall_probability=0.02,
                stall_ns=8 * MS,
                pcie_bytes_per_s=12_300_000_000,
                pcie_shared=True,
            ),
            clocks=WorkerClocks(offset_ns=20 * MS, drift_ppm=50.0),
        ),
    }


def make_anew() -> None:
    """Run all three and put their logs under tests/golden/."""
    for name, spec in golden_specs().items():
        with tempfile.TemporaryDirectory() as folder:
            result = simulate(spec, out=Path(folder) / "run")
            assert result.run_dir is not None
            target = GOLDEN / name
            target.mkdir(exist_ok=True)
            for log in LOGS:
                shutil.copyfile(result.run_dir / log, target / log)
        rows = [len((target / log).read_text().splitlines()) - 1 for log in LOGS]
        sys.stdout.write(f"{name}: {rows} rows, {100 * result.satisfaction:.2f} % in time\n")


if __name__ == "__main__":
    make_anew()
