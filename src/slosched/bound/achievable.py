"""The achievable schedule: beam searches with several prices, the best of which counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slosched.bound.beam import BeamSearch, best_costs_ns
from slosched.bound.problem import Batch, Problem

#: Tried on the first requests; see beam.py. Full loads want a high one, light ones and long models a low one.
_PRICES = (0.8, 0.9, 0.5, 0.02)
_PILOT_REQUESTS = 700
#: A first search, this narrow, finds out whether everything can be served easily, and what is usual.
_NARROW, _FIRST_PRICE = 2, 0.6
#: A wide search gains more than that one; measured, a little too much is better than too little.
_MORE = 0.05


def achievable(
    problem: Problem, *, width: int, progress: Callable[[float], None] | None = None
) -> list[Batch]:
    """A feasible schedule that knows every arrival, by start. `progress` gets the share that is done.

    Deterministic; a larger `width` takes proportionally longer, and is seldom worse.
    """
    if not problem.requests:
        return []
    costs_ns = best_costs_ns(problem)
    guess = [_FIRST_PRICE / cost_ns if cost_ns else 0.0 for cost_ns in costs_ns]
    narrow = min(_NARROW, width)
    best = BeamSearch(problem, width=narrow, price=_FIRST_PRICE, per_ns=guess).run()
    share = _count(best) / len(problem.requests)
    if share == 1:
        return best
    share = min(1.0, share + _MORE)
    prices = list(_PRICES)
    if len(problem.requests) > _PILOT_REQUESTS:
        pilot = replace(problem, requests=problem.requests[:_PILOT_REQUESTS])
        half = max(2, width // 2)
        counts = {p: _count(_search(pilot, half, p, share, costs_ns).run()) for p in prices}
        prices = [max(prices, key=lambda price: counts[price])]
    for price in prices:
        found = _search(problem, width, price, share, costs_ns).run(progress)
        best = max(best, found, key=_count)
    return best


def _search(
    problem: Problem, width: int, price: float, share: float, costs_ns: list[float]
) -> BeamSearch:
    """A search in which what is gained per ns is what a schedule that serves `share` gains."""
    requests = problem.requests
    length_ns = max(1, requests[-1].release_ns - requests[0].release_ns)
    gained = max(0.0, price * share - (1 - price) * (1 - share)) * len(requests)
    # A kind of GPU that is twice as fast gains twice as much.
    speeds = [1 / cost_ns if cost_ns else 0.0 for cost_ns in costs_ns]
    total = sum(kind.count * speed for kind, speed in zip(problem.kinds, speeds, strict=True))
    per_ns = [gained / length_ns * speed / total if total else 0.0 for speed in speeds]
    return BeamSearch(problem, width=width, price=price, per_ns=per_ns)


def _count(schedule: list[Batch]) -> int:
    return sum(len(batch.requests) for batch in schedule)
