"""What interrupting long inferences is worth, in virtual time: the same requests with it and without.

    .venv/bin/python benchmarks/preemption.py            # writes preemption.md beside this file
    .venv/bin/python benchmarks/preemption.py --quick    # does it work? figures mean little

Each cell is one mix of short and long models at a load (of the GPU time, one request at a time), simulated with
the same seed under INFER5 with and without --preempt, EDF and FIFO; the bound is the capacity bound of
slosched.bound, which no schedule exceeds. Shares are the controller's, p99 the client's latency.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from slosched.bound.capacity import capacity_bound
from slosched.bound.problem import Cluster, cells_of
from slosched.config import SchedulerConfig
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.output_files import write_file
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.mix import MixEntry, mix

PAGE = Path(__file__).parent / "preemption.md"
LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
#: (TYPE, preempt), in the order of the columns.
RUNS = (("INFER5", False), ("INFER5", True), ("EDF", False), ("FIFO", False))


@dataclass(frozen=True)
class Class:
    """One model: batch-1 time, what each further request of a batch adds to it, SLO, part of the load."""

    name: str
    b1_ms: float
    each_more: float
    slo_ms: float
    part: float

    @property
    def model(self) -> ModelProfile:
        times = {
            batch: round(self.b1_ms * NS_PER_MS * (1 + (batch - 1) * self.each_more))
            for batch in (1, 2, 4, 8, 16)
        }
        return ModelProfile(self.name, times, 20 * NS_PER_MS, 100 * 2**20)


@dataclass(frozen=True)
class Mix:
    """Some classes, and the batch-1 time up to which one is urgent."""

    title: str
    classes: tuple[Class, ...]
    urgent_at_most_ms: float = 5.0

    @property
    def profile(self) -> GpuProfile:
        return GpuProfile(
            "mix",
            {each.name: each.model for each in self.classes},
            weights_cache_bytes=8 * 2**30,
            urgent_at_most_ns=round(self.urgent_at_most_ms * NS_PER_MS),
        )


def two_classes(part: float) -> Mix:
    short, long = round(100 * part), round(100 - 100 * part)
    return Mix(
        f"short (2 ms, SLO 10 ms) and long (50 ms, SLO 250 ms), {short}:{long} of the GPU time",
        (Class("short", 2, 0.6, 10, part), Class("long", 50, 0.6, 250, 1 - part)),
    )


MIXES = (
    two_classes(0.9),
    two_classes(0.5),
    Mix(
        "ResNet-50 (0.88 ms, SLO 10 ms), ViT-L (9 ms, SLO 80 ms) and a model of 200 ms (SLO 1 s), a third each",
        (
            Class("resnet50", 0.88, 0.1, 10, 1 / 3),
            Class("vit_l", 9, 0.25, 80, 1 / 3),
            Class("huge", 200, 0.9, 1000, 1 / 3),
        ),
        urgent_at_most_ms=15.0,
    ),
)


@dataclass(frozen=True)
class Cell:
    mix: Mix
    gpus: int
    load: float
    seconds: int

    def spec(self, policy: str, preempt: bool) -> SimSpec:
        entries = [
            MixEntry(
                each.name,
                1,
                self.gpus * self.load * each.part * 1000 / each.b1_ms,
                (0.0, round(each.slo_ms * NS_PER_MS)),
            )
            for each in self.mix.classes
        ]
        return SimSpec(
            workload=mix(entries, self.seconds * NS_PER_S),
            scheduler=SchedulerConfig(policy=policy, max_exec_ns=10 * NS_PER_S, preempt=preempt),
            profiles=(self.mix.profile,),
            gpus=self.gpus,
        )


def measured(job: tuple[Cell, str, bool]) -> list[str]:
    """The text of each class of the cell: the share in time, and p99."""
    cell, policy, preempt = job
    steps = {each.group: each for each in simulate(cell.spec(policy, preempt)).steps}
    texts = []
    for each in cell.mix.classes:
        step = steps[each.name]
        p99 = f"{step.latency_p99_ns / NS_PER_MS:.1f}" if step.latency_p99_ns else "-"
        texts.append(f"{100 * step.met / max(1, step.sent):.2f} ({p99})")
    return texts


def bound(cell: Cell) -> float:
    """The share of all requests that no schedule exceeds."""
    spec = cell.spec("INFER5", True)
    network = spec.network
    cluster = Cluster(
        spec.profiles * spec.gpus,
        network.to_worker_ns,
        network.from_worker_ns,
        spec.scheduler.default_slo_ns,
        preempt=True,
    )
    (problem,) = cells_of(spec.workload, cluster)
    return capacity_bound(problem.problem) / problem.requests


def rows(cells: list[Cell], found: dict[tuple[Cell, str, bool], list[str]]) -> Iterator[str]:
    for cell in cells:
        most = f"{100 * bound(cell):.1f}"
        for place, each in enumerate(cell.mix.classes):
            values = [found[cell, policy, preempt][place] for policy, preempt in RUNS]
            head = f"{cell.load:g}" if not place else ""
            yield f"| {head} | {each.name} | {' | '.join(values)} | {'' if place else most} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two loads, one second each")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    loads, seconds = ((0.5, 1.2), 1) if options.quick else (LOADS, 12)
    cells = [Cell(m, g, load, seconds) for m in MIXES for g in (1, 6) for load in loads]
    jobs = [(cell, policy, preempt) for cell in cells for policy, preempt in RUNS]
    found = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for done, (job, texts) in enumerate(zip(jobs, pool.map(measured, jobs), strict=True), 1):
            found[job] = texts
            print(f"\r{done} of {len(jobs)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    lines = [
        "# What interrupting long inferences is worth",
        "",
        "Written by [preemption.py](preemption.py): simulated, seed 0, "
        f"{seconds} s a cell. Per cent of the requests in time (controller), and p99 of the latency in ms. "
        "Boundaries are 0.3 ms apart and cost nothing; the bound is of all requests together.",
    ]
    for each in MIXES:
        for gpus in (1, 6):
            chosen = [cell for cell in cells if cell.mix is each and cell.gpus == gpus]
            lines += ["", f"## {each.title}, {gpus} GPU{'s' if gpus > 1 else ''}", ""]
            lines += [
                "| load | model | INFER5 | INFER5 --preempt | EDF | FIFO | bound |",
                "| --: | :-- | --: | --: | --: | --: | --: |",
                *rows(chosen, found),
            ]
    write_file(options.out, ("\n".join(lines) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
