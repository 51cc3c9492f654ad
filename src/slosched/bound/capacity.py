"""The capacity bound: what the GPUs can carry if every batch is as full and as cheap as it can ever be.

Each request takes its share of the GPU time of a batch that is in time for it, exec / class; the GPUs are
there from the first release to the last due. Which requests get that time, and on which kind of GPU, is a
fluid linear programme: over kinds of requests (same exec times, same room), kinds of GPU, and classes. For
one model and one SLO it is the throughput of the class that does best among those that fit.
"""

from __future__ import annotations

import numpy as np

from slosched.bound.problem import Problem
from slosched.bound.solver import Programme

_TIME_LIMIT_S = 60.0


def capacity_bound(problem: Problem) -> float:
    """An upper bound of the requests of `problem` that can be served; a fraction, at most their number.

    Raises MissingPackage without scipy.
    """
    requests = problem.requests
    if not requests:
        return 0.0
    begin_ns = min(request.release_ns for request in requests)
    ends_ns = max(max(request.due_ns for request in requests), begin_ns)
    counts: dict[tuple[tuple[tuple[int, int], ...], ...], int] = {}
    for request in requests:
        costs = tuple(
            tuple(problem.fitting(request, kind).items()) for kind in range(len(problem.kinds))
        )
        counts[costs] = counts.get(costs, 0) + 1
    lp = Programme()
    # Rows: how often each sort of request occurs, and the time of each kind of GPU as a share of its total.
    lp.add_rows([float(count) for count in counts.values()])
    time_rows = lp.add_rows([1.0] * len(problem.kinds))
    for sort, (costs, count) in enumerate(counts.items()):
        for kind, classes in enumerate(costs):
            if not classes:
                continue
            cost_ns = min(exec_ns / batch for batch, exec_ns in classes)
            column = np.array([lp.add_columns(1, gain=1.0, upper=float(count))])
            lp.put(np.array([sort]), column, 1.0)
            budget_ns = problem.kinds[kind].count * (ends_ns - begin_ns)
            lp.put(np.array([time_rows + kind]), column, cost_ns / budget_ns)
    served = lp.solve(time_limit_s=_TIME_LIMIT_S)
    return float(len(requests)) if served is None else min(served, float(len(requests)))
