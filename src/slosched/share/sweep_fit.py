"""What a boundary costs by a sweep's measured points: a and b of Deft's predictor, for each job that varies.

A point's delay is the mean latency of the job's requests that overlap no other job's, less the latency alone
(without runs alone: less that of the quickest point). Its boundaries are those that one request crosses.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

import msgspec

from slosched.core.share.tuner import DEFT_BASE_MS, DEFT_COST_MS, fit_cost
from slosched.errors import InvalidConfig
from slosched.share.figures import JobMetrics, RunMetrics
from slosched.share_spec import Boundary, BoundaryKind, Mode, Run, ShareSpec

#: The kinds of eager models that wait behind each `every`-th module.
_KINDS = (BoundaryKind.SYNC, BoundaryKind.EVENT)


class BoundaryFit(msgspec.Struct, frozen=True, kw_only=True):
    """delay = `a_ms` x boundaries + `b_ms` of the job `job` under `mode`, fitted to `points` distances.

    `explained` is the part of the delays' variance that the line explains (R squared), 0 to 1.
    """

    job: str
    mode: Mode
    kind: BoundaryKind
    a_ms: float
    b_ms: float
    points: int
    explained: float

    @property
    def text(self) -> str:
        """The fit as one line, beside that of Deft's notebook."""
        sign = "-" if self.b_ms < 0 else "+"
        return (
            f"{self.mode}: {self.job}: delay = {self.a_ms:.4g} ms x boundaries of kind {self.kind} {sign} "
            f"{abs(self.b_ms):.3g} ms ({self.points} distances, R2 {self.explained:.2f}; Deft: "
            f"{DEFT_COST_MS} and {DEFT_BASE_MS})"
        )


def fits_of(swept: Iterable[tuple[ShareSpec, Iterable[RunMetrics]]]) -> list[BoundaryFit]:
    """A fit for each job, mode and kind of boundary with three distances or more; empty where there is none."""
    delays: dict[tuple[str, Mode, BoundaryKind], dict[int, list[tuple[float, float]]]] = {}
    for spec, runs in swept:
        for run in runs:
            for job in run.jobs:
                boundary = spec.jobs[job.job].boundary
                alone_ms, apart_ms = job.solo_mean_ms, job.inflation.apart_mean_ms
                crossed = _crossed(job, boundary, run.mode)
                if run.mode is Mode.EXCLUSIVE or crossed is None or apart_ms is None:
                    continue
                those = delays.setdefault((job.name, run.mode, boundary.kind), {})
                those.setdefault(crossed, []).append((apart_ms, alone_ms or 0.0))
    found = []
    for (name, mode, kind), by_crossed in delays.items():
        fit = _fit(by_crossed)
        if fit is not None:
            a_ms, b_ms, explained = fit
            found.append(
                BoundaryFit(
                    job=name,
                    mode=mode,
                    kind=kind,
                    a_ms=a_ms,
                    b_ms=b_ms,
                    points=len(by_crossed),
                    explained=explained,
                )
            )
    return found


def _crossed(job: JobMetrics, boundary: Boundary, mode: Mode) -> int | None:
    """The boundaries that bind in one request; None where that is not known."""
    if job.runs == Run.GRAPHS.value:
        # Those that were left when segments were joined.
        cut = mode is Mode.PREEMPT and boundary.kind is BoundaryKind.SEGMENT
        return job.boundaries if cut else None
    eager = job.runs == Run.EAGER.value
    if boundary.kind not in _KINDS or boundary.tuned or not eager or not job.boundaries:
        return None
    return job.boundaries // max(1, boundary.every)


def _fit(by_crossed: dict[int, list[tuple[float, float]]]) -> tuple[float, float, float] | None:
    if len(by_crossed) < 3:
        return None
    every = [pair for pairs in by_crossed.values() for pair in pairs]
    if all(alone_ms > 0 for _, alone_ms in every):
        points = [(n, apart - alone) for n, pairs in by_crossed.items() for apart, alone in pairs]
    else:
        quickest = min(apart_ms for apart_ms, _ in every)
        points = [(n, apart - quickest) for n, pairs in by_crossed.items() for apart, _ in pairs]
    try:
        a_ms, b_ms = fit_cost((float(n), delay) for n, delay in points)
    except InvalidConfig:
        return None
    middle = mean(delay for _, delay in points)
    total = sum((delay - middle) ** 2 for _, delay in points)
    left = sum((delay - a_ms * n - b_ms) ** 2 for n, delay in points)
    return a_ms, b_ms, 1 - left / total if total else 1.0
