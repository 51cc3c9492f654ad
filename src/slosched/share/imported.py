"""One run as an importer finds it: the figures that HotCarbon's results and our own have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from slosched.share.figures import RunMetrics


class ImportedJob(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a run. None: the files do not say. Latencies are in ms."""

    model: str
    batch: int = 1
    n: int | None = None
    throughput_per_s: float | None = None
    mean_ms: float | None = None
    p0_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    p100_ms: float | None = None
    normalized: float | None = None  # throughput / throughput alone


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `label` is what the results call the device; `row` is its place among runs of the same files.

    `watts` is the mean power of the GPU in the measured window. `problems` says what could not be read.
    """

    source: str  # hotcarbon, slosched
    path: str
    label: str
    mode: str
    jobs: tuple[ImportedJob, ...]
    row: int = 0
    window_s: float | None = None
    watts: float | None = None
    stp: float | None = None
    energy_ratio: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def mix(self) -> tuple[str, ...]:
        """The models in a fixed order, so that a+b is b+a."""
        return tuple(sorted(job.model for job in self.jobs))


def of_metrics(metrics: RunMetrics, *, label: str, mode: str, path: str = "") -> Imported:
    """Our own run in the figures that imported ones have."""
    jobs = []
    for each in metrics.jobs:
        latency = each.latency
        jobs.append(
            ImportedJob(
                model=each.model,
                batch=each.batch,
                n=each.n,
                throughput_per_s=each.throughput_per_s,
                mean_ms=latency.mean_ms if latency else None,
                p0_ms=latency.p0_ms if latency else None,
                p50_ms=latency.p50_ms if latency else None,
                p90_ms=latency.p90_ms if latency else None,
                p99_ms=latency.p99_ms if latency else None,
                p100_ms=latency.p100_ms if latency else None,
                normalized=each.normalized,
            )
        )
    return Imported(
        source="slosched",
        path=path,
        label=label,
        mode=mode,
        jobs=tuple(jobs),
        row=metrics.repeat,
        window_s=metrics.window_s,
        watts=metrics.energy.mean_watts,
        stp=metrics.stp,
        energy_ratio=metrics.energy_ratio,
    )


def with_solos(runs: Sequence[Imported]) -> tuple[Imported, ...]:
    """`runs` with STP and energy ratio, from those among them that have one model.

    A run is compared with the last solo run under its label in the same mode, else in any mode. The energy
    ratio is shared energy / energy of the same requests alone, each GPU counted only while it works.
    """
    alone: dict[tuple[str, str, str, int], Imported] = {}
    for run in runs:
        if len(run.jobs) == 1 and run.jobs[0].throughput_per_s:
            job = run.jobs[0]
            alone[run.label, run.mode, job.model, job.batch] = run
            alone[run.label, "", job.model, job.batch] = run
    return tuple(_with_solos(run, alone) for run in runs)


def _with_solos(run: Imported, alone: dict[tuple[str, str, str, int], Imported]) -> Imported:
    solos = [
        alone.get((run.label, run.mode, job.model, job.batch))
        or alone.get((run.label, "", job.model, job.batch))
        for job in run.jobs
    ]
    if run.source == "slosched" and run.jobs and all(job.normalized for job in run.jobs):
        # Our own summary says which run alone is whose; of one job that is the run itself.
        return run if run.stp is not None else msgspec.structs.replace(run, stp=1.0)
    jobs, parts = [], []
    for job, solo in zip(run.jobs, solos, strict=True):
        base = solo.jobs[0].throughput_per_s if solo else None
        known = job.throughput_per_s is not None and base
        part = job.throughput_per_s / base if job.throughput_per_s is not None and base else None
        jobs.append(msgspec.structs.replace(job, normalized=part) if known else job)
        parts.append((part, solo.watts if solo else None))
    normalized = [part for part, _ in parts if part is not None]
    every = len(normalized) == len(parts) > 0
    # A part of the time alone, at the power alone: the energy of one second's requests.
    watts = [part * each for part, each in parts if part is not None and each is not None]
    dedicated = math.fsum(watts) if len(watts) == len(parts) else 0.0
    return msgspec.structs.replace(
        run,
        jobs=tuple(jobs),
        stp=math.fsum(normalized) if every else run.stp,
        energy_ratio=run.watts / dedicated
        if run.watts is not None and dedicated
        else run.energy_ratio,
    )
