"""The achievable schedule: beam searches with several prices, the best of which counts."""

from __future__ import annotations

from collections.abc import Callable

from slosched.bound.beam import BeamSearch, best_costs_ns
from slosched.bound.problem import Batch, Problem

#: Tried narrowly, the best then widely; see beam.py. Full loads want a high one, light ones and long models
#: a low one. Where nearly everything is served, the last is also tried widely: a narrow search with it is
#: short-sighted.
_PRICES = (0.8, 0.9, 0.5, 0.1, 0.02, 0.0)
_NEARLY_ALL = 0.97
_NARROW = 4
#: The first search follows the index alone; it finds out whether everything can be served easily, and what
#: is usual.
_FIRST_PRICE = 0.6
#: A wide search gains more than that one; measured, a little too much is better than too little.
_MORE = 0.06
#: A state with many waiting requests takes longer: beyond the first number on average the search is
#: narrower, but never narrower than the second.
_USUALLY_WAITING, _LEAST_WIDTH = 60, 4


def achievable(
    problem: Problem, *, width: int, progress: Callable[[float], None] | None = None
) -> list[Batch]:
    """A feasible schedule that knows every arrival, by start. `progress` gets the share that is done.

    Deterministic; a larger `width` takes proportionally longer, and is seldom worse. Where very many
    requests wait at a time it is made smaller.
    """
    if not problem.requests:
        return []
    costs_ns = best_costs_ns(problem)
    guess = [_FIRST_PRICE / cost_ns if cost_ns else 0.0 for cost_ns in costs_ns]
    best = BeamSearch(problem, width=1, branches=1, price=_FIRST_PRICE, per_ns=guess).run()
    share = _count(best) / len(problem.requests)
    if share == 1:
        return best
    share = min(1.0, share + _MORE)
    width = _affordable(problem, width)
    narrow = min(width, _NARROW)
    trials = [(narrow, price) for price in _PRICES] + [(width, -1.0), (width, _PRICES[-1])]
    work = sum(each for each, _ in trials)
    counts: list[tuple[int, float]] = []
    for step, (each, price) in enumerate(trials):
        if price < 0:
            price = max(counts)[1]
        elif step == len(trials) - 1 and max(counts)[0] < _NEARLY_ALL * len(problem.requests):
            break
        done = _on(progress, sum(width for width, _ in trials[:step]) / work, each / work)
        found = _search(problem, each, price, share, costs_ns).run(done)
        counts.append((_count(found), price))
        if counts[-1][0] > _count(best):
            best = found
        if counts[-1][0] == len(problem.requests):
            break
    return best


def _on(
    progress: Callable[[float], None] | None, before: float, part: float
) -> Callable[[float], None] | None:
    """What one search reports, as a part of them all."""
    return None if progress is None else lambda share: progress(before + part * share)


def _affordable(problem: Problem, width: int) -> int:
    """`width`, or less where many requests wait at a time because they may wait long."""
    requests = problem.requests
    length_ns = max(1, requests[-1].release_ns - requests[0].release_ns)
    room_ns = sum(max(0, r.due_ns - r.release_ns) for r in requests)
    waiting = room_ns / length_ns
    if waiting <= _USUALLY_WAITING:
        return width
    return max(min(width, _LEAST_WIDTH), round(width * _USUALLY_WAITING / waiting))


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
