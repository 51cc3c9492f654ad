"""What one job of a run says: its latencies, inflation, misses, pauses, and the device's time. Pure.

Counted are requests that arrived in the common window, without warm-ups and those that a run cut.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from slosched.share.energy import Energy, energy_of
from slosched.share.figures import Alone, Inflation, JobMetrics, Misses, Pauses
from slosched.share.latency import latency_of
from slosched.share_spec import DEFT_SLO, Arriving, Job, JobResult, Request, RunResult, ShareSpec
from slosched.units import NS_PER_MS, NS_PER_S


def job_metrics(
    spec: ShareSpec,
    result: RunResult,
    found: JobResult,
    alone: Alone | None,
    energy: Energy,
    *,
    share: float | None,
    device: tuple[float, bool],
) -> JobMetrics:
    job = spec.jobs[found.job]
    rows, work = counted(found, result), work_of(found, result)
    window_s = (result.end_ns - result.begin_ns) / NS_PER_S
    throughput = work / window_s if window_s > 0 else 0.0
    latency = latency_of([row.latency_ns for row in rows])
    joules = energy.joules * share if energy.joules is not None and share is not None else None
    active = energy.active_j * share if energy.active_j is not None and share is not None else None
    waits = [row.started_ns - row.arrived_ns for row in rows]
    return JobMetrics(
        job=found.job,
        name=job.name,
        model=job.model,
        batch=job.batch,
        priority=job.priority,
        status=found.status,
        reason=found.reason,
        pid=found.pid,
        n=len(rows),
        left=found.left if job.clients.arriving is not Arriving.CLOSED else 0,
        work=work,
        throughput_per_s=throughput,
        latency=latency,
        wait_mean_ms=math.fsum(waits) / len(waits) / NS_PER_MS if waits else None,
        inflation=_inflation(found, rows, result, alone),
        misses=_misses(job, rows, alone),
        pauses=pauses_of((found,), result),
        solo_throughput_per_s=alone.throughput_per_s if alone else None,
        solo_mean_ms=alone.mean_ms if alone else None,
        normalized=throughput / alone.throughput_per_s if alone else None,
        slowdown=latency.mean_ms / alone.mean_ms if alone and latency else None,
        device_s=device[0],
        device_measured=device[1],
        device_share=share,
        joules=joules,
        joules_per_request=ratio(joules, work),
        active_joules_per_request=ratio(active, work),
        solo_joules_per_request=alone.joules if alone else None,
        memory_allocated=found.memory_allocated,
        memory_reserved=found.memory_reserved,
        wrong_answers=sum(row.differs for row in found.requests),
        runs=found.prepared.runs.value if found.prepared else "",
        note=found.prepared.note if found.prepared else "",
        boundaries=found.prepared.boundaries if found.prepared else 0,
        tuning=found.prepared.tuning if found.prepared else None,
    )


def _inflation(
    found: JobResult, rows: Sequence[Request], result: RunResult, alone: Alone | None
) -> Inflation:
    others = _merged(
        (row.started_ns, row.ended_ns)
        for each in result.jobs
        if each.job != found.job
        for row in each.requests
        if not row.warmup
    )
    overlapping: list[int] = []
    apart: list[int] = []
    for row in rows:
        place = bisect_right(others[1], row.arrived_ns)
        overlaps = place < len(others[0]) and others[0][place] < row.ended_ns
        (overlapping if overlaps else apart).append(row.latency_ns)
    own = [row.latency_ns - row.paused_ns for row in rows]

    def over(values: Sequence[int]) -> float | None:
        mean = _mean_ms(values)
        return mean / alone.mean_ms - 1 if alone and mean is not None else None

    return Inflation(
        all=over([row.latency_ns for row in rows]),
        overlapping=over(overlapping),
        apart=over(apart),
        own=over(own),
        overlapping_n=len(overlapping),
        apart_n=len(apart),
        overlapping_mean_ms=_mean_ms(overlapping),
        apart_mean_ms=_mean_ms(apart),
        apart_sem_ms=spread.sem_ms if (spread := latency_of(apart)) is not None else None,
    )


def _merged(intervals: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends of the union of `intervals`, in order."""
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted(intervals):
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends


def deadline_of(job: Job, row: Request, solo_mean_ms: float | None) -> int:
    """When `row` was due: its own deadline, else by the job's SLO; 0 if it has none."""
    if row.deadline_ns:
        return row.deadline_ns
    if job.slo_ns:
        return row.arrived_ns + job.slo_ns
    if job.slo_times_solo and solo_mean_ms is not None:
        return row.arrived_ns + round(job.slo_times_solo * solo_mean_ms * NS_PER_MS)
    return 0


def _misses(job: Job, rows: Sequence[Request], alone: Alone | None) -> Misses:
    solo_ms = alone.mean_ms if alone else None
    due = [(row, deadline) for row in rows if (deadline := deadline_of(job, row, solo_ms))]
    missed = sum(1 for row, deadline in due if row.ended_ns > deadline)
    deft = None
    if solo_ms is not None:
        deft = sum(1 for row in rows if row.latency_ns > DEFT_SLO * solo_ms * NS_PER_MS)
    slo_ns = due[0][1] - due[0][0].arrived_ns if due else 0
    return Misses(
        n=len(due),
        missed=missed,
        share=missed / len(due) if due else None,
        slo_ms=slo_ns / NS_PER_MS if due else None,
        deft_missed=deft,
        deft_share=deft / len(rows) if deft is not None and rows else None,
    )


def pauses_of(jobs: Iterable[JobResult], result: RunResult) -> Pauses:
    found = [
        each
        for job in jobs
        for each in job.interruptions
        if result.begin_ns <= each.wanted_ns <= result.end_ns
    ]
    return Pauses(
        n=len(found),
        preempted=latency_of([each.started_ns - each.wanted_ns for each in found]),
        paused=latency_of([each.resumed_ns - each.started_ns for each in found]),
    )


def device_s(job: JobResult, result: RunResult) -> tuple[float, bool]:
    """The device's time for the job in the window in s, and whether it was measured for each request."""
    rows = [row for row in job.requests if not row.warmup]
    measured = bool(rows) and all(row.device_ns > 0 for row in rows)
    total = 0.0
    for row in rows:
        whole = row.device_ns if measured else row.ended_ns - row.started_ns - row.paused_ns
        total += max(whole, 0) * _inside(row, result)
    return total / NS_PER_S, measured


def counted(job: JobResult, result: RunResult) -> list[Request]:
    """The requests that latencies are made of: arrived in the window, neither warm-ups nor cut."""
    return [
        row
        for row in job.requests
        if row.counts and result.begin_ns <= row.arrived_ns <= result.end_ns
    ]


def work_of(job: JobResult, result: RunResult) -> float:
    """Requests in the window, each with the part of its time from start to end that lies in it."""
    return math.fsum(_inside(row, result) for row in job.requests if row.counts)


def alone_of(job: int, solo: RunResult) -> Alone | None:
    """What the solo run says of `job` (or of the equal job that ran for it); None if it has no request."""
    found = solo_job(job, solo)
    if found is None:
        return None
    rows, work = counted(found, solo), work_of(found, solo)
    window_s = (solo.end_ns - solo.begin_ns) / NS_PER_S
    if not rows or work <= 0 or window_s <= 0:
        return None
    ran = [row for row in found.requests if not row.warmup]
    # A job may have several requests out, so their times may add up to more than the window.
    works_s = min(math.fsum(_part_s(row, solo) for row in ran), window_s)
    busy_s = min(math.fsum(_part_s(row, solo) for row in ran if not row.cut), window_s)
    energy = energy_of(solo.power, solo.begin_ns, solo.end_ns, idle_watts=solo.idle_watts)
    joules = energy.joules
    if joules is not None:
        # Where its clients left the GPU idle, that time is not the work's.
        joules = (joules - (energy.idle_watts or 0.0) * (window_s - works_s)) / work
    return Alone(
        throughput_per_s=work / window_s,
        mean_ms=math.fsum(row.latency_ns for row in rows) / len(rows) / NS_PER_MS,
        busy_s=busy_s / work,
        joules=joules,
        idle_watts=energy.idle_watts,
    )


def solo_job(job: int, solo: RunResult) -> JobResult | None:
    """The rows that stand for `job` in its run alone."""
    for each in solo.jobs:
        if each.job == job:
            return each
    return solo.jobs[0] if len(solo.jobs) == 1 else None


def _inside(row: Request, result: RunResult) -> float:
    """The part of a request's time from start to end that lies in the window."""
    if row.ended_ns <= row.started_ns:
        return 1.0 if result.begin_ns <= row.ended_ns <= result.end_ns else 0.0
    return _part_s(row, result) * NS_PER_S / (row.ended_ns - row.started_ns)


def _part_s(row: Request, result: RunResult) -> float:
    inside = min(row.ended_ns, result.end_ns) - max(row.started_ns, result.begin_ns)
    return max(inside, 0) / NS_PER_S


def _mean_ms(values: Sequence[int]) -> float | None:
    return math.fsum(values) / len(values) / NS_PER_MS if values else None


def ratio(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
