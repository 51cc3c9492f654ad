"""DiffServe's plan of GPUs, batch sizes and threshold, and the plans of the systems it is compared with.

Pure functions. The published allocator solves a mixed-integer problem with Gurobi (DiffServe section 3; in
its artifact src/controller/qaware_cascade_ILP.py). Here each pair of batch sizes is tried and the threshold
found by bisection, which gives the same optimum. Where several plans have the greatest threshold the
published one is whichever the solver finds first; here the ties are settled so that a plan does not flip
between solves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, isfinite

from slosched.cascade_spec import CascadeSpec, ScoreCurve
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S

#: The published thresholds: 0 to 1 by 0.005.
THRESHOLDS = tuple(step / 200 for step in range(201))

#: Relative: a capacity that misses the demand by less than this is enough, so that rounding decides nothing.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Allocation:
    """A plan: GPUs and batch size of each stage. `deferred` is f(threshold), the heavy stage's share.

    `feasible` is False where no plan keeps all constraints, and this one is what is done instead.
    """

    threshold: float
    light_gpus: int
    heavy_gpus: int
    light_batch: int
    heavy_batch: int
    deferred: float
    feasible: bool


@dataclass(frozen=True)
class Problem:
    """What a plan is made for. Raises InvalidConfig for rates or times that no plan can be made for.

    `demand` is in requests/s, and `light_ns` and `heavy_ns` are exec times by batch size: they include the
    judge only if the caller has added it. `heavy_demand` is the rate of which the heavy stage receives the
    share f(t) (None: `demand`, as published); it is not the rate of deferred requests. The queue terms
    estimate how long a request waits in each stage. `thresholds` ascend. `now` is the present plan; it
    settles ties alone, unless the `first` plan found is to be taken.
    """

    gpus: int
    demand: float
    light_ns: Mapping[int, int]
    heavy_ns: Mapping[int, int]
    scores: ScoreCurve
    slo_ns: int
    light_queue_ns: int = 0
    heavy_queue_ns: int = 0
    heavy_demand: float | None = None
    thresholds: tuple[float, ...] = field(default=THRESHOLDS, repr=False)
    now: Allocation | None = None
    first: bool = False

    def __post_init__(self) -> None:
        for rate in (self.demand, self.heavy_rate):
            if not (isfinite(rate) and rate >= 0):
                raise InvalidConfig(f"a demand must be 0 or more requests/s, not {rate}")
        if self.gpus < 0 or not self.thresholds:
            raise InvalidConfig("a plan needs 0 or more GPUs, and a threshold")
        for exec_ns in (self.light_ns, self.heavy_ns):
            if not exec_ns or min(exec_ns) < 1 or min(exec_ns.values()) <= 0:
                raise InvalidConfig("a plan needs batch sizes of both stages, and times above 0")

    @property
    def heavy_rate(self) -> float:
        """Requests/s that f(t) is a share of."""
        return self.demand if self.heavy_demand is None else self.heavy_demand


def throughput(batch: int, exec_ns: int) -> float:
    """Requests/s of one GPU that always runs full batches."""
    return batch * NS_PER_S / exec_ns


def gpus_for(rate: float, batch: int, exec_ns: int, *, most: int) -> int:
    """The number of GPUs, one or more, that serve `rate` requests/s; `most` + 1 if more than `most` are needed.

    One is needed for a rate of 0 too: the next request would wait for a GPU's change of role otherwise.
    """
    needed = rate / throughput(batch, exec_ns) * (1 - TOLERANCE)
    return most + 1 if needed > most else max(1, ceil(needed))


# ---------------------------------------------------------------------------------- DiffServe


def allocate(problem: Problem) -> Allocation:
    """The published plan (DiffServe section 3; artifact qaware_cascade_ILP.py), the problem solved exactly.

    Maximises the threshold t subject to: light GPUs x throughput >= demand; heavy GPUs x throughput >= demand
    x f(t); both within `gpus`; and one light batch, one heavy batch and the queue terms within the SLO. Where
    f(t) is 0 the plan needs no heavy batch, so the SLO's line is without its time; the queue terms stay in,
    as published. Each stage that receives requests has at least one GPU, also at demand 0.

    Ties: the fewest changes of roles, then the most spare heavy throughput, then the fewest light GPUs, then
    the smallest light and heavy batch; or, if the problem says `first`, the smallest batches and the fewest
    light GPUs, whatever the present plan is. Every GPU has a role: spare ones keep theirs, and without a
    present plan they are heavy; if f(t) is 0 all GPUs are light.

    If no plan keeps all this, `feasible` is False, and the queue terms are left out: batches cannot shorten a
    queue that is there already. If that does not help, all GPUs are light, none is deferred, and the batch is
    that of the greatest throughput within the SLO (the fastest one if none is within it). The published
    allocator stops planning in these cases; HADIS, by the same authors, also resorts to all light.
    """
    found = _best(problem)
    if found is None and (problem.light_queue_ns or problem.heavy_queue_ns):
        found = _best(replace(problem, light_queue_ns=0, heavy_queue_ns=0))
        found = found and replace(found, feasible=False)
    return found or _all_light(problem)


@lru_cache(maxsize=64)
def _deferred(scores: ScoreCurve, thresholds: tuple[float, ...]) -> tuple[float, ...]:
    """f of each threshold; kept, since a policy plans every few seconds with the same ones."""
    return tuple(scores.share_below(threshold) for threshold in thresholds)


@dataclass(frozen=True)
class _Pair:
    """Batch sizes that keep the SLO, the fewest light GPUs, and the place of the greatest threshold."""

    light: int
    heavy: int
    light_gpus: int
    place: int


def _best(problem: Problem) -> Allocation | None:
    """The plan that keeps all constraints, or None if there is none."""
    deferred = _deferred(problem.scores, problem.thresholds)
    pairs = list(_pairs(problem, deferred))
    place = max((pair.place for pair in pairs), default=-1)
    if place >= 0 and deferred[place] > 0:
        plans = (
            _with_pair(problem, pair, deferred[place]) for pair in pairs if pair.place == place
        )
        return min(plans, key=lambda plan: _rank(problem, plan))
    return _none_deferred(problem, bisect_right(deferred, 0.0) - 1)


def _pairs(problem: Problem, deferred: tuple[float, ...]) -> Iterable[_Pair]:
    """Every pair of batch sizes that keeps the SLO and leaves a GPU for the heavy stage."""
    gpus, rate = problem.gpus, problem.heavy_rate
    left_ns = problem.slo_ns - problem.light_queue_ns - problem.heavy_queue_ns
    for light, light_ns in problem.light_ns.items():
        light_gpus = gpus_for(problem.demand, light, light_ns, most=gpus)
        if light_gpus >= gpus:
            continue
        for heavy, heavy_ns in problem.heavy_ns.items():
            if light_ns + heavy_ns <= left_ns:
                served = (gpus - light_gpus) * throughput(heavy, heavy_ns) * (1 + TOLERANCE)
                place = len(deferred) if served >= rate else bisect_right(deferred, served / rate)
                yield _Pair(light, heavy, light_gpus, place - 1)


def _with_pair(problem: Problem, pair: _Pair, deferred: float) -> Allocation:
    """The plan with the pair's batches and greatest threshold that changes the fewest roles."""
    gpus, heavy = problem.gpus, pair.heavy
    needed = gpus_for(
        problem.heavy_rate * deferred, heavy, problem.heavy_ns[heavy], most=gpus - pair.light_gpus
    )
    most_light = max(gpus - needed, pair.light_gpus)  # rounding may ask for one GPU too many
    wanted = pair.light_gpus
    if problem.now is not None and not problem.first:
        wanted = problem.now.light_gpus
    light_gpus = min(max(wanted, pair.light_gpus), most_light)
    return Allocation(
        threshold=problem.thresholds[pair.place],
        light_gpus=light_gpus,
        heavy_gpus=gpus - light_gpus,
        light_batch=pair.light,
        heavy_batch=heavy,
        deferred=deferred,
        feasible=True,
    )


def _rank(problem: Problem, plan: Allocation) -> tuple[float, ...]:
    """The least of plans with the same threshold is the best."""
    if problem.first:
        return plan.light_batch, plan.heavy_batch
    changes = abs(plan.light_gpus - problem.now.light_gpus) if problem.now else 0
    heavy = plan.heavy_batch
    spare = plan.heavy_gpus * throughput(heavy, problem.heavy_ns[heavy])
    return changes, -spare, plan.light_gpus, plan.light_batch, heavy


def _none_deferred(problem: Problem, place: int) -> Allocation | None:
    """All GPUs light, the smallest batch that is enough; `place` is that of the greatest t with f(t) = 0."""
    left_ns = problem.slo_ns - problem.light_queue_ns - problem.heavy_queue_ns
    for batch, exec_ns in sorted(problem.light_ns.items()):
        needed = gpus_for(problem.demand, batch, exec_ns, most=problem.gpus)
        if place >= 0 and exec_ns <= left_ns and needed <= problem.gpus:
            return _light(problem, problem.thresholds[place], batch, feasible=True)
    return None


def _all_light(problem: Problem) -> Allocation:
    """What is done where even the light stage cannot keep up: as much as it can."""
    return _light(problem, 0.0, _fastest_batch(problem.light_ns, problem.slo_ns), feasible=False)


def _light(problem: Problem, threshold: float, batch: int, *, feasible: bool) -> Allocation:
    """All GPUs light. The heavy batch, for what is deferred already, is the largest that keeps the SLO."""
    left_ns = problem.slo_ns - problem.light_ns[batch]
    return Allocation(
        threshold=threshold,
        light_gpus=problem.gpus,
        heavy_gpus=0,
        light_batch=batch,
        heavy_batch=clipper_batch(problem.heavy_ns, left_ns),
        deferred=0.0,
        feasible=feasible,
    )


def _fastest_batch(exec_ns: Mapping[int, int], slo_ns: float) -> int:
    """The batch of the greatest throughput within the SLO; if none is within it, the one that ends first."""
    within = [batch for batch, ns in exec_ns.items() if ns <= slo_ns]
    if not within:
        return min(exec_ns, key=lambda batch: (exec_ns[batch], batch))
    return min(within, key=lambda batch: (-throughput(batch, exec_ns[batch]), batch))


# ------------------------------------------------------------------------ what it is compared with


def static_plan(spec: CascadeSpec, gpus: int) -> Allocation:
    """DiffServe-Static (artifact, `-ap 8`): the spec's fixed plan, in proportion for another number of GPUs.

    Each stage has at least one GPU; a single GPU is light, and none is deferred. Raises InvalidConfig if the
    spec has no fixed plan. Whether it is feasible depends on the demand, which it does not heed: `feasible`
    is True.
    """
    if len(spec.static_plan) != 5 or min(spec.static_plan[1:3]) < 1:
        raise InvalidConfig(
            f"cascade {spec.name!r}: a static plan is a threshold, and GPUs and batch size of both stages"
        )
    threshold, *whole = spec.static_plan
    light, heavy, light_batch, heavy_batch = (int(each) for each in whole)
    if gpus < 2:
        threshold, light, heavy = 0.0, gpus, 0
    elif gpus != spec.static_gpus:
        total = light + heavy
        light = min(max((2 * gpus * light + total) // (2 * total), 1), gpus - 1)
        heavy = gpus - light
    share = spec.scores.share_below(threshold)
    return Allocation(threshold, light, heavy, light_batch, heavy_batch, share, feasible=True)


@dataclass(frozen=True)
class ProteusPlan:
    """GPUs and batch size of each variant. `light_share` of the requests go to the light one.

    That is its share of the plan's throughput. `feasible` is False where the demand, or the SLO, is too much.
    """

    light_gpus: int
    heavy_gpus: int
    light_batch: int
    heavy_batch: int
    feasible: bool
    light_share: float


def proteus(
    *,
    gpus: int,
    demand: float,
    light_ns: Mapping[int, int],
    heavy_ns: Mapping[int, int],
    slo_ns: int,
    qualities: tuple[float, float] = (0.0, 1.0),
    queue_factors: tuple[float, float] = (0.0, 0.0),
    over_provision: float = 1.25,
) -> ProteusPlan:
    """Proteus for two variants, as HADIS (same first author; the artifact of DiffServe lacks it) implements it.

    Maximises the sum of quality x GPUs subject to: GPUs x throughput, over both variants, >= `over_provision`
    x `demand` (requests/s); and each used batch's exec time x (1 + its queue factor) within the SLO.
    `qualities` and `queue_factors` are of (light, heavy), 0 or more; HADIS scales the FIDs so that the worse
    variant has quality 0 and the better one 1. Each variant has the batch of the greatest throughput that
    keeps the SLO, which leaves the most room for quality. Ties: more throughput, then fewer heavy GPUs.

    If infeasible all GPUs are of the variant with the greatest throughput, with preference for one that keeps
    the SLO.
    """
    stages = (light_ns, heavy_ns)
    limits = [slo_ns / (1 + factor) for factor in queue_factors]
    batches = [_fastest_batch(ns, limit) for ns, limit in zip(stages, limits, strict=True)]
    rates = [throughput(batch, ns[batch]) for ns, batch in zip(stages, batches, strict=True)]
    keeps = [ns[b] <= limit for ns, b, limit in zip(stages, batches, limits, strict=True)]

    def served(heavy: int) -> float:
        return (gpus - heavy) * rates[0] + heavy * rates[1]

    def rank(heavy: int) -> tuple[float, ...]:
        return (gpus - heavy) * qualities[0] + heavy * qualities[1], served(heavy), -heavy

    enough = over_provision * demand * (1 - TOLERANCE)
    # To leave a GPU without a role helps nothing: neither a quality nor a throughput is below 0.
    allowed = [
        heavy
        for heavy in range(gpus + 1)
        if served(heavy) >= enough and (keeps[0] or heavy == gpus) and (keeps[1] or heavy == 0)
    ]
    if allowed:
        heavy = max(allowed, key=rank)
    else:
        heavy = gpus if (keeps[1], rates[1]) > (keeps[0], rates[0]) else 0
    share = (gpus - heavy) * rates[0] / served(heavy) if gpus else 1.0
    return ProteusPlan(gpus - heavy, heavy, batches[0], batches[1], bool(allowed), share)


def clipper_batch(exec_ns: Mapping[int, int], slo_ns: int) -> int:
    """Clipper-Light's and Clipper-Heavy's batch (HADIS): the largest whose exec time is within the SLO.

    If none is within it, the smallest.
    """
    return max((batch for batch, ns in exec_ns.items() if ns <= slo_ns), default=min(exec_ns))


def aimd_batch(present: int, timed_out: bool, sizes: Iterable[int]) -> int:
    """The next batch size of DiffServe's ablation with AIMD (artifact qaware_cascade_twostage.py).

    After time-outs half of the present one, rounded up and then down to one of `sizes`; else the next of
    `sizes` above the present one. The smallest and the largest of `sizes` hold at the ends.
    """
    allowed = sorted(sizes)
    if timed_out:
        return max((each for each in allowed if each <= (present + 1) // 2), default=allowed[0])
    return min((each for each in allowed if each > present), default=allowed[-1])
