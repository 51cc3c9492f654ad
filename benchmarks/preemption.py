"""What interrupting long inferences is worth, in virtual time: the same requests with it and without.

    .venv/bin/python benchmarks/preemption.py            # writes preemption.md beside this file
    .venv/bin/python benchmarks/preemption.py --quick    # does it work? figures mean little

Each cell is one mix of short and long models at a load (of the GPU time, one request at a time), simulated with
the same seed under INFER5 with and without --preempt, EDF and FIFO; the bound is the capacity bound of
slosched.bound, which no schedule exceeds. Shares are the controller's, p99 the client's latency. Under overload
the GPU time of each class is shown as well, with weights of clients, as values and as shares.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slosched.bound.capacity import capacity_bound
from slosched.bound.problem import Cluster, cells_of
from slosched.codes import ActionType
from slosched.config import SchedulerConfig
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.loadgen.results import RunResult
from slosched.output_files import write_file
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry import action_log
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.mix import MixEntry, mix

PAGE = Path(__file__).parent / "preemption.md"
LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
#: (TYPE, preempt), in the order of the columns.
RUNS = (("INFER5", False), ("INFER5", True), ("EDF", False), ("FIFO", False))
#: Weights of the clients of short and long requests, under twice and three times what one GPU can do.
WEIGHTS = ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0))
OVERLOADS = (2.0, 3.0)


@dataclass(frozen=True)
class Class:
    """One model: batch-1 time, what each further request of a batch adds to it, SLO, part of the load."""

    name: str
    b1_ms: float
    each_more: float
    slo_ms: float
    part: float
    #: Measured exec times, ns, by batch size; they take the place of the two above.
    measured_ns: tuple[tuple[int, int], ...] = ()

    @property
    def model(self) -> ModelProfile:
        times = dict(self.measured_ns) or {
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
    boundary_ns: int = 300_000

    @property
    def profile(self) -> GpuProfile:
        return GpuProfile(
            "mix",
            {each.name: each.model for each in self.classes},
            weights_cache_bytes=8 * 2**30,
            urgent_at_most_ns=round(self.urgent_at_most_ms * NS_PER_MS),
            boundary_ns=self.boundary_ns,
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
    #: How weights of clients count ("": there are none), and those of the classes.
    counts_as: str = ""
    weights: tuple[float, ...] = ()

    def spec(self, policy: str, preempt: bool) -> SimSpec:
        entries = [
            MixEntry(
                each.name,
                1,
                self.gpus * self.load * each.part * 1000 / each.b1_ms,
                (0.0, round(each.slo_ms * NS_PER_MS)),
                client=each.name if self.weights else "",
                weight=weight,
            )
            for each, weight in zip(
                self.mix.classes, self.weights or [1.0] * len(self.mix.classes), strict=True
            )
        ]
        return SimSpec(
            workload=mix(entries, self.seconds * NS_PER_S),
            scheduler=SchedulerConfig(
                policy=policy,
                max_exec_ns=10 * NS_PER_S,
                preempt=preempt,
                client_weights=self.counts_as or "value",
                max_client_weight=100.0,
            ),
            profiles=(self.mix.profile,),
            gpus=self.gpus,
        )


def measured(job: tuple[Cell, str, bool]) -> list[str]:
    """The text of each class of the cell: the share in time, and p99."""
    cell, policy, preempt = job
    return texts_of(simulate(cell.spec(policy, preempt)), cell.mix)


def texts_of(result: RunResult, classes: Mix) -> list[str]:
    """The share in time of each class by the controller, and p99, of a run in virtual time or a live one."""
    steps = {each.group: each for each in result.steps}
    texts = []
    for each in classes.classes:
        step = steps.get(each.name)
        if step is None or not step.sent:
            texts.append("-")
            continue
        p99 = f"{step.latency_p99_ns / NS_PER_MS:.1f}" if step.latency_p99_ns else "-"
        texts.append(f"{100 * step.met / step.sent:.2f} ({p99})")
    return texts


def gpu_time(job: tuple[Cell, bool]) -> list[float]:
    """The part of the GPU time that was spent on answers in time, of each class; and on late ones, of all."""
    cell, preempt = job
    with tempfile.TemporaryDirectory() as directory:
        run = simulate(cell.spec("INFER5", preempt), out=Path(directory) / "run")
        assert run.run_dir is not None
        log = action_log.read_action_log(Path(run.run_dir) / action_log.FILE_NAME)
    infers = log["action_type"] == int(ActionType.INFER)
    whole_ns = cell.gpus * cell.seconds * NS_PER_S
    # A controller numbers the instances in the order of the classes.
    parts = [
        float(log["goodput"][infers & (log["model_id"] == model)].sum()) / whole_ns
        for model in np.unique(log["model_id"][infers])
    ]
    return [*parts, float(log["worker_exec_duration"][infers].sum()) / whole_ns - sum(parts)]


def weighted(cells: list[Cell], found: dict[tuple[Cell, bool], list[float]]) -> list[str]:
    """A line for each cell: how the GPU time is split."""
    lines = [
        "| load | weights | count as | short / long | late | short / long, --preempt | late | served |",
        "| --: | :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for cell in cells:
        texts, served = [], []
        for preempt in (False, True):
            *parts, late = found[cell, preempt]
            texts.append(
                f"{' / '.join(f'{100 * part:.1f}' for part in parts)} | {abs(100 * late):.1f}"
            )
            served.append(sum(parts))
        weights = ":".join(f"{weight:g}" for weight in cell.weights)
        lines.append(
            f"| {cell.load:g} | {weights} | {cell.counts_as} | {' | '.join(texts)} | "
            f"{100 * served[1] / served[0]:.1f} |"
        )
    return lines


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
    overloaded = [
        Cell(two_classes(0.5), 1, load, seconds, counts_as, weights)
        for counts_as in ("value", "shares")
        for load in OVERLOADS
        for weights in WEIGHTS
    ]
    splits = [(cell, preempt) for cell in overloaded for preempt in (False, True)]
    found = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for done, (job, texts) in enumerate(zip(jobs, pool.map(measured, jobs), strict=True), 1):
            found[job] = texts
            if sys.stderr.isatty():
                print(f"\r{done} of {len(jobs)} runs", end="", file=sys.stderr, flush=True)
        split = dict(zip(splits, pool.map(gpu_time, splits), strict=True))
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
    lines += [
        "",
        "## Above: how the GPU time is split",
        "",
        f"{two_classes(0.5).title}, 1 GPU: per cent of the GPU time that answers in time took, of each "
        "class, and that late answers took. *Served*: with --preempt over without, in per cent. The weights "
        "are those of the clients, short to long.",
        "",
        *weighted(overloaded, split),
    ]
    write_file(options.out, ("\n".join(lines) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
