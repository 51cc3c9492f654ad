"""A clairvoyant schedule that can be achieved: beam search over whole schedules.

A state is a schedule so far: when each GPU is free, and which requests still wait. The GPU that is free
first gets the next batch, or waits for the next event. A schedule is feasible by construction: a batch
begins when its GPU is free and its requests are released, and ends by the first of their dues.

From each state the batches that look best are tried: by the index of the policy that the simulator runs,
virtual deadline less a credit for each request, over the batches that can begin now and those worth a
wait for a request which is known to come; and the one that can wait least. `width` of the resulting
schedules are kept, those with the best

    price x served - (1 - price) x lost - nearly lost - per_ns x GPU time that has passed

States are compared after equally many steps, some further in time than others: `per_ns` is what usually is
gained in a ns of GPU time, so that being further is neither good nor bad. With price 0 it counts what is
lost, with price 1 what is served; which is right depends on the load (achievable.py tries several). A
waiting request with little time left is nearly lost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from statistics import median_low
from typing import Any

from slosched.bound.problem import Batch, Problem
from slosched.bound.window import useful_classes

#: A batch that may come next: index, latest start, model, class, start, end, requests.
_Found = tuple[float, int, int, int, int, int, tuple[int, ...]]
#: A waiting request without time left counts as _NEAR of a lost one; that falls with the time left, by a
#: factor of e for each _NEAR_UNITS typical execs.
_NEAR, _NEAR_UNITS = 0.3, 0.3
#: If every candidate batch exceeds this multiple of a typical one, idling is also a candidate.
_LONG = 3.0

#: A schedule, last batch first: (batch as a tuple, what came before).
_Link = tuple[tuple[int, int, int, int, int, tuple[int, ...]], Any]


@dataclass(slots=True)
class _State:
    """A schedule so far. `waiting` are released or soon to be; requests from `following` on are not yet."""

    free_ns: tuple[int, ...]
    waiting: list[int]
    following: int
    served: int
    lost: int
    value: float
    link: _Link | None


@dataclass(frozen=True)
class _Move:
    """One possible next step of a state."""

    value: float
    parent: int
    gpu: int
    model: int
    batch: int
    start_ns: int
    end_ns: int
    members: tuple[int, ...]
    lost: int


class BeamSearch:
    """Schedules for `problem` with one price and width."""

    def __init__(
        self,
        problem: Problem,
        *,
        width: int,
        price: float,
        per_ns: Sequence[float],
        branches: int = 4,
    ) -> None:
        self._problem = problem
        self._width = width
        self._branches = branches
        self._price = price
        self._release_ns = [r.release_ns for r in problem.requests]
        self._due_ns = [r.due_ns for r in problem.requests]
        self._model = [r.model for r in problem.requests]
        self._kind = [problem.kind_of(gpu) for gpu in range(problem.gpus)]
        self._tables = [
            [
                [(b, fewest, table[b]) for b, fewest in useful_classes(table).items()]
                for table in kinds
            ]
            for kinds in problem.classes
        ]
        fastest = [min((t[1] for t in kinds if t), default=0) for kinds in problem.classes]
        self._latest_ns = [r.due_ns - fastest[r.model] for r in problem.requests]
        self._per_ns = [per_ns[kind] for kind in self._kind]
        self._unit_ns = float(median_low(fastest)) if fastest else 1.0
        self._most_wait_ns = round(0.6 * self._unit_ns)

    def run(self, progress: Callable[[float], None] | None = None) -> list[Batch]:
        """The best schedule found, by start. `progress` gets the share of requests that are decided."""
        start = _State((0,) * self._problem.gpus, [], 0, 0, 0, 0.0, None)
        beam, best = [start], start
        steps = 0
        while beam:
            moves: list[_Move] = []
            for parent, state in enumerate(beam):
                if not self._advance(state):
                    if state.served > best.served:
                        best = state
                    continue
                moves += self._moves(parent, state)
            moves.sort(key=_by_value)
            beam = self._keep(beam, moves)
            steps += 1
            if progress is not None and beam and steps % 200 == 0:
                progress(beam[0].following / max(1, len(self._due_ns)))
        return _unlinked(best.link)

    def _advance(self, state: _State) -> bool:
        """Take in what is released until the first GPU is free. False: nothing is left to do."""
        free_ns = min(state.free_ns)
        release_ns, total = self._release_ns, len(self._release_ns)
        following = state.following
        if not state.waiting:
            if following >= total:
                return False
            free_ns = max(free_ns, release_ns[following])
        latest_ns = self._latest_ns
        waiting = [i for i in state.waiting if latest_ns[i] >= free_ns]
        state.lost += len(state.waiting) - len(waiting)
        until_ns = free_ns + self._most_wait_ns
        while following < total and release_ns[following] <= until_ns:
            if latest_ns[following] >= max(free_ns, release_ns[following]):
                waiting.append(following)
            else:
                state.lost += 1
            following += 1
        state.waiting, state.following = waiting, following
        return bool(waiting) or following < total

    def _moves(self, parent: int, state: _State) -> list[_Move]:
        """What the GPU that is free first may do next: the most promising batches, or wait."""
        free = state.free_ns
        free_ns = min(free)
        gpu = free.index(free_ns)
        others_ns = min((ns for g, ns in enumerate(free) if g != gpu), default=2**62)
        if not state.waiting:
            return [self._idle(parent, state, gpu, free_ns)]
        first_ns = min(self._release_ns[i] for i in state.waiting)
        now_ns = max(free_ns, first_ns)
        by_model: dict[int, list[int]] = {}
        for i in state.waiting:
            by_model.setdefault(self._model[i], []).append(i)
        found: list[_Found] = []
        for model, members in by_model.items():
            for batch, fewest, exec_ns in self._tables[model][self._kind[gpu]]:
                self._batches(members, batch, fewest, exec_ns, now_ns, model, found)
        moves = []
        latest = sorted(self._latest_ns[i] for i in state.waiting)
        near = self._near_loss(state.waiting, now_ns)
        before = -self._spent(free) - sum(near.values())
        for _, _, model, batch, start_ns, end_ns, taken in self._promising(found):
            next_ns = min(others_ns, end_ns)
            lost = bisect_left(latest, next_ns)
            lost -= sum(self._latest_ns[i] < next_ns for i in taken)
            value = (
                self._price * (state.served + len(taken))
                - (1 - self._price) * (state.lost + lost)
                + before
                + sum(near[i] for i in taken)
                - self._per_ns[gpu] * (end_ns - free_ns)
            )
            moves.append(_Move(value, parent, gpu, model, batch, start_ns, end_ns, taken, lost))
        if not moves or min(m.end_ns for m in moves) - now_ns > _LONG * self._unit_ns:
            moves.append(self._idle(parent, state, gpu, free_ns))
        return moves

    def _near_loss(self, waiting: Sequence[int], now_ns: int) -> dict[int, float]:
        """For each that waits, how much of a request is as good as lost if it is not served now."""
        scale = 1 / (_NEAR_UNITS * self._unit_ns)
        return {i: _NEAR * exp(min(0.0, (now_ns - self._latest_ns[i]) * scale)) for i in waiting}

    def _promising(self, found: list[_Found]) -> list[_Found]:
        """The best by index, and the one that can wait least: long models would never be the best."""
        found.sort()
        chosen = found[: self._branches - 1]
        rest = found[self._branches - 1 :]
        if self._branches == 1 or not rest:
            return found[: self._branches]
        return [*chosen, min(rest, key=_by_latest)]

    def _spent(self, free_ns: Sequence[int]) -> float:
        return sum(each * ns for each, ns in zip(self._per_ns, free_ns, strict=True))

    def _batches(
        self,
        members: list[int],
        batch: int,
        fewest: int,
        exec_ns: int,
        now_ns: int,
        model: int,
        found: list[_Found],
    ) -> None:
        """Batches of one model and class: the oldest that can be in time, now or with the next to come."""
        release_ns, due_ns = self._release_ns, self._due_ns
        ends_ns = now_ns + exec_ns
        fitting = [i for i in members if release_ns[i] <= now_ns and due_ns[i] >= ends_ns]
        if len(fitting) >= fewest:
            self._found(fitting[:batch], batch, exec_ns, now_ns, now_ns, model, members, found)
        if len(fitting) >= batch:
            return
        had = len(fitting)
        for coming in members:
            start_ns = release_ns[coming]
            if start_ns <= now_ns or start_ns > now_ns + self._most_wait_ns:
                continue
            ends_ns = start_ns + exec_ns
            fitting = [i for i in members if release_ns[i] <= start_ns and due_ns[i] >= ends_ns]
            if len(fitting) > had and len(fitting) >= fewest:
                had = len(fitting)
                self._found(
                    fitting[:batch], batch, exec_ns, start_ns, now_ns, model, members, found
                )
            if len(fitting) >= batch:
                return

    def _found(
        self,
        taken: list[int],
        batch: int,
        exec_ns: int,
        start_ns: int,
        now_ns: int,
        model: int,
        members: list[int],
        found: list[_Found],
    ) -> None:
        price, unit_ns = self._price, self._unit_ns
        key = (
            self._due_ns[taken[0]]
            + 0.25 * self._due_ns[members[0]]
            - (1.9 + 3.4 * price) * unit_ns * len(taken)
            + (2.3 + 4 * price) * (exec_ns + start_ns - now_ns)
        )
        latest_ns = self._due_ns[taken[0]] - exec_ns
        found.append((key, latest_ns, model, batch, start_ns, start_ns + exec_ns, tuple(taken)))

    def _idle(self, parent: int, state: _State, gpu: int, free_ns: int) -> _Move:
        """The GPU does nothing until another one is free, or something new is released."""
        release_ns = self._release_ns
        events = [release_ns[i] for i in state.waiting if release_ns[i] > free_ns]
        if state.following < len(release_ns):
            events.append(max(free_ns + 1, release_ns[state.following]))
        events += [ns for ns in state.free_ns if ns > free_ns]
        # Without one, nothing that waits will ever be for this GPU.
        until_ns = min(events) if events else 1 + max(self._latest_ns[i] for i in state.waiting)
        latest_ns = self._latest_ns
        lost = sum(latest_ns[i] < until_ns for i in state.waiting)
        value = (
            self._price * state.served
            - (1 - self._price) * (state.lost + lost)
            - self._spent(state.free_ns)
            - self._per_ns[gpu] * (until_ns - free_ns)
        )
        return _Move(value, parent, gpu, -1, 0, free_ns, until_ns, (), lost)

    def _keep(self, beam: list[_State], moves: list[_Move]) -> list[_State]:
        """The best distinct states that follow."""
        kept: list[_State] = []
        seen: dict[tuple[object, ...], None] = {}
        for move in moves:
            parent = beam[move.parent]
            free = list(parent.free_ns)
            free[move.gpu] = move.end_ns
            taken = move.members
            waiting = [i for i in parent.waiting if i not in taken]
            alike = (tuple(sorted(zip(free, self._kind, strict=True))), tuple(waiting))
            if alike in seen:
                continue
            seen[alike] = None
            link = parent.link
            if taken:
                link = (
                    (move.gpu, move.model, move.batch, move.start_ns, move.end_ns, taken),
                    parent.link,
                )
            kept.append(
                _State(
                    tuple(free),
                    waiting,
                    parent.following,
                    parent.served + len(taken),
                    parent.lost,
                    move.value,
                    link,
                )
            )
            if len(kept) == self._width:
                break
        return kept


def _by_latest(found: _Found) -> int:
    return found[1]


def _by_value(move: _Move) -> float:
    return -move.value


def best_costs_ns(problem: Problem) -> list[float]:
    """By kind: GPU time per request in the best batch that fits, for the request in the middle."""
    costs = []
    for kind in range(len(problem.kinds)):
        found = []
        for request in problem.requests:
            fitting = problem.fitting(request, kind)
            if fitting:
                found.append(min(exec_ns / batch for batch, exec_ns in fitting.items()))
        costs.append(median_low(found) if found else 0.0)
    return costs


def _unlinked(link: _Link | None) -> list[Batch]:
    batches = []
    while link is not None:
        batch, link = link
        batches.append(Batch(*batch))
    batches.sort(key=lambda batch: (batch.start_ns, batch.gpu))
    return batches
