"""The figures of one run: latency against time, when requests ran, and power with its phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from slosched.analysis.drawn import Drawn
from slosched.analysis.share_figures import (
    Lane,
    Pause,
    Phase,
    draw_lanes,
    draw_latencies,
    draw_power,
)
from slosched.errors import InvalidConfig
from slosched.share.found_runs import FoundRun, rows_of
from slosched.units import NS_PER_MS, NS_PER_S


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
    "power": draw_power_of,
}
