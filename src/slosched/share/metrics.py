"""What one run of one mode says, per job and in all, beside the same jobs alone. Pure.

Counted are requests that arrived in the common window, without warm-ups and those that a run cut. Latency (JCT)
counts from the arrival. Throughput is work in the common window: a request counts with the part of its time
that lies in it, so long requests at the edges do not distort a short window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from slosched.core.share.queues import MOST_LEFT
from slosched.share.energy import COMPUTED, Energy, energy_of
from slosched.share.figures import Alone, JobMetrics, RunMetrics
from slosched.share.job_figures import alone_of, device_s, job_metrics, pauses_of, ratio
from slosched.share_spec import RunResult, ShareSpec, Status
from slosched.units import NS_PER_S


def metrics_of(
    spec: ShareSpec, result: RunResult, solos: Mapping[int, RunResult] | None = None
) -> RunMetrics:
    """All figures of `result`. `solos` has the run of each job alone, by the job's place in the spec."""
    alone = {job: alone_of(job, solo) for job, solo in (solos or {}).items()}
    window_s = max(result.end_ns - result.begin_ns, 0) / NS_PER_S
    energy = energy_of(
        result.power,
        result.begin_ns,
        result.end_ns,
        idle_watts=result.idle_watts,
        problem=result.power_problem,
    )
    if "virtual" in result.about and energy.joules is not None:
        energy = replace(energy, source=COMPUTED, counter_j=None, difference=None)
    device = {each.job: device_s(each, result) for each in result.jobs}
    in_all = math.fsum(seconds for seconds, _ in device.values())
    jobs = tuple(
        job_metrics(
            spec,
            result,
            each,
            alone.get(each.job),
            energy,
            share=device[each.job][0] / in_all if in_all else None,
            device=device[each.job],
        )
        for each in result.jobs
    )
    return _run_metrics(result, jobs, alone, energy, window_s, spec.duration_ns / NS_PER_S)


def _run_metrics(
    result: RunResult,
    jobs: tuple[JobMetrics, ...],
    alone: Mapping[int, Alone | None],
    energy: Energy,
    window_s: float,
    planned_s: float,
) -> RunMetrics:
    known = {each.job: found for each in jobs if (found := alone.get(each.job)) is not None}
    normalized = [each.normalized for each in jobs if each.normalized is not None]
    slowdowns = [each.slowdown for each in jobs if each.slowdown is not None]
    every = len(known) == len(jobs) > 0
    work = math.fsum(each.work for each in jobs)
    gpu_s = math.fsum(each.work * known[each.job].busy_s for each in jobs) if every else None
    costs = _energy_alone(jobs, known, window_s) if every else None
    joules = energy.joules
    return RunMetrics(
        mode=result.mode,
        repeat=result.repeat,
        window_s=window_s,
        jobs=jobs,
        complete=not result.unavailable and all(each.status is Status.OK for each in jobs),
        planned_s=planned_s,
        stopped="stopped" in result.about,
        unavailable=result.unavailable,
        throughput_per_s=work / window_s if window_s else 0.0,
        stp=math.fsum(normalized) if every else None,
        antt=math.fsum(slowdowns) / len(jobs) if jobs and len(slowdowns) == len(jobs) else None,
        jain=jain(normalized) if every else None,
        gpu_s_alone=gpu_s,
        gpu_seconds_ratio=window_s / gpu_s if gpu_s else None,
        energy=energy,
        joules_per_request=ratio(joules, work),
        active_joules_per_request=ratio(energy.active_j, work),
        energy_alone_j=costs[0] if costs else None,
        energy_ratio=ratio(joules, costs[0]) if costs else None,
        energy_ratio_with_idle=ratio(joules, costs[1]) if costs else None,
        pauses=pauses_of(result.jobs, result),
        low_overhead=_low_overhead(jobs),
        notes=_notes(jobs, energy),
    )


def jain(values: Sequence[float]) -> float | None:
    """Jain's index of fairness: 1 if all are equal, 1/n if one has all; None without a value above 0."""
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares > 0 else None


# ------------------------------------------------------------------------------------------ small parts


def _energy_alone(
    jobs: Sequence[JobMetrics], known: Mapping[int, Alone], window_s: float
) -> tuple[float, float | None] | None:
    """Energy of the same requests alone: while the GPUs work; and with their idle time (None: unknown)."""
    working, resting = 0.0, 0.0
    idle_known = True
    for each in jobs:
        alone = known[each.job]
        if alone.joules is None:
            return None
        working += each.work * alone.joules
        if alone.idle_watts is None:
            idle_known = False
        else:
            resting += alone.idle_watts * max(window_s - each.work * alone.busy_s, 0.0)
    return working, working + resting if idle_known else None


def _low_overhead(jobs: Sequence[JobMetrics]) -> float | None:
    if len({each.priority for each in jobs}) < 2:
        return None
    lowest = min(each.priority for each in jobs)
    costs = [
        each.inflation.apart if each.inflation.apart is not None else each.inflation.own
        for each in jobs
        if each.priority == lowest
    ]
    return max((cost for cost in costs if cost is not None), default=None)


def _notes(jobs: Sequence[JobMetrics], energy: Energy) -> tuple[str, ...]:
    notes = [f"{each.name}: {each.note}" for each in jobs if each.note]
    for each in jobs:
        if each.status is not Status.OK:
            notes.append(f"{each.name}: {each.status}: {each.reason or 'no reason was given'}")
        if each.latency and each.latency.p99_is_maximum:
            notes.append(f"{each.name}: p99 of {each.n} requests is their maximum")
        if each.left:
            least = "at least " if each.left >= MOST_LEFT else ""
            notes.append(
                f"{each.name}: {least}{each.left} requests had arrived and not started at the end: they are in "
                "no latency and no SLO"
            )
    if energy.difference is not None:
        notes.append(
            f"integrated power differs from the energy counter by {100 * energy.difference:+.1f} %"
        )
    elif energy.problem:
        notes.append(f"energy: {energy.problem}")
    if any(not each.device_measured for each in jobs) and energy.joules is not None:
        notes.append(
            "energy of a job is by its time from start to end: device time was not measured"
        )
    return tuple(notes)
