"""How far apart the boundaries of an interruptible job should be.

Deft's predictor (src/predictor.py): with N launches between two boundaries of a job of n launches of k ms
each, an urgent job waits N k, and the job itself lasts a n / N + b longer; a and b are fitted to measurements
(a = 0.0115 ms, b = 2.92 ms over the twelve pairs of its notebook). Deft takes the best of 13 values; the
closed form is N* = sqrt(a n / k). It weighs a ms of the low job as much as one of the high job, however
seldom each runs.

`tune` counts what is lost in a second instead: the low job's runs times their overhead, and the urgent
arrivals times the wait that they have on average (the part of the time in which the low job runs is what
makes them wait). Where the urgent job has an SLO, a candidate whose longest wait does not fit into what the
SLO leaves over its solo latency is not taken, if there is another; the longest wait counts the longest piece
of work, not the mean one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, sqrt

import msgspec

from slosched.errors import InvalidConfig
from slosched.share_spec import (
    Arriving,
    Boundary,
    BoundaryKind,
    Clients,
    Job,
    Pieces,
    Tuning,
    Urgent,
)
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

#: The values that Deft tries.
DEFT_CANDIDATES = (1, 2, 4, 8, 10, 20, 50, 100, 500, 1_000, 5_000, 10_000, 1_000_000)
DEFT_COST_MS = 0.0115
DEFT_BASE_MS = 2.92

#: What one boundary costs, in ns, by kind. An H200's graph segments: 9 us with one in flight, below 2 us with
#: two (a batch of 64 of ResNet-50 cut into 4 to 16); eager synchronisation: Deft's fit.
BOUNDARY_COST_NS = {
    BoundaryKind.NONE: 0,
    BoundaryKind.SEGMENT: 9_000,
    BoundaryKind.SYNC: 11_500,
    BoundaryKind.EVENT: 2_000,
    BoundaryKind.LAYER: 11_500,
}
_DEEP_COST_NS = 2_000


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an interruptible job and of what interrupts it.

    `pieces`: the number of places in one request where it can stop. `longest_ns` 0: the pieces are equal.
    `costs_ns`: what one boundary costs, by depth; a depth that it lacks costs `cost_ns`; 0: that of the kind of
    boundary. Rates are in requests/s; `low_rate_per_s` 0: the job runs without
    a break. `high_rate_per_s` 0: as in Deft's, one urgent arrival for each request of the job.
    """

    exec_ns: int
    pieces: int
    longest_ns: int = 0
    cost_ns: int = 0
    costs_ns: Mapping[int, int] = {}
    low_rate_per_s: float = 0.0
    high_rate_per_s: float = 0.0
    high_exec_ns: int = 0
    high_slo_ns: int = 0

    def __post_init__(self) -> None:
        rates = (self.low_rate_per_s, self.high_rate_per_s)
        if any(depth < 1 or cost_ns < 0 for depth, cost_ns in self.costs_ns.items()):
            raise InvalidConfig("a tuner needs costs of boundaries of at least 0 ns")
        if self.exec_ns <= 0 or self.pieces < 1 or self.longest_ns < 0 or self.cost_ns < 0:
            raise InvalidConfig(
                f"a tuner needs an exec time above 0 and at least one piece, not {self.exec_ns} ns in "
                f"{self.pieces}"
            )
        if not all(isfinite(rate) and rate >= 0 for rate in rates):
            raise InvalidConfig(f"arrival rates must be finite and at least 0, not {rates}")


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate: `loss_ns_per_s` is what both jobs lose in a second; `fits` says whether the SLO holds."""

    every: int
    depth: int
    overhead: float  # of the low job, as a share of its exec time
    mean_wait_ns: int
    longest_wait_ns: int
    loss_ns_per_s: float
    fits: bool


# --------------------------------------------------------------------------------- Deft's


def deft_closed_form(n: int, k_ms: float, *, a_ms: float = DEFT_COST_MS) -> float:
    """N* = sqrt(a n / k): the number of launches between two boundaries that loses least, as Deft counts."""
    if n < 1 or not k_ms > 0 or not a_ms >= 0:
        raise InvalidConfig(f"a job needs launches of some length, not {n} of {k_ms} ms")
    return sqrt(a_ms * n / k_ms)


def deft_best(
    n: int,
    k_ms: float,
    *,
    a_ms: float = DEFT_COST_MS,
    b_ms: float = DEFT_BASE_MS,
    candidates: Sequence[int] = DEFT_CANDIDATES,
) -> int:
    """The candidate with the least wait of the urgent job plus delay of the low one; of equals, the smaller."""

    def lost_ms(every: int) -> float:
        return min(every, n) * k_ms + a_ms * (n // every) + b_ms

    return min(candidates, key=lambda every: (lost_ms(every), every))


def fit_cost(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line through (boundaries, delay): a and b of Deft's predictor.

    The slope has the unit of the delays. Raises InvalidConfig for fewer than two numbers of boundaries.
    """
    given = list(points)
    if not all(isfinite(x) and isfinite(y) for x, y in given) or len({x for x, _ in given}) < 2:
        raise InvalidConfig("a line needs finite delays for at least two numbers of boundaries")
    mean_x = sum(x for x, _ in given) / len(given)
    mean_y = sum(y for _, y in given) / len(given)
    square = sum((x - mean_x) ** 2 for x, _ in given)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in given) / square
    return slope, mean_y - slope * mean_x


# --------------------------------------------------------------------------------- ours


def candidate(measured: Measured, every: int, depth: int, cost_ns: int) -> Tuned:
    """What `every` pieces between two boundaries, `depth` of them in flight, cost both jobs."""
    every = min(every, measured.pieces)
    groups = -(-measured.pieces // every)
    overhead_ns = (groups - 1) * cost_ns
    piece_ns = measured.exec_ns / measured.pieces
    group_ns = every * piece_ns + cost_ns
    # One group of them is under way, half of it on average; the others in flight must run as a whole.
    mean_wait_ns = measured.exec_ns / 2 if groups == 1 else (depth - 0.5) * group_ns
    longest_piece_ns = max(piece_ns, measured.longest_ns)
    longest_wait_ns = min(
        depth * (longest_piece_ns + (every - 1) * piece_ns + cost_ns),
        measured.exec_ns + overhead_ns,
    )
    lasts_ns = measured.exec_ns + overhead_ns
    low_per_s = measured.low_rate_per_s or NS_PER_S / lasts_ns
    busy = min(1.0, low_per_s * lasts_ns / NS_PER_S)
    high_per_s = measured.high_rate_per_s or low_per_s
    room_ns = measured.high_slo_ns - measured.high_exec_ns
    return Tuned(
        every=every,
        depth=depth,
        overhead=overhead_ns / measured.exec_ns,
        mean_wait_ns=round(mean_wait_ns),
        longest_wait_ns=round(longest_wait_ns),
        loss_ns_per_s=low_per_s * overhead_ns + high_per_s * busy * mean_wait_ns,
        fits=not measured.high_slo_ns or longest_wait_ns <= room_ns,
    )


def tune(measured: Measured, kind: BoundaryKind, *, depths: Sequence[int] = (1, 2)) -> Tuned:
    """The best of each `every` and depth: the least loss among those that keep the SLO, else the least wait."""
    tried = [
        candidate(measured, every, depth, cost_of(measured, kind, depth))
        for depth in (depths if kind in (BoundaryKind.SEGMENT, BoundaryKind.EVENT) else (1,))
        for every in _spread(measured.pieces)
    ]
    fitting = [each for each in tried if each.fits]
    if not fitting:
        return min(tried, key=lambda each: (each.longest_wait_ns, each.every, each.depth))
    return min(fitting, key=lambda each: (each.loss_ns_per_s, each.every, each.depth))


def cost_of(measured: Measured, kind: BoundaryKind, depth: int) -> int:
    """What one boundary costs, in ns: as measured, or else that of the kind."""
    measured_ns = measured.costs_ns.get(depth)
    if measured_ns is not None:
        return measured_ns
    return measured.cost_ns or boundary_cost_ns(kind, depth)


def _spread(pieces: int) -> list[int]:
    """Numbers from 1 to `pieces`, about 12 % apart: each of the first ones."""
    spread = []
    every = 1
    while every < pieces:
        spread.append(every)
        every = max(every + 1, every * 9 // 8)
    return [*spread, pieces]


def boundary_cost_ns(kind: BoundaryKind, depth: int) -> int:
    """What one boundary costs unless it was measured."""
    if kind is BoundaryKind.SEGMENT and depth > 1:
        return _DEEP_COST_NS
    return BOUNDARY_COST_NS[kind]


def tunable(boundary: Boundary) -> bool:
    """True if the boundary asks for the tuner, and is of a kind that has a distance."""
    return boundary.tuned and boundary.kind not in (BoundaryKind.NONE, BoundaryKind.LAYER)


def tuned_boundary(job: Job, measured: Measured, *, depths: Sequence[int] = (1, 2)) -> Boundary:
    """The boundary of `job` with `every` and `depth` chosen, where it asks for it; else its own."""
    boundary = job.boundary
    if not tunable(boundary):
        return boundary
    best = tune(measured, boundary.kind, depths=depths)
    return msgspec.structs.replace(boundary, every=best.every, depth=best.depth, tuned=False)


def rate_per_s(clients: Clients, exec_ns: int) -> float:
    """How many requests of these clients arrive in a second, if each takes `exec_ns`."""
    if clients.arriving is Arriving.CLOSED:
        return clients.concurrency * NS_PER_S / max(1, exec_ns + clients.think_ns)
    if clients.arriving is Arriving.TRACE:
        return len(clients.trace) / max(clients.trace[-1], 1.0) if clients.trace else 0.0
    return clients.rate_per_s


def own_rate_per_s(clients: Clients, exec_ns: int) -> float:
    """`Measured.low_rate_per_s` of the job that has these clients: 0 if it runs without a break."""
    if not exec_ns:
        return 0.0
    if clients.arriving is Arriving.CLOSED and (not clients.think_ns or clients.concurrency > 1):
        return 0.0
    return rate_per_s(clients, exec_ns)


def urgent_of(
    jobs: Mapping[int, Job],
    place: int,
    *,
    exec_ns: Mapping[int, int],
    slo_ns: Mapping[int, int],
    equals: bool = False,
) -> Urgent | None:
    """What interrupts the job at `place`: those of a higher priority. None if nothing does.

    `exec_ns` and `slo_ns` are of a request alone, by job, as far as they are known. `equals`: where all jobs
    have one priority, they interrupt each other.
    """
    job = jobs[place]
    above = [i for i in jobs if jobs[i].priority > job.priority and not jobs[i].command]
    if equals and len({each.priority for each in jobs.values()}) == 1:
        above = [i for i in jobs if i != place and not jobs[i].command]
    if not above:
        return None
    room = {i: slo_ns[i] - exec_ns.get(i, 0) for i in above if slo_ns.get(i)}
    tightest = min(room, key=lambda i: room[i], default=None)
    return Urgent(
        rate_per_s=sum(
            rate_per_s(jobs[i].clients, exec_ns.get(i, 0))
            for i in above
            if exec_ns.get(i) or jobs[i].clients.arriving is not Arriving.CLOSED
        ),
        exec_ns=0 if tightest is None else exec_ns.get(tightest, 0),
        slo_ns=0 if tightest is None else slo_ns[tightest],
        low_rate_per_s=own_rate_per_s(job.clients, exec_ns.get(place, 0)),
    )


def measured_of(pieces: Pieces, urgent: Urgent) -> Measured:
    """What is known of a job that was measured alone, and of what interrupts it."""
    return Measured(
        exec_ns=max(1, pieces.exec_ns),
        pieces=max(1, pieces.pieces),
        longest_ns=pieces.longest_ns,
        costs_ns=pieces.costs_ns,
        low_rate_per_s=urgent.low_rate_per_s,
        high_rate_per_s=urgent.rate_per_s,
        high_exec_ns=urgent.exec_ns,
        high_slo_ns=urgent.slo_ns,
    )


def tuning_of(
    job: Job,
    pieces: Pieces,
    urgent: Urgent,
    *,
    depths: Sequence[int] = (1, 2),
    unit: str = "pieces",
) -> tuple[Boundary, Tuning | None]:
    """The boundary that `job` shall have, and why, beside what Deft's closed form gives.

    None: it does not ask for the tuner. Deft's a is the measured cost of one boundary, n and k are the kernels
    and their mean time; where kernels were not measured, pieces stand for them.
    """
    if not tunable(job.boundary):
        return job.boundary, None
    measured = measured_of(pieces, urgent)
    boundary = tuned_boundary(job, measured, depths=depths)
    cost_ns = cost_of(measured, boundary.kind, boundary.depth)
    best = candidate(measured, boundary.every, boundary.depth, cost_ns)
    n, k_ns = measured.pieces, measured.exec_ns / measured.pieces
    if pieces.kernels and pieces.kernel_ns:
        n, k_ns = pieces.kernels, float(pieces.kernel_ns)
    launches = deft_closed_form(n, k_ns / NS_PER_MS, a_ms=cost_ns / NS_PER_MS)
    return boundary, Tuning(
        every=best.every,
        depth=best.depth,
        pieces=measured.pieces,
        cost_ns=cost_ns,
        overhead=best.overhead,
        mean_wait_ns=best.mean_wait_ns,
        longest_wait_ns=best.longest_wait_ns,
        fits=best.fits,
        deft_launches=launches if pieces.kernels else 0.0,
        deft_every=launches * measured.pieces / n,
        deft_best=deft_best(n, k_ns / NS_PER_MS, a_ms=cost_ns / NS_PER_MS) if pieces.kernels else 0,
        unit=unit,
        why=_why(measured, best, cost_ns),
    )


def _why(measured: Measured, best: Tuned, cost_ns: int) -> str:
    """What decided, in words."""
    come = (
        f"come {measured.high_rate_per_s:.3g}/s"
        if measured.high_rate_per_s
        else "are as many as its own"
    )
    text = (
        f"a boundary costs {cost_ns / NS_PER_US:.3g} us and urgent requests {come}: overhead "
        f"{100 * best.overhead:.2g} %, mean wait {best.mean_wait_ns / NS_PER_MS:.3g} ms, at most "
        f"{best.longest_wait_ns / NS_PER_MS:.3g} ms"
    )
    if not best.fits:
        return f"{text}; no choice keeps the urgent SLO, so the shortest wait was taken"
    return f"{text}, which the urgent SLO allows" if measured.high_slo_ns else text
