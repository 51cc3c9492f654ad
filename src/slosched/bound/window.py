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
reach than the next smaller one can carry is left out, since that one is faster.

Models whose requests may wait long have a start in each of very many slots. Where the programme would be
too large, the largest such models become *fluid*: each of their requests takes its share of a batch's
time, in any slots from its release to its due. The share is exec / k for the class where that is least,
k being the class or, if fewer, the number of the model's requests that could be in one batch with
it. A real batch of j such requests runs no shorter than the sum of their shares, so this only adds, too.
Models whose runs can be interrupted are fluid always: a share may lie in any slots, with pauses between them.

Window edges: all requests that *arrive* in the window are counted, and nothing else is: the GPUs are free
when it begins, and stay free for these requests after it ends. Whatever a scheduler does with the rest
of the time, it serves no more of these. Shorter windows are therefore looser. A schedule serves whole
requests, so the value is cut to a whole number.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slosched.bound.problem import Classes, Problem, Request
from slosched.bound.solver import Integers, Programme

#: HiGHS is exact to about 1e-7 per row: this much above a whole number still counts as it.
_ROUNDING = 1e-4
#: Slots in a block of fluid work.
_BLOCK = 20


@dataclass(frozen=True)
class WindowBound:
    """At most `served` of the window's `requests` can be served. None: it was too large to solve.

    `size` is the programme's number of coefficients, `fluid` says of how many models the work was
    treated as fluid to keep it small.
    """

    requests: int
    served: int | None
    size: int
    fluid: int


def window_bound(
    problem: Problem,
    requests: Sequence[Request],
    *,
    grid_ns: int,
    largest: int,
    time_limit_s: float,
) -> WindowBound:
    """The bound for `requests`, which are some of the problem's and have the GPUs to themselves.

    Models become fluid until there are at most `largest` coefficients; if that does not suffice it is
    not tried, and one that takes longer than the limit is given up. Raises MissingPackage without scipy.
    """
    build = _Build(problem, requests, grid_ns)
    fluid = build.choose_fluid(largest)
    lp = build.programme(fluid)
    value = lp.solve(time_limit_s=time_limit_s) if lp.size <= largest else None
    served = None if value is None else min(len(requests), math.floor(value + _ROUNDING))
    smaller = [model for model in fluid if model not in problem.interruptible]
    return WindowBound(len(requests), served, lp.size, len(smaller))


@dataclass(frozen=True)
class _Reach:
    """Where one model's batches of one class may begin: pairs of (request, slot), and how many in each."""

    who: Integers
    slot: Integers
    in_reach: Integers

    def size(self, batch: int) -> int:
        starts = 0 if batch == 1 else int(np.count_nonzero(self.in_reach))
        return len(self.who) * (3 if batch == 1 else 4) + 3 * starts


class _Build:
    """The programme of one window."""

    def __init__(self, problem: Problem, requests: Sequence[Request], grid_ns: int) -> None:
        self._problem = problem
        self._grid_ns = grid_ns
        self._base_ns = min((r.release_ns for r in requests), default=0) // grid_ns * grid_ns
        self._by_model: dict[int, list[tuple[int, Request]]] = {}
        for place, request in enumerate(requests):
            self._by_model.setdefault(request.model, []).append((place, request))
        last = max((self._slot(r.due_ns) for r in requests if r.due_ns > r.release_ns), default=0)
        self._blocks = last // _BLOCK + 1
        self._slots = self._blocks * _BLOCK
        self._count = len(requests)
        self._lp = Programme()

    def _slot(self, at_ns: int) -> int:
        return (at_ns - self._base_ns) // self._grid_ns

    def choose_fluid(self, largest: int) -> list[int]:
        """The models to be treated as fluid: those that can be interrupted, and more where there would be more
        than `largest` coefficients.
        """
        sizes = []
        for model, members in self._by_model.items():
            exactly = sum(
                self._reach(members, table[batch], fewest).size(batch)
                for table in self._problem.classes[model]
                for batch, fewest in useful_classes(table).items()
            )
            sizes.append((exactly - self._fluid_size(members), model))
        total = sum(size for size, _ in sizes)
        total += sum(self._fluid_size(members) for members in self._by_model.values())
        total += 3 * self._slots * len(self._problem.kinds)  # what runs, whatever begins
        interruptible = self._problem.interruptible
        fluid = [model for _, model in sizes if model in interruptible]
        total -= sum(saved for saved, model in sizes if model in interruptible)
        for saved, model in sorted(sizes, reverse=True):
            if total <= largest or saved <= 0:
                break
            if model not in interruptible:
                fluid.append(model)
                total -= saved
        return fluid

    def _fluid_size(self, members: Sequence[tuple[int, Request]]) -> int:
        blocks = sum(
            max(0, r.due_ns - r.release_ns) // (self._grid_ns * _BLOCK) + 2 for _, r in members
        )
        return blocks * 2 * len(self._problem.kinds)

    def programme(self, fluid: Sequence[int]) -> Programme:
        """Build it."""
        lp = self._lp
        lp.add_rows(np.ones(self._count))  # row i: request i is served at most once
        slots = np.arange(self._slots, dtype=np.int64)
        for place, kind in enumerate(self._problem.kinds):
            # Column `running + t`: batches that run in slot t; its row says how it follows from the last.
            running = lp.add_columns(self._slots, gain=0.0, upper=float(kind.count))
            flow = lp.add_rows(np.zeros(self._slots), equal=True)
            lp.put(flow + slots, running + slots, 1.0, equal=True)
            lp.put(flow + slots[1:], running + slots[:-1], -1.0, equal=True)
            for model, members in self._by_model.items():
                table = self._problem.classes[model][place]
                if model not in fluid:
                    for batch, fewest in useful_classes(table).items():
                        self._add_class(members, table[batch], batch, fewest, flow)
            if fluid:
                full = np.full(self._blocks, float(kind.count * _BLOCK))
                blocks = lp.add_rows(full)  # running batches and fluid work fill no block twice
                lp.put(blocks + slots // _BLOCK, running + slots, 1.0)
                for model in fluid:
                    table = self._problem.classes[model][place]
                    self._add_fluid(self._by_model[model], table, blocks)
        return lp

    def _reach(self, members: Sequence[tuple[int, Request]], exec_ns: int, fewest: int) -> _Reach:
        """Which requests can be in a batch that begins in each slot; slots with fewer than `fewest` are out."""
        fitting = [(i, r) for i, r in members if r.due_ns - r.release_ns >= exec_ns]
        requests = np.array([i for i, _ in fitting], dtype=np.int64)
        first = np.array([self._slot(r.release_ns) for _, r in fitting], dtype=np.int64)
        last = np.array([self._slot(r.due_ns - exec_ns) for _, r in fitting], dtype=np.int64)
        change = np.zeros(self._slots + 1, dtype=np.int64)
        np.add.at(change, first, 1)
        np.add.at(change, last + 1, -1)
        in_reach = np.cumsum(change)[: self._slots]
        in_reach[in_reach < fewest] = 0
        lengths = last - first + 1
        who = np.repeat(requests, lengths)
        before = np.cumsum(lengths) - lengths
        slot = np.arange(len(who), dtype=np.int64) - np.repeat(before - first, lengths)
        keep = in_reach[slot] > 0
        return _Reach(who[keep], slot[keep], in_reach)

    def _add_class(
        self,
        members: Sequence[tuple[int, Request]],
        exec_ns: int,
        batch: int,
        fewest: int,
        flow: int,
    ) -> None:
        """Starts of one model's batches of one class on one kind, and which requests they serve."""
        reach = self._reach(members, exec_ns, fewest)
        who, slot = reach.who, reach.slot
        if not len(who):
            return
        lp = self._lp
        serves = lp.add_columns(len(who), gain=1.0, upper=1.0) + np.arange(len(who))
        lp.put(who, serves, 1.0)
        if batch == 1:
            self._occupy(serves, slot, exec_ns, flow)
            return
        starts_at = np.flatnonzero(reach.in_reach)
        starts = lp.add_columns(len(starts_at), gain=0.0, upper=np.inf)
        start_of = np.zeros(self._slots, dtype=np.int64)
        start_of[starts_at] = starts + np.arange(len(starts_at))
        strong = lp.add_rows(np.zeros(len(who))) + np.arange(len(who))
        lp.put(strong, serves, 1.0)
        lp.put(strong, start_of[slot], -1.0)
        # A batch holds `batch` requests: that needs saying where more are in reach.
        full = np.flatnonzero(reach.in_reach > batch)
        row_of = np.full(self._slots, -1, dtype=np.int64)
        row_of[full] = lp.add_rows(np.zeros(len(full))) + np.arange(len(full))
        inside = row_of[slot] >= 0
        lp.put(row_of[slot[inside]], serves[inside], 1.0)
        lp.put(row_of[full], start_of[full], float(-batch))
        self._occupy(start_of[starts_at], starts_at, exec_ns, flow)

    def _occupy(self, starts: Integers, slot: Integers, exec_ns: int, flow: int) -> None:
        """What begins in `slot` runs until its exec time, cut to whole slots, is over."""
        ends = slot + exec_ns // self._grid_ns
        self._lp.put(flow + slot, starts, -1.0, equal=True)
        inside = ends < self._slots
        self._lp.put(flow + ends[inside], starts[inside], 1.0, equal=True)

    def _add_fluid(
        self, members: Sequence[tuple[int, Request]], table: Classes, blocks: int
    ) -> None:
        """Each request's own work on one kind, in the blocks from its release to its due."""
        lp = self._lp
        shares = self._least_shares(members, table)
        for (place, request), slots in zip(members, shares, strict=True):
            if slots is None:
                continue
            first = self._slot(request.release_ns) // _BLOCK
            last = self._slot(request.due_ns) // _BLOCK
            reach = np.arange(first, last + 1, dtype=np.int64)
            serves = lp.add_columns(len(reach), gain=1.0, upper=1.0) + np.arange(len(reach))
            lp.put(np.full(len(reach), place), serves, 1.0)
            lp.put(blocks + reach, serves, slots)

    def _least_shares(
        self, members: Sequence[tuple[int, Request]], table: Classes
    ) -> list[float | None]:
        """The least work, in slots, that serving each request can cost. None: no class is in time."""
        shares: list[float | None] = [None] * len(members)
        for batch, exec_ns in table.items():
            fitting = [r for _, r in members if r.due_ns - r.release_ns >= exec_ns]
            releases = sorted(r.release_ns for r in fitting)
            dues = sorted(r.due_ns for r in fitting)
            for i, (_, request) in enumerate(members):
                if request.due_ns - request.release_ns < exec_ns:
                    continue
                # With it can be: all but those released too late and those due too soon. No one is
                # both, or it would not fit the class itself.
                together = bisect_right(releases, request.due_ns - exec_ns)
                together -= bisect_left(dues, request.release_ns + exec_ns)
                share = exec_ns // self._grid_ns / min(batch, together)
                least = shares[i]
                shares[i] = share if least is None else min(least, share)
        return shares


def useful_classes(table: Classes) -> dict[int, int]:
    """Each class, and the fewest requests with which it can be of use.

    With fewer, a smaller class does the same sooner. A class is left out if a larger one is as fast.
    """
    kept = [
        batch
        for batch, exec_ns in sorted(table.items())
        if not any(other > batch and ns <= exec_ns for other, ns in table.items())
    ]
    return {batch: 1 + before for before, batch in zip([0, *kept], kept, strict=False)}
