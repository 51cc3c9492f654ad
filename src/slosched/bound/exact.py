"""One GPU, one model, one SLO: the most requests that any scheduler can serve, exactly.

Releases and dues are agreeable then: the request that is released first is due first. That gives two exchanges.

1. Batches run one after the other, so of two batches A before B, A begins and ends sooner. If B serves a
   request that is older than one of A's, swap the two: the older one was released before A's younger one,
   hence before A begins, and is due after B ends, hence after A; the younger one was released before A
   begins, hence before B, and is due no sooner than the older one. So the served ones may be taken
   in order of release, each batch serving neighbours among them.
2. If a batch leaves out a request between its first and its last, and no batch serves that one, let it take
   the place of the batch's first: it was released before the last one was, and is due after the first.
   So each batch serves requests that are next to one another among all.

So a schedule is a walk along the requests: each step leaves out the next one, or serves the next k of
them in one batch, as soon as the GPU is free and the last of them is released (sooner never hurts).
What the rest of the walk needs to know is when the GPU is free; of all walks to the same request only
those are kept that no other beats in both, free time and number served.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from slosched.bound.problem import Batch, Classes, Problem, Request
from slosched.errors import InvalidConfig

#: A walk: when the GPU is free, how many are served, and its last batch (first request, size, start) with
#: the walk before it.
_Walk = tuple[int, int, "_Link | None"]
_Link = tuple[tuple[int, int, int], "_Link | None"]


def is_exactly_solvable(problem: Problem) -> bool:
    """True for one GPU, requests of one model that nothing interrupts, and dues in the order of releases."""
    requests = problem.requests
    return (
        problem.gpus == 1
        and not problem.interruptible
        and len({request.model for request in requests}) <= 1
        and all(a.due_ns <= b.due_ns for a, b in pairwise(requests))
    )


def optimum(problem: Problem) -> list[Batch]:
    """A schedule that serves as many requests as any can. Raises InvalidConfig where this is not exact."""
    if not is_exactly_solvable(problem):
        raise InvalidConfig("the exact optimum is for one GPU, one model and one SLO")
    requests = problem.requests
    if not requests:
        return []
    model = requests[0].model
    exec_ns = _by_size(problem.classes[model][0])
    fronts: list[list[_Walk]] = [[] for _ in range(len(requests) + 1)]
    fronts[0].append((0, 0, None))
    for first in range(len(requests)):
        for walk in _front(fronts[first], requests[first].release_ns):
            fronts[first + 1].append(walk)
            _serve_next(requests, first, walk, exec_ns, fronts)
        fronts[first] = []
    best = max(fronts[-1], key=lambda walk: walk[1])
    return _batches(best[2], problem.classes[model][0], model)


def _by_size(table: Classes) -> list[tuple[int, int]]:
    """(k, exec time of the fastest class that holds k), for every k up to the largest class."""
    if not table:
        return []
    sizes = range(1, max(table) + 1)
    return [(k, min(ns for batch, ns in table.items() if batch >= k)) for k in sizes]


def _front(walks: list[_Walk], release_ns: int) -> list[_Walk]:
    """The walks that no other beats. Before `release_ns` the GPU has nothing more to do."""
    front: list[_Walk] = []
    most = -1
    for free_ns, served, link in sorted(
        ((max(free_ns, release_ns), served, link) for free_ns, served, link in walks),
        key=lambda walk: (walk[0], -walk[1]),
    ):
        if served > most:
            most = served
            front.append((free_ns, served, link))
    return front


def _serve_next(
    requests: Sequence[Request],
    first: int,
    walk: _Walk,
    exec_ns: Sequence[tuple[int, int]],
    fronts: list[list[_Walk]],
) -> None:
    """Every batch with which `walk` can go on at request `first`."""
    free_ns, served, link = walk
    due_ns = requests[first].due_ns
    for size, batch_ns in exec_ns:
        last = first + size - 1
        if last >= len(requests):
            return
        start_ns = max(free_ns, requests[last].release_ns)
        if start_ns >= due_ns:
            return
        if start_ns + batch_ns <= due_ns:
            step = ((first, size, start_ns), link)
            fronts[first + size].append((start_ns + batch_ns, served + size, step))


def _batches(link: _Link | None, table: Classes, model: int) -> list[Batch]:
    """The batches of a walk, in order."""
    batches: list[Batch] = []
    while link is not None:
        (first, size, start_ns), link = link
        batch, ns = min(
            ((batch, ns) for batch, ns in table.items() if batch >= size), key=lambda pair: pair[1]
        )
        served = tuple(range(first, first + size))
        batches.append(Batch(0, model, batch, start_ns, start_ns + ns, served))
    batches.reverse()
    return batches
