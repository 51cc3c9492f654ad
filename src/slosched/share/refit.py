"""a and b of Deft's predictor from measured runs: what a boundary costs, by a line through the delays.

The delay of a run is what a request that was not interrupted takes more than in the quickest run. The line's
slope is the cost of one boundary (a), and its intercept what boundaries cost however many there are (b).
"""

from __future__ import annotations

from collections.abc import Iterable

from slosched.core.share.tuner import fit_cost
from slosched.errors import InvalidConfig
from slosched.share_spec import RunResult
from slosched.units import NS_PER_MS


def refit(runs: Iterable[tuple[int, RunResult]], job: int) -> tuple[float, float]:
    """a and b in ms from a sweep: (boundaries in one request, the run); the delay is over the quickest run.

    Times are those of the requests of `job` that were not interrupted. Raises InvalidConfig for too few.
    """
    means: list[tuple[int, float]] = []
    for boundaries, result in runs:
        rows = [each for each in result.jobs if each.job == job]
        times = [
            row.ended_ns - row.started_ns
            for each in rows
            for row in each.requests
            if row.counts and not row.interruptions
        ]
        if times:
            means.append((boundaries, sum(times) / len(times) / NS_PER_MS))
    if not means:
        raise InvalidConfig(f"no run of the sweep has an uninterrupted request of job {job}")
    quickest = min(mean for _, mean in means)
    return fit_cost((float(boundaries), mean - quickest) for boundaries, mean in means)
