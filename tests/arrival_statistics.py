"""What the tests of arrivals share: draining an engine, a fake server, and Kolmogorov-Smirnov."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from slosched.workloads.base import Arrival, Workload
from slosched.workloads.engine import Engine


def drain(workload: Workload, *, seed: int = 0, duration_ns: int | None = None) -> list[Arrival]:
    """Every arrival that waits for no answer."""
    engine = Engine(workload, seed=seed, duration_ns=duration_ns)
    arrivals = []
    while engine.next_ns() is not None:
        arrivals.append(engine.take())
    return arrivals


#: An arrival -> (how long its answer takes, whether it is served, its SLO), ns.
Server = Callable[[Arrival], tuple[int, bool, int]]


def serve(
    workload: Workload, server: Server, *, duration_ns: int, seed: int = 0
) -> list[tuple[Arrival, int, bool]]:
    """Run `workload` against `server` in virtual time: (arrival, answered at, served), as sent."""
    engine = Engine(workload, seed=seed, duration_ns=duration_ns)
    answers: list[tuple[int, int, Arrival, bool, int]] = []
    sent: list[tuple[Arrival, int, bool]] = []
    while True:
        due_ns = engine.next_ns()
        if answers and (due_ns is None or answers[0][0] <= due_ns):
            at_ns, _, arrival, ok, deadline_ns = heappop(answers)
            engine.answered(arrival, at_ns=at_ns, ok=ok, deadline_ns=deadline_ns)
        elif due_ns is not None:
            arrival = engine.take()
            assert arrival.at_ns == due_ns
            takes_ns, ok, slo_ns = server(arrival)
            at_ns = due_ns + takes_ns
            heappush(answers, (at_ns, arrival.seq, arrival, ok, due_ns + slo_ns))
            sent.append((arrival, at_ns, ok))
        else:
            return sent


def distance_from_uniform(values: Iterable[float]) -> float:
    """Kolmogorov-Smirnov: the largest gap between the values' distribution and the uniform one."""
    ordered = sorted(values)
    n = len(ordered)
    return max(max((i + 1) / n - value, value - i / n) for i, value in enumerate(ordered))


def assert_uniform(values: Iterable[float]) -> None:
    """Hold `values` to the uniform distribution on 0..1 at the 1 % level (1.63 / sqrt(n))."""
    held = list(values)
    assert len(held) > 1000
    assert distance_from_uniform(held) < 1.63 / math.sqrt(len(held))


def assert_poisson_count(count: int, mean: float) -> None:
    """Hold `count` to four standard deviations of a Poisson count of that mean."""
    assert abs(count - mean) < 4 * math.sqrt(mean), f"{count} where {mean:.1f} are expected"


def gamma_cdf(shape: float, x: float) -> float:
    """The Gamma distribution of scale 1, by the series of its incomplete gamma function."""
    if x <= 0:
        return 0.0
    if x > 200 + 10 * shape:
        return 1.0
    term = total = 1 / shape
    n = 1
    while term > total * 1e-16:
        term *= x / (shape + n)
        total += term
        n += 1
    return min(1.0, total * math.exp(shape * math.log(x) - x - math.lgamma(shape)))
