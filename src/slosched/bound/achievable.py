"""The achievable schedule: beam searches with several prices, the best of which counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slosched.bound.beam import BeamSearch
from slosched.bound.problem import Batch, Problem

#: Tried on the first requests; see beam.py. Most loads want a high one, some a low one.
_PRICES = (0.85, 0.6, 0.95, 0.3)
_PILOT_REQUESTS = 700
#: A first search this narrow finds out whether everything can be served easily.
_NARROW = 2


def achievable(
    problem: Problem, *, width: int, progress: Callable[[float], None] | None = None
) -> list[Batch]:
    """A feasible schedule that knows every arrival, by start. `progress` gets the share that is done.

    Deterministic; a larger `width` takes proportionally longer, and is seldom worse.
    """
    best = BeamSearch(problem, width=min(_NARROW, width), price=_PRICES[1]).run()
    if _count(best) == len(problem.requests):
        return best
    for price in _prices(problem, width)[: 1 if len(problem.requests) > _PILOT_REQUESTS else None]:
        found = BeamSearch(problem, width=width, price=price).run(progress)
        best = max(best, found, key=_count)
    return best


def _prices(problem: Problem, width: int) -> list[float]:
    """The prices, best first; found out on the first requests where there are many."""
    if len(problem.requests) <= _PILOT_REQUESTS:
        return list(_PRICES)
    pilot = replace(problem, requests=problem.requests[:_PILOT_REQUESTS])
    narrow = max(2, width // 2)
    counts = {
        price: _count(BeamSearch(pilot, width=narrow, price=price).run()) for price in _PRICES
    }
    return sorted(_PRICES, key=lambda price: -counts[price])


def _count(schedule: list[Batch]) -> int:
    return sum(len(batch.requests) for batch in schedule)
