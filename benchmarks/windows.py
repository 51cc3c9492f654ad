"""Measurement windows: one SLO step of one run, with what disturbed the machine meanwhile."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from cluster import Cluster, Load
from numpy.typing import NDArray
from stall_meter import Readings, StallMeter

from slosched.cli.machine import Bounds, Disturbance
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_S, format_duration

#: The beginning of every client's run is not counted: its copies' weights are loaded then.
SETTLE_NS = NS_PER_S // 2
#: A window with fewer requests cannot tell a p99 (LoadGen's early stopping wants 662).
LEAST_REQUESTS = 100


@dataclass(frozen=True)
class Window:
    """What the client saw of one SLO step, CPU seconds by process, and whether it counts.

    Latencies are of served requests, from the scheduled send. `in_time` is the client's count from
    the scheduled send, `met` the controller's from arrival. A refusal is an answer with code 8, and its time
    that from the send. `late` counts served requests whose answer came after their SLO. `void` holds the
    reasons for which the window does not count; `attempt` is 1 for the first try of its repeat.
    """

    rate: float
    slo: str
    slo_factor: float
    slo_ns: int
    copies: int
    gpus: int
    inputs: bool
    seed: int
    repeat: int
    attempt: int
    start_ns: int
    duration_s: float
    sent: int
    in_time: int
    met: int
    codes: dict[str, int]
    latency_p50_ns: int
    latency_p99_ns: int
    issue_delay_p50_ns: int
    issue_delay_p99_ns: int
    cpu_s: dict[str, float]
    disturbance: Disturbance
    void: list[str]
    late: int = 0
    refusal_p50_ns: int = 0
    refusal_p99_ns: int = 0
    given_up_left_p50_ns: int = 0  # of the SLO, from the scheduled send, at the answer
    given_up_left_p1_ns: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Step:
    """Rows of one step in a client log."""

    slo_factor: float
    slo_ns: int
    rows: NDArray[np.intp]
    start_ns: int
    end_ns: int


def steps_of(log: LogTable) -> list[_Step]:
    """Cut a client log into its SLO steps, in time order, without the run's first half second."""
    if not len(log):
        return []
    scheduled = log["scheduled_ns"]
    counted = scheduled >= scheduled.min() + SETTLE_NS
    # A multiple and its deadline are one step, whatever a ns of rounding says.
    absolute_ns = np.where(log["slo_factor"] > 0, 0, log["slo_ns"])
    steps = []
    for factor, slo_ns in sorted(
        set(zip(log["slo_factor"].tolist(), absolute_ns.tolist(), strict=True))
    ):
        rows = np.flatnonzero(counted & (log["slo_factor"] == factor) & (absolute_ns == slo_ns))
        if len(rows) >= LEAST_REQUESTS:
            deadline_ns = int(np.median(log["slo_ns"][rows]))
            end_ns = int((scheduled[rows] + log["latency_ns"][rows]).max())
            steps.append(_Step(factor, deadline_ns, rows, int(scheduled[rows].min()), end_ns))
    return sorted(steps, key=lambda step: step.start_ns)


class Recorder:
    """Runs loads under the stall meter, and again what was disturbed, until the tries are used up.

    After `until_ns` nothing is repeated any more. `windows` holds every window, the void ones too.
    """

    def __init__(
        self, meter: StallMeter, directory: Path, bounds: Bounds, *, tries: int, until_ns: int
    ) -> None:
        self.meter, self.directory, self.bounds = meter, directory, bounds
        self.tries, self.until_ns = tries, until_ns
        self.windows: list[Window] = []
        self._names: Iterator[int] = count()

    def new_directory(self, name: str) -> Path:
        """A place for one cluster's files."""
        return self.directory / f"{name}-{next(self._names)}"

    def record(self, cluster: Cluster, load: Load, *, repeat: int = 0) -> list[Window]:
        """Run `load`, then its void steps one by one. Return the last window of each step."""
        last = self._run(cluster, load, repeat, 1)
        for attempt in range(2, self.tries + 1):
            for index, window in enumerate(last):
                if window.void and now_ns() < self.until_ns:
                    again = replace(
                        load,
                        slo_start=_written(window),
                        slo_end=_written(window),
                        steps=1,
                        # The first half second is not counted, so that the window is as long.
                        period_s=window.duration_s + SETTLE_NS / NS_PER_S,
                        seed=load.seed + 1000 * (attempt - 1),
                    )
                    last[index] = (self._run(cluster, again, repeat, attempt) or [window])[0]
        return last

    def _run(self, cluster: Cluster, load: Load, repeat: int, attempt: int) -> list[Window]:
        log, client_pid = cluster.run_client(load)
        readings = self.meter.readings()
        pids = {
            "controller": cluster.controller.process.pid,
            "worker": cluster.worker.process.pid,
            "client": client_pid,
        }
        found = [
            _window(load, cluster.gpus, log, step, readings, pids, self.bounds, (repeat, attempt))
            for step in steps_of(log)
        ]
        shutil.rmtree(log.path.parent, ignore_errors=True)
        for window in found:
            print(line_of(window), flush=True)
        self.windows += found
        return found


def _written(window: Window) -> str:
    """The window's SLO as the command takes it."""
    return f"{window.slo_factor:.9g}" if window.slo_factor else f"{window.slo_ns}ns"


def _window(
    load: Load,
    gpus: int,
    log: LogTable,
    step: _Step,
    readings: Readings,
    pids: dict[str, int],
    bounds: Bounds,
    number: tuple[int, int],
) -> Window:
    rows = step.rows
    codes = Counter(log["code"][rows].tolist())
    served = log["latency_ns"][rows][log["code"][rows] == 0]
    delays = log["issue_delay_ns"][rows]
    refused = rows[log["code"][rows] == Code.COULD_NOT_START_IN_TIME]
    given_up = rows[np.isin(log["code"][rows], (Code.TIMED_OUT, Code.SKIPPED))]
    left = log["slo_ns"][given_up] - log["latency_ns"][given_up]
    refusals = log["latency_ns"][refused] - log["issue_delay_ns"][refused]
    disturbance = readings.disturbance(step.start_ns, step.end_ns)
    sent_until_ns = int(log["scheduled_ns"][rows].max())
    return Window(
        rate=load.rate,
        slo=f"{step.slo_factor:.3g}x" if step.slo_factor else format_duration(step.slo_ns),
        slo_factor=step.slo_factor,
        slo_ns=step.slo_ns,
        copies=load.copies,
        gpus=gpus,
        inputs=load.inputs,
        seed=load.seed,
        repeat=number[0],
        attempt=number[1],
        start_ns=step.start_ns,
        duration_s=(sent_until_ns - step.start_ns) / NS_PER_S,
        sent=len(rows),
        in_time=int(log["in_time"][rows].sum()),
        met=int(log["deadline_met"][rows].sum()),
        codes={str(code): n for code, n in sorted(codes.items())},
        latency_p50_ns=_percentile(served, 50),
        latency_p99_ns=_percentile(served, 99),
        issue_delay_p50_ns=_percentile(delays, 50),
        issue_delay_p99_ns=_percentile(delays, 99),
        cpu_s={
            name: readings.cpu_s(pid, step.start_ns, sent_until_ns) for name, pid in pids.items()
        },
        disturbance=disturbance,
        void=list(disturbance.reasons(bounds)),
        late=int(len(served) - log["in_time"][rows].sum()),
        refusal_p50_ns=_percentile(refusals, 50),
        refusal_p99_ns=_percentile(refusals, 99),
        given_up_left_p50_ns=_percentile(left, 50),
        given_up_left_p1_ns=_percentile(left, 1),
    )


def _percentile(values: NDArray[Any], percent: float) -> int:
    return round(float(np.percentile(values, percent))) if len(values) else 0


def line_of(window: Window) -> str:
    """One human-readable line, while the benchmark runs."""
    verdict = f"VOID: {'; '.join(window.void)}" if window.void else ""
    return (
        f"  R={window.rate:g} SLO {window.slo}: client {window.in_time / window.sent:.4f}, controller "
        f"{window.met / window.sent:.4f} of {window.sent}; p50 {format_duration(window.latency_p50_ns)}, "
        f"p99 {format_duration(window.latency_p99_ns)}, issue delay p99 "
        f"{format_duration(window.issue_delay_p99_ns)} {verdict}"
    )
