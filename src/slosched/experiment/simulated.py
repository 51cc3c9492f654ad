"""The runs of an experiment in virtual time; complete ones of the same spec, code and files are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from slosched.config import EmulationNoise
from slosched.config_file import load_profile
from slosched.experiment.figures import Part
from slosched.loadgen.results import RunResult
from slosched.sim.jobs import Job, JobsProgress, finished_run, run_many
from slosched.sim.network import Network
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_US
from slosched.workloads import parse_workload

#: What every simulated run has: cards of 10 Gbit/s as on the published testbed, 0.2 ms and a little
#: each way, and execs that vary by about 0.3 %. The last two are assumptions.
NETWORK = Network(jitter_ns=20 * NS_PER_US, bandwidth_bits_per_s=10**10)
NOISE = EmulationNoise(exec_sigma=0.003)


def spec_of(part: Part) -> SimSpec:
    """The simulation of a run."""
    name, *values = part.words
    return SimSpec(
        workload=parse_workload(name, values),
        scheduler=part.scheduler,
        profiles=(load_profile(part.profile),),
        gpus=part.gpus,
        network=NETWORK,
        noise=NOISE,
        seed=part.seed,
        duration_ns=part.duration_ns,
        inputs=part.inputs,
    )


def simulate_parts(
    parts: Sequence[Part], out: Path, *, processes: int, show: Callable[[str], None]
) -> tuple[list[RunResult], int]:
    """Simulate each part in a folder of `out` that has its name; return the results and how many were there.

    Raises what `run_many` raises.
    """
    jobs = [Job(spec_of(part), out / part.name) for part in parts]
    reused = sum(finished_run(job) is not None for job in jobs)
    announced: set[int] = set()

    def announce(progress: JobsProgress) -> None:
        for place, run in progress.running.items():
            if place not in announced:
                announced.add(place)
                show(f"{parts[place].name}: {run.total_s:.0f} s to simulate")

    return run_many(jobs, processes=processes, progress=announce), reused
