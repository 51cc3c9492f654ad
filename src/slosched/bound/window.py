"""A clairvoyant upper bound on how many requests of a window can be served: a linear relaxation.

Time is cut into slots of `grid_ns`. Variables: how many batches of a model, kind of GPU and class begin
in each slot, and how much of each request each of these serves. Constraints:

- a request is served at most once, and only by batches in which it may be: released by the end of the
  slot, and in time if the batch begins at the slot's beginning;
- a batch of class b serves at most b requests, and at most as much of any one as there are batches
  (without this, a fraction of a large batch could serve a single request at a fraction of its cost);
- in no slot more batches run than there are GPUs of the kind.

It is an upper bound: take any real schedule and move each start down to its slot's beginning. What was
released stays released by the slot's end, what was in time stays so; and if one batch follows another on
a GPU, start' >= start + exec, then floor(start') >= floor(start) + floor(exec), so with exec times cut to
whole slots no two overlap. Relaxing whole numbers to fractions only adds. A class with fewer requests in
reach than the next smaller one can carry is left out where that one is no slower.

Window edges: all requests that *arrive* in the window are counted, and nothing else is: the GPUs are free
when it begins, and stay free for these requests after it ends. Whatever a scheduler does with the rest
of the time, it serves no more of these. Shorter windows are therefore looser. A schedule serves whole
requests, so the value is cut to a whole number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slosched.bound.problem import Classes, Problem, Request
from slosched.bound.solver import Integers, Programme

#: HiGHS is exact to about 1e-7 per row: this much above a whole number still counts as it.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class WindowBound:
    """At most `served` of the window's `requests` can be served. None: it was too large to solve.

    `size` is the programme's number of coefficients.
    """

    requests: int
    served: int | None
    size: int


def window_bound(
    problem: Problem,
    requests: Sequence[Request],
    *,
    grid_ns: int,
    largest: int,
    time_limit_s: float,
) -> WindowBound:
    """The bound for `requests`, which are some of the problem's and have the GPUs to themselves.

    A programme of more than `largest` coefficients is not tried, one that takes longer is given up.
    Raises MissingPackage without scipy.
    """
    build = _Build(problem, requests, grid_ns, largest)
    size = build.size()
    if size > largest:
        return WindowBound(len(requests), None, size)
    value = build.programme().solve(time_limit_s=time_limit_s)
    served = None if value is None else min(len(requests), math.floor(value + _ROUNDING))
    return WindowBound(len(requests), served, build.built.size)


class _Build:
    """The programme of one window."""

    def __init__(
        self, problem: Problem, requests: Sequence[Request], grid_ns: int, largest: int
    ) -> None:
        self._problem = problem
        self._grid_ns = grid_ns
        self._largest = largest
        self._base_ns = min((r.release_ns for r in requests), default=0) // grid_ns * grid_ns
        self._by_model: dict[int, list[tuple[int, Request]]] = {}
        for place, request in enumerate(requests):
            self._by_model.setdefault(request.model, []).append((place, request))
        self._slots = 1 + max(
            (self._slot(r.due_ns) for r in requests if r.due_ns > r.release_ns), default=0
        )
        self._count = len(requests)
        self.built = Programme()

    def _slot(self, at_ns: int) -> int:
        return (at_ns - self._base_ns) // self._grid_ns

    def size(self) -> int:
        """About how many coefficients there will be, from above."""
        total = 0
        for model, members in self._by_model.items():
            for table in self._problem.classes[model]:
                for exec_ns in table.values():
                    for _, request in members:
                        room_ns = request.due_ns - request.release_ns - exec_ns
                        total += max(0, room_ns // self._grid_ns + 1) * 4 if room_ns >= 0 else 0
        return total

    def programme(self) -> Programme:
        """Build it."""
        lp = self.built
        lp.add_rows(np.ones(self._count))  # row i: request i is served at most once
        for place, kind in enumerate(self._problem.kinds):
            # Column `running + t`: batches that run in slot t; its row says how it follows from the last.
            running = lp.add_columns(self._slots, gain=0.0, upper=float(kind.count))
            flow = lp.add_rows(np.zeros(self._slots), equal=True)
            slots = np.arange(self._slots, dtype=np.int64)
            lp.put(flow + slots, running + slots, 1.0, equal=True)
            lp.put(flow + slots[1:], running + slots[:-1], -1.0, equal=True)
            for model, members in self._by_model.items():
                table = self._problem.classes[model][place]
                for batch, fewest in useful_classes(table).items():
                    self._add_class(members, table[batch], batch, fewest, flow)
        return lp

    def _add_class(
        self,
        members: Sequence[tuple[int, Request]],
        exec_ns: int,
        batch: int,
        fewest: int,
        flow: int,
    ) -> None:
        """Starts of one model's batches of one class on one kind, and whom they serve."""
        fitting = [(i, r) for i, r in members if r.due_ns - r.release_ns >= exec_ns]
        if not fitting:
            return
        lp = self.built
        requests = np.array([i for i, _ in fitting], dtype=np.int64)
        first = np.array([self._slot(r.release_ns) for _, r in fitting], dtype=np.int64)
        last = np.array([self._slot(r.due_ns - exec_ns) for _, r in fitting], dtype=np.int64)
        change = np.zeros(self._slots + 1, dtype=np.int64)
        np.add.at(change, first, 1)
        np.add.at(change, last + 1, -1)
        in_reach = np.cumsum(change)[: self._slots]
        lengths = last - first + 1
        who = np.repeat(requests, lengths)
        ends = np.cumsum(lengths)
        slot = np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - lengths - first, lengths)
        keep = in_reach[slot] >= fewest
        who, slot = who[keep], slot[keep]
        if not len(who):
            return
        if batch == 1:
            serves = lp.add_columns(len(who), gain=1.0, upper=1.0) + np.arange(len(who))
            lp.put(who, serves, 1.0)
            self._occupy(serves, slot, exec_ns, flow)
            return
        starts_at = np.flatnonzero(in_reach >= fewest)
        starts = lp.add_columns(len(starts_at), gain=0.0, upper=np.inf)
        start_of = np.zeros(self._slots, dtype=np.int64)
        start_of[starts_at] = starts + np.arange(len(starts_at))
        serves = lp.add_columns(len(who), gain=1.0, upper=1.0) + np.arange(len(who))
        lp.put(who, serves, 1.0)
        strong = lp.add_rows(np.zeros(len(who))) + np.arange(len(who))
        lp.put(strong, serves, 1.0)
        lp.put(strong, start_of[slot], -1.0)
        self._fill(start_of, in_reach, batch, slot, serves)
        self._occupy(start_of[starts_at], starts_at, exec_ns, flow)

    def _fill(
        self,
        start_of: Integers,
        in_reach: NDArray[np.int64],
        batch: int,
        slot: Integers,
        serves: Integers,
    ) -> None:
        """A batch holds `batch` requests: needed where more are in reach."""
        full = np.flatnonzero(in_reach > batch)
        if not len(full):
            return
        row_of = np.full(self._slots, -1, dtype=np.int64)
        row_of[full] = self.built.add_rows(np.zeros(len(full))) + np.arange(len(full))
        inside = row_of[slot] >= 0
        self.built.put(row_of[slot[inside]], serves[inside], 1.0)
        self.built.put(row_of[full], start_of[full], float(-batch))

    def _occupy(self, starts: Integers, slot: Integers, exec_ns: int, flow: int) -> None:
        """What begins in `slot` runs until its exec time, cut to whole slots, is over."""
        over = slot + exec_ns // self._grid_ns
        self.built.put(flow + slot, starts, -1.0, equal=True)
        inside = over < self._slots
        self.built.put(flow + over[inside], starts[inside], 1.0, equal=True)


def useful_classes(table: Classes) -> dict[int, int]:
    """Each class, and the fewest requests with which it can be of use.

    With fewer, a smaller class that is no slower does the same. A class that a larger one beats in time
    is left out.
    """
    kept = [
        batch
        for batch, exec_ns in sorted(table.items())
        if not any(other > batch and ns <= exec_ns for other, ns in table.items())
    ]
    return {batch: 1 + before for before, batch in zip([0, *kept], kept, strict=False)}
