"""Small problems for the bounds, what is optimal in them by trying everything, and what a schedule may be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

from hypothesis import strategies as st

from slosched.bound.problem import Batch, Classes, GpuKind, Problem, Request

MS = 1_000_000


def verify(problem: Problem, schedule: Sequence[Batch]) -> int:
    """Assert that `schedule` can be; return how many requests it serves. Shares no code with what made it."""
    seen: dict[int, Batch] = {}
    by_gpu: dict[int, list[Batch]] = {}
    for batch in schedule:
        by_gpu.setdefault(batch.gpu, []).append(batch)
        gpus_of_kind = [kind for kind, each in enumerate(problem.kinds) for _ in range(each.count)]
        assert 0 <= batch.gpu < len(gpus_of_kind), batch
        table = problem.classes[batch.model][gpus_of_kind[batch.gpu]]
        assert batch.end_ns - batch.start_ns == table[batch.batch_class], "exec times are exact"
        assert 1 <= len(batch.requests) <= batch.batch_class, "no class is over-full"
        for place in batch.requests:
            assert place not in seen, f"request {place} is served twice"
            seen[place] = batch
            request = problem.requests[place]
            assert request.model == batch.model
            assert request.release_ns <= batch.start_ns, "nothing starts before its release"
            assert batch.end_ns <= request.due_ns, "nothing ends after its due"
    for batches in by_gpu.values():
        ordered = sorted(batches, key=lambda batch: batch.start_ns)
        for before, after in itertools.pairwise(ordered):
            assert before.end_ns <= after.start_ns, "one batch at a time on a GPU"
    return len(seen)


def most_served(problem: Problem) -> int:
    """The optimum of a tiny problem: every order of every batch on every GPU, each as soon as it can be."""
    kinds = [kind for kind, each in enumerate(problem.kinds) for _ in range(each.count)]
    requests = problem.requests

    @cache
    def best(free: tuple[int, ...], left: frozenset[int]) -> int:
        found = 0
        for size in range(1, len(left) + 1):
            for group in itertools.combinations(sorted(left), size):
                model = requests[group[0]].model
                if any(requests[i].model != model for i in group):
                    continue
                ready_ns = max(requests[i].release_ns for i in group)
                due_ns = min(requests[i].due_ns for i in group)
                for gpu, kind in enumerate(kinds):
                    times = [ns for b, ns in problem.classes[model][kind].items() if b >= size]
                    if not times:
                        continue
                    end_ns = max(free[gpu], ready_ns) + min(times)
                    if end_ns <= due_ns:
                        then = (*free[:gpu], end_ns, *free[gpu + 1 :])
                        found = max(found, size + best(then, left - set(group)))
        return found

    return best((0,) * len(kinds), frozenset(range(len(requests))))


TABLES: tuple[Classes, ...] = (
    {1: 29 * MS // 10, 2: 43 * MS // 10, 4: 62 * MS // 10},
    {1: 2 * MS, 2: 3 * MS},
    {1: 7 * MS},
)


@st.composite
def problems(
    draw: st.DrawFn, *, one_gpu: bool = False, most: int = 5, resolution_ns: int = 70_001
) -> Problem:
    """Up to `most` requests within some ms; with `one_gpu` of one model and one room, else of up to two
    models on up to two GPUs, which may be unequal."""
    count = draw(st.integers(1, most))
    models = 1 if one_gpu else draw(st.integers(1, 2))
    tables = [draw(st.sampled_from(TABLES)) for _ in range(models)]
    unequal = not one_gpu and draw(st.booleans())
    kinds = (GpuKind("fast", 1), GpuKind("slow", 1)) if unequal else (GpuKind("fast", 1),)
    if not one_gpu and not unequal:
        kinds = (GpuKind("fast", draw(st.integers(1, 2))),)
    slow = [{batch: 2 * ns for batch, ns in table.items()} for table in tables]
    classes = tuple(
        (fast, late) if unequal else (fast,) for fast, late in zip(tables, slow, strict=True)
    )
    room_ns = draw(st.integers(20, 200)) * resolution_ns
    requests = []
    for _ in range(count):
        release_ns = draw(st.integers(0, 150)) * resolution_ns
        room = room_ns if one_gpu else draw(st.sampled_from((room_ns, 2 * room_ns)))
        requests.append(Request(draw(st.integers(0, models - 1)), release_ns, release_ns + room))
    return Problem(kinds, classes, tuple(sorted(requests, key=lambda r: r[1:] + r[:1])))
