"""Where the policy study stops: skew, bursts, mixed SLOs, unequal GPUs, long beside short models.

    .venv/bin/python analysis/policy_cases.py --jobs 2 --tables     # nine minutes of two cores
    .venv/bin/python analysis/policy_cases.py --only unequal --seeds 1

Each cell is one load on one cluster, served by every scheduler from the same arrivals in virtual time:
INFER5, the published one, and the baselines. Satisfaction is the client's, from the scheduled send. The
table says how far INFER5 is ahead of the best of the others, with the 95 % interval of the difference over
the seeds; a cell in which another is ahead by more than that says so and the program ends with 1.

*Of achievable* is INFER5's count over that of a schedule which knew all arrivals beforehand (`slosched bound`),
for the requests of one second and by the controller's count.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from policy_grid import interval

from slosched.bound.achievable import achievable
from slosched.bound.problem import Cluster, cells_of
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.jobs import Job, JobsProgress, run_many
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__
from slosched.workloads import parse_workload

OUT = Path(__file__).parent / "policy"
OURS = "INFER5"
POLICIES = (OURS, "INFER5:paper", "FIFO", "EDF", "REJECT", "AIMD")

FIG7 = load_profile("fig7")
#: Half as fast in everything.
_MODEL = FIG7.models["resnet50"]
HALF = replace(
    FIG7,
    name="fig7-half",
    models={"resnet50": replace(_MODEL, exec_ns={b: 2 * ns for b, ns in _MODEL.exec_ns.items()})},
)


def _profile(name: str, models: dict[str, dict[int, float]]) -> GpuProfile:
    """A GPU with these exec times (ms by batch), weights of 100 MB each and room for 240 of them."""
    return GpuProfile(
        name=name,
        models={
            model: ModelProfile(
                name=model,
                exec_ns={batch: round(ms * NS_PER_MS) for batch, ms in exec_ms.items()},
                weights_ns=8_330_000,
                weights_bytes=102_160_300,
            )
            for model, exec_ms in models.items()
        },
        weights_cache_bytes=24 * 2**30,
    )


#: 2 ms beside 50 ms; batches pay alike for both.
LENGTHS = _profile(
    "lengths",
    {
        "resnet18": {1: 2.0, 2: 3.0, 4: 4.6, 8: 7.6, 16: 13.6},
        "resnet50": {1: 50.0, 2: 76.0, 4: 118.0, 8: 196.0, 16: 350.0},
    },
)
#: ResNet-50 in fp16 as CUDA graphs on an H200, whose batches hardly cost more than one request.
H200 = _profile("h200", {"resnet50": {1: 0.915, 2: 0.933, 4: 0.997, 8: 1.131, 16: 1.504}})


@dataclass(frozen=True)
class Case:
    """One kind of load. `workload(rate, slo)` is a command; `cells` are its (rate, SLO) pairs."""

    name: str
    what: str
    workload: Callable[[int, str], str]
    cells: tuple[tuple[int, str], ...]
    seconds: float
    profiles: tuple[GpuProfile, ...] = (FIG7,)
    gpus: int = 6

    def spec(self, rate: int, slo: str, policy: str, seed: int) -> SimSpec:
        name, _, fidelity = policy.partition(":")
        kind, *values = self.workload(rate, slo).split()
        return SimSpec(
            workload=parse_workload(kind, values),
            scheduler=SchedulerConfig(
                policy=name, fidelity=fidelity or "best", schedule_ahead_ns=5 * NS_PER_MS
            ),
            profiles=self.profiles,
            gpus=self.gpus,
            seed=seed,
            duration_ns=round(self.seconds * NS_PER_S),
        )


def _classes(rate: int, slo: str) -> str:
    """Two copies for each of the SLOs in `slo`, which share the rate evenly."""
    slos = slo.split("/")
    parts = [f"resnet50_v2:2:{rate / len(slos)}:{one}ms" for one in slos]
    return f"mix {','.join(parts)} 60s"


def _lengths(rate: int, slo: str) -> str:
    """The long model gets a quarter of the GPU time at batch 1: one in 75 requests."""
    short, long = slo.split("/")
    return f"mix resnet18:6:{rate * 74 / 75}:{short}ms,resnet50:2:{rate / 75}:{long}ms 60s"


CASES = (
    Case(
        "zipf",
        "48 copies, popularity Zipf 0.9",
        lambda rate, slo: f"zipf resnet50_v2 48 {rate} 0.9 60s {slo}ms",
        ((1200, "10"), (2400, "10"), (2400, "25"), (4000, "10"), (4000, "25")),
        2.5,
    ),
    Case(
        "bursts",
        "12 copies, Gamma gaps of CV 4",
        lambda rate, slo: f"gamma resnet50_v2 12 {rate} 4 60s {slo}ms",
        ((1200, "10"), (2400, "10"), (2400, "25"), (4000, "25")),
        3.0,
    ),
    Case(
        "classes",
        "SLOs of 5, 10, 25, 50, 100 and 250 ms together, 2 copies each",
        _classes,
        tuple((rate, "5/10/25/50/100/250") for rate in (1200, 2400, 3200, 4800)),
        2.5,
    ),
    Case(
        "unequal",
        "two GPUs of full and four of half speed, 12 copies",
        lambda rate, slo: f"zipf resnet50_v2 12 {rate} 0 60s {slo}ms",
        ((800, "10"), (1600, "10"), (1600, "25"), (2800, "25")),
        3.0,
        profiles=(FIG7, FIG7, HALF, HALF, HALF, HALF),
    ),
    Case(
        "lengths",
        "6 copies of 2 ms beside 2 of 50 ms",
        _lengths,
        ((1200, "10/150"), (2000, "10/150"), (2000, "25/500"), (4000, "25/500")),
        4.0,
        profiles=(LENGTHS,),
    ),
    Case(
        "h200",
        "one GPU, 8 copies, exec times of CUDA graphs on an H200",
        lambda rate, slo: f"zipf resnet50_v2 8 {rate} 0 60s {slo}ms",
        ((1500, "3"), (3000, "3"), (3000, "6"), (6000, "6"), (9000, "12")),
        1.5,
        profiles=(H200,),
        gpus=1,
    ),
)


@dataclass(frozen=True)
class Cell:
    """What one load came to. Shares in per cent by policy, one for each seed."""

    case: str
    rate: int
    slo: str
    satisfied: dict[str, list[float]]
    of_achievable: float = math.nan  # INFER5 / a clairvoyant schedule, on the same requests

    def mean(self, policy: str) -> float:
        values = self.satisfied[policy]
        return sum(values) / len(values)

    @property
    def best_other(self) -> str:
        return max((p for p in self.satisfied if p != OURS), key=self.mean)

    def lead(self) -> tuple[float, float]:
        """Points ahead of the best other policy, and half the interval of that difference."""
        pairs = zip(self.satisfied[OURS], self.satisfied[self.best_other], strict=True)
        gaps = [ours - other for ours, other in pairs]
        return sum(gaps) / len(gaps), interval(gaps)

    @property
    def behind(self) -> bool:
        points, noise = self.lead()
        return points < -max(noise if noise == noise else 0.0, 0.005)

    def as_dict(self) -> dict[str, object]:
        points, noise = self.lead()
        return {
            "case": self.case,
            "rate": self.rate,
            "slo_ms": self.slo,
            "satisfied": self.satisfied,
            "lead": points,
            "lead_interval": noise,
            "of_achievable": self.of_achievable,
        }


def run_cases(cases: list[Case], seeds: int, jobs: int) -> list[Cell]:
    """Every cell of `cases` under every policy."""
    keys = [
        (case, rate, slo, policy, seed)
        for case in cases
        for rate, slo in case.cells
        for policy in POLICIES
        for seed in range(1, seeds + 1)
    ]
    specs = [case.spec(rate, slo, policy, seed) for case, rate, slo, policy, seed in keys]
    shown = [-1]

    def progress(where: JobsProgress) -> None:
        if where.done * 20 // max(1, where.total) > shown[0]:
            shown[0] = where.done * 20 // where.total
            print(f"{where.done} of {where.total} runs", file=sys.stderr, flush=True)

    results = run_many([Job(spec) for spec in specs], processes=jobs, progress=progress)
    cells: dict[tuple[str, int, str], Cell] = {}
    for (case, rate, slo, policy, _), result in zip(keys, results, strict=True):
        cell = cells.setdefault((case.name, rate, slo), Cell(case.name, rate, slo, {}))
        cell.satisfied.setdefault(policy, []).append(100 * result.satisfaction)
    return list(cells.values())


def of_achievable(name: str, rate: int, slo: str) -> float:
    """INFER5's requests in time over those of a clairvoyant schedule, of the requests of a second.

    Both by the controller's count: no scheduler knows the latencies of the clients.
    """
    [case] = [case for case in CASES if case.name == name]
    spec = replace(case.spec(rate, slo, OURS, 1), duration_ns=NS_PER_S)
    result = simulate(spec)
    ways = spec.network
    each = spec.profiles * spec.gpus if len(spec.profiles) == 1 else spec.profiles
    cluster = Cluster(
        each,
        lead_ns=ways.to_worker_ns,
        tail_ns=ways.from_worker_ns,
        default_slo_ns=spec.scheduler.default_slo_ns,
        max_batch=16,
    )
    [cell] = cells_of(spec.workload, cluster, seed=1, duration_ns=NS_PER_S)
    served = sum(len(batch.requests) for batch in achievable(cell.problem, width=8))
    return result.controller_satisfaction * result.sent / served


def bounded(cells: list[Cell], jobs: int) -> list[Cell]:
    """The same cells with `of_achievable`."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        keys = [(cell.case, cell.rate, cell.slo) for cell in cells]
        ratios = pool.map(of_achievable, *zip(*keys, strict=True))
        return [replace(cell, of_achievable=r) for cell, r in zip(cells, ratios, strict=True)]


def page(cells: list[Cell], seeds: int) -> str:
    """The table as a page."""
    texts = {case.name: case.what for case in CASES}
    lines = [
        "# INFER5 where the policy study stops",
        "",
        f"In time in per cent (client), mean of {seeds} seeds, all from the same arrivals in virtual time.",
        "*Ahead* is INFER5 less the best of the others, with the 95 % interval of the difference. *Of",
        "achievable* is INFER5 over a schedule that knew all arrivals (docs/bounds.md), for one second of",
        "requests and by the controller's count. Written by `analysis/policy_cases.py`.",
    ]
    for name in dict.fromkeys(cell.case for cell in cells):
        lines += ["", f"## {name}: {texts[name]}", ""]
        lines.append(f"| R | SLO ms | ahead | of achievable | {' | '.join(POLICIES)} |")
        lines.append("|" + "--:|" * (4 + len(POLICIES)))
        for cell in cells:
            if cell.case == name:
                points, noise = cell.lead()
                mark = " **behind**" if cell.behind else ""
                shares = " | ".join(f"{cell.mean(p):.2f}" for p in POLICIES)
                lines.append(
                    f"| {cell.rate} | {cell.slo} | {points:+.2f} ±{noise:.2f}{mark} | "
                    f"{cell.of_achievable:.3f} | {shares} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", action="append", help="cases of this name; repeatable")
    parser.add_argument("--tables", action="store_true", help="keep the table in analysis/policy/")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or case.name in options.only]
    cells = bounded(run_cases(cases, options.seeds, options.jobs), options.jobs)
    text = page(cells, options.seeds)
    print(text)
    if options.tables:
        OUT.mkdir(parents=True, exist_ok=True)
        document = {
            "version": __version__,
            "seeds": options.seeds,
            "host": describe_host(),
            "cells": [cell.as_dict() for cell in cells],
        }
        (OUT / "cases.json").write_text(json.dumps(document, indent=1) + "\n")
        (OUT / "cases.md").write_text(text)
    behind = sum(cell.behind for cell in cells)
    print(f"{len(cells)} cells, another scheduler ahead in {behind}")
    sys.exit(1 if behind else 0)


if __name__ == "__main__":
    main()
