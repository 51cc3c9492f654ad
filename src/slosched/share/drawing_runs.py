"""The figures of one run: latency against time, when requests ran and waited, its segments, and its power."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from slosched.analysis.drawn import Drawn
from slosched.analysis.share_cdfs import draw_segments
from slosched.analysis.share_figures import (
    Lane,
    Pause,
    Phase,
    Queued,
    draw_lanes,
    draw_latencies,
    draw_power,
    draw_queues,
)
from slosched.errors import InvalidConfig
from slosched.share.found_runs import FoundRun, rows_of
from slosched.share_spec import Arriving, JobResult, Mode, Request
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.job_arrivals import arrivals_of, seed_of

SEGMENTS = "segments"
#: Arrivals that are drawn anew of one job, to know which of them never started.
_MOST_ARRIVALS = 1_000_000


def draw_jct_of(run: FoundRun, out: Path, stem: str) -> Drawn:
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for found in run.result.jobs:
        rows = sorted(rows_of(found), key=lambda row: row.ended_ns)
        series[run.spec.jobs[found.job].name] = (
            [run.after_s(row.ended_ns) for row in rows],
            [row.latency_ns / NS_PER_MS for row in rows],
        )
    return draw_latencies(series, out, stem, title=f"Latency, {run.mix}, {run.method}")


def draw_lanes_of(run: FoundRun, out: Path, stem: str) -> Drawn:
    lanes = []
    for found in run.result.jobs:
        rows = sorted(rows_of(found), key=lambda row: row.arrived_ns)
        lanes.append(
            Lane(
                run.spec.jobs[found.job].name,
                [run.after_s(row.arrived_ns) for row in rows],
                [run.after_s(row.started_ns) for row in rows],
                [run.after_s(row.ended_ns) for row in rows],
                [
                    Pause(run.after_s(each.started_ns), run.after_s(each.resumed_ns))
                    for each in found.interruptions
                ],
            )
        )
    return draw_lanes(lanes, out, stem, title=f"Requests, {run.mix}, {run.method}")


def draw_queue_of(run: FoundRun, out: Path, stem: str) -> Drawn:
    queues = [queue_of(run, found) for found in run.result.jobs if rows_of(found)]
    title = f"Queues, {run.mix}, {run.method}"
    return draw_queues(queues, run.after_s(run.result.end_ns), out, stem, title=title)


def queue_of(run: FoundRun, found: JobResult) -> Queued:
    """How many requests of a job wait in the window: those that arrived and did not start, and paused ones."""
    changes: Counter[int] = Counter()
    rows = [row for row in found.requests if not row.warmup]
    spans = [(row.arrived_ns, row.started_ns) for row in rows]
    spans += [(each.started_ns, each.resumed_ns) for each in found.interruptions]
    spans += [(at_ns, run.result.end_ns) for at_ns in _left_ns(run, found, rows)]
    for begin_ns, until_ns in spans:
        changes[max(begin_ns, run.result.begin_ns)] += 1
        changes[max(until_ns, run.result.begin_ns)] -= 1
    times = sorted(
        at_ns for at_ns, change in changes.items() if change and at_ns < run.result.end_ns
    )
    waiting = list(itertools.accumulate(changes[at_ns] for at_ns in times))
    return Queued(run.spec.jobs[found.job].name, [run.after_s(at_ns) for at_ns in times], waiting)


def _left_ns(run: FoundRun, found: JobResult, rows: Sequence[Request]) -> list[int]:
    """When the requests arrived that never started. They have no rows, but arrivals follow from the spec."""
    clients = run.spec.jobs[found.job].clients
    if not found.left or not rows or clients.arriving is Arriving.CLOSED:
        return []  # the clients of a closed loop wait for themselves
    seed = seed_of(run.spec.seed, run.result.repeat, found.job)
    last = max(rows, key=lambda row: row.number)
    if last.number > _MOST_ARRIVALS:
        return []
    arrivals = arrivals_of(clients, seed)
    offset_ns = next(itertools.islice(arrivals, last.number, None), last.arrived_ns)
    begun_ns = last.arrived_ns - offset_ns
    inside = itertools.takewhile(lambda at_ns: begun_ns + at_ns < run.result.end_ns, arrivals)
    return [begun_ns + at_ns for at_ns in itertools.islice(inside, found.left)]


def stops_at_boundaries(run: FoundRun) -> bool:
    """True if jobs of the run stop at boundaries, or have measured segments."""
    return run.result.mode in (Mode.PREEMPT, Mode.GATE) or any(
        found.prepared is not None and found.prepared.segments_ns for found in run.result.jobs
    )


def draw_segments_of(run: FoundRun, out: Path, stem: str) -> Drawn:
    segments_ms = {
        run.spec.jobs[found.job].name: [each / NS_PER_MS for each in found.prepared.segments_ns]
        for found in run.result.jobs
        if found.prepared is not None
    }
    return draw_segments(segments_ms, out, stem, title=f"Segments, {run.mix}, {run.method}")


def draw_power_of(run: FoundRun, out: Path, stem: str) -> Drawn:
    samples = [sample for sample in run.result.power if sample.watts >= 0]
    if not samples:
        why = run.result.power_problem or "power was not sampled"
        raise InvalidConfig(f"nothing to draw: {why}")
    times = [run.after_s(sample.at_ns) for sample in samples]
    average = [sample.watts_average for sample in samples]
    return draw_power(
        times,
        [sample.watts for sample in samples],
        phases_of(run, times[0], times[-1]),
        out,
        stem,
        title=f"Power, {run.mix}, {run.method}",
        average=[v if v >= 0 else math.nan for v in average] if max(average) >= 0 else (),
    )


def phases_of(run: FoundRun, first_s: float, last_s: float) -> list[Phase]:
    """Idle, prepare, window and cool-down, as far as samples lie in them."""
    window_s = run.after_s(run.result.end_ns)
    idle_s = min(first_s + run.spec.idle_ns / NS_PER_S, 0.0)
    bounds = [
        ("idle", first_s, idle_s),
        ("prepare", max(idle_s, first_s), 0.0),
        ("window", max(0.0, first_s), min(window_s, last_s)),
        ("cool-down", max(window_s, first_s), last_s),
    ]
    return [Phase(name, begin, end) for name, begin, end in bounds if end > begin]


#: What is drawn of one run: (run, folder, stem of the files).
SINGLE: dict[str, Callable[[FoundRun, Path, str], Drawn]] = {
    "jct": draw_jct_of,
    "lanes": draw_lanes_of,
    "queue": draw_queue_of,
    SEGMENTS: draw_segments_of,
    "power": draw_power_of,
}
