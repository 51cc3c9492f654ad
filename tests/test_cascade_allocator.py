"""DiffServe's allocator: against a table, against HiGHS, and what holds for every plan; and other plans."""

from __future__ import annotations

import csv
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slosched.cascade_spec import CascadeSpec, ScoreCurve, StageSpec
from slosched.core.scheduler.policies.published.diffserve import allocator
from slosched.core.scheduler.policies.published.diffserve.allocator import (
    THRESHOLDS,
    Allocation,
    Problem,
    aimd_batch,
    allocate,
    clipper_batch,
    proteus,
    static_plan,
    throughput,
)
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.cascades import load_cascade

#: Requests/s above which HiGHS' answer may differ: its constraints hold to about this share.
SLACK = 1e-4

#: For each published cascade and demand on 4, 8 and 16 GPUs: the greatest threshold, its f, and whether there
#: is one. Made apart from this code by trying every plan, with empty queues and without the judge's time,
#: from the published latencies and f(t); and for a part of it with HiGHS. GPUs and batches are not in it:
#: they are not unique.
GOLDEN = list(
    csv.DictReader(
        (Path(__file__).parent / "golden" / "diffserve_allocations.csv").open(encoding="utf-8")
    )
)


def ms(*times: int) -> dict[int, int]:
    """Exec times of batches of 1, 2, 4..."""
    return {2**place: time * NS_PER_MS for place, time in enumerate(times)}


def of_cascade(name: str, gpus: int, demand: float, **more: Any) -> Problem:
    spec = load_cascade(name)
    return Problem(
        gpus=gpus,
        demand=demand,
        light_ns=spec.light.exec_ns,
        heavy_ns=spec.heavy.exec_ns,
        scores=spec.scores,
        slo_ns=spec.slo_ns,
        **more,
    )


def tiny(**more: Any) -> Problem:
    """10 requests/s a light GPU, 1 a heavy one; f(t) = t."""
    given: dict[str, Any] = {
        "gpus": 4,
        "demand": 3.0,
        "light_ns": ms(100, 150),
        "heavy_ns": ms(1000, 1600),
        "scores": ScoreCurve((0.0, 1.0), (0.0, 1.0)),
        "slo_ns": 2 * NS_PER_S,
    }
    return Problem(**(given | more))


# ------------------------------------------------------------------------------ random problems


@st.composite
def exec_times(draw: st.DrawFn, first_ms: int, last_ms: int) -> dict[int, int]:
    """Batches of 1, 2, 4...: each takes longer than the one before, and at most 2.1 times the time."""
    time = draw(st.integers(first_ms, last_ms)) * NS_PER_MS
    found = {}
    for place in range(draw(st.integers(1, 6))):
        found[2**place] = time
        time = time * draw(st.integers(101, 210)) // 100
    return found


@st.composite
def curves(draw: st.DrawFn) -> ScoreCurve:
    shares = sorted(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=8)))
    last = draw(st.integers(max(shares[-1], 1), 1000))
    rising = (0, *shares, last)
    steps = len(rising) - 1
    return ScoreCurve(
        tuple(step / steps for step in range(len(rising))),
        tuple(share / 1000 for share in rising),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    queues = st.just(0) | st.integers(0, 3 * NS_PER_S)
    now = None
    if draw(st.booleans()):
        light = draw(st.integers(0, 20))
        now = Allocation(0.5, light, draw(st.integers(0, 20)), 1, 1, 0.5, True)
    return Problem(
        gpus=draw(st.integers(1, 20)),
        demand=draw(st.integers(5, 2000)) / 10,
        light_ns=draw(exec_times(20, 500)),
        heavy_ns=draw(exec_times(200, 3000)),
        scores=draw(curves()),
        slo_ns=draw(st.integers(500, 10_000)) * NS_PER_MS,
        light_queue_ns=draw(queues),
        heavy_queue_ns=draw(queues),
        now=now,
    )


def keeps_constraints(problem: Problem, plan: Allocation) -> bool:
    """The published lines, written out for one plan."""
    light_ns = problem.light_ns[plan.light_batch]
    heavy_ns = problem.heavy_ns[plan.heavy_batch] if plan.deferred else 0
    queues_ns = problem.light_queue_ns + problem.heavy_queue_ns
    light = plan.light_gpus * throughput(plan.light_batch, light_ns)
    heavy = plan.heavy_gpus * throughput(plan.heavy_batch, heavy_ns) if heavy_ns else 0.0
    return (
        plan.light_gpus + plan.heavy_gpus <= problem.gpus
        and light >= problem.demand * (1 - 1e-8)
        and heavy >= problem.heavy_rate * plan.deferred * (1 - 1e-8)
        and light_ns + heavy_ns + queues_ns <= problem.slo_ns
    )


# ------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: "-".join(list(row.values())[:3]))
def test_the_published_cascades(row: dict[str, str]) -> None:
    problem = of_cascade(row["cascade"], int(row["gpus"]), float(row["demand"]))
    plan = allocate(problem)
    assert plan.feasible == (row["feasible"] == "1") == keeps_constraints(problem, plan)
    if plan.feasible:
        assert (plan.threshold, plan.deferred) == (float(row["t"]), float(row["f"]))
    else:
        assert (plan.threshold, plan.light_gpus, plan.deferred) == (0, problem.gpus, 0)


def test_the_table_is_complete() -> None:
    assert len(GOLDEN) == 153
    assert {row["cascade"] for row in GOLDEN} == {"sdturbo", "sdxs", "sdxlltn"}


# ---------------------------------------------------------------------------------------- HiGHS


def highs_threshold(problem: Problem) -> float | None:
    """The greatest threshold by scipy's HiGHS, or None if infeasible.

    The published products of GPUs and throughput are linear in GPUs of each batch size, of which one may be
    used. Variables: light GPUs by batch, heavy GPUs by batch, which batch of each is used, which threshold.
    """
    optimize = pytest.importorskip("scipy.optimize")
    grid = problem.thresholds
    shares = [problem.scores.share_below(threshold) for threshold in grid]
    lights, heavies = list(problem.light_ns.items()), list(problem.heavy_ns.items())
    sizes = len(lights) + len(heavies)
    width = 2 * sizes + len(grid)
    used, places = range(sizes, 2 * sizes), range(2 * sizes, width)
    constraints = []

    def line(coefficients: dict[int, float], low: float, high: float) -> None:
        row = [0.0] * width
        for column, value in coefficients.items():
            row[column] = value
        constraints.append(optimize.LinearConstraint([row], low, high))

    inf = float("inf")
    served = [throughput(batch, ns) for batch, ns in [*lights, *heavies]]
    split = len(lights)
    line({column: served[column] for column in range(split)}, problem.demand, inf)
    demand = {place: -problem.demand * f for place, f in zip(places, shares, strict=True)}
    line({column: served[column] for column in range(split, sizes)} | demand, 0, inf)
    line(dict.fromkeys(range(sizes), 1.0), 0, problem.gpus)
    for column in range(sizes):
        line({column: 1.0, used[column]: -float(problem.gpus)}, -inf, 0)
    line(dict.fromkeys(used[:split], 1.0), 0, 1)
    line(dict.fromkeys(used[split:], 1.0), 0, 1)
    line(dict.fromkeys(places, 1.0), 1, 1)
    times = {used[at]: ns / NS_PER_S for at, (_, ns) in enumerate([*lights, *heavies])}
    queues_ns = problem.light_queue_ns + problem.heavy_queue_ns
    line(times, -inf, (problem.slo_ns - queues_ns) / NS_PER_S)
    solved = optimize.milp(
        [0.0] * (2 * sizes) + [-threshold for threshold in grid],
        constraints=constraints,
        integrality=[1] * width,
        bounds=optimize.Bounds([0] * width, [problem.gpus] * sizes + [1] * (width - sizes)),
        options={"mip_rel_gap": 0},
    )
    assert solved.status in (0, 2), solved.message
    return None if solved.status == 2 else grid[solved.x[2 * sizes :].argmax()]


def exact_threshold(problem: Problem) -> float:
    """-1 if infeasible."""
    plan = allocate(problem)
    return plan.threshold if plan.feasible else -1.0


@settings(max_examples=60, deadline=None)
@given(problems())
def test_highs_finds_the_same_threshold(problem: Problem) -> None:
    found = highs_threshold(problem)
    # HiGHS allows a constraint to be missed a little, so at a border either answer is right.
    least, most = (
        exact_threshold(
            replace(
                problem,
                demand=problem.demand * (1 + sign * SLACK),
                slo_ns=round(problem.slo_ns * (1 - sign * SLACK)),
            )
        )
        for sign in (1, -1)
    )
    assert least <= (-1 if found is None else found) <= most


@pytest.mark.parametrize("queue_ms", [0, 700, 3000])
@pytest.mark.parametrize("demand", [7.3, 23.0, 51.7])
@pytest.mark.parametrize("name", ["sdturbo", "sdxs", "sdxlltn"])
def test_highs_agrees_on_the_published_cascades(name: str, demand: float, queue_ms: int) -> None:
    problem = of_cascade(name, 16, demand, heavy_queue_ns=queue_ms * NS_PER_MS)
    found = highs_threshold(problem)
    assert exact_threshold(problem) == (-1 if found is None else found)


# -------------------------------------------------------------------------- what always holds


@settings(deadline=None)
@given(problems())
def test_a_feasible_plan_keeps_every_constraint(problem: Problem) -> None:
    plan = allocate(problem)
    assert plan.light_gpus + plan.heavy_gpus == problem.gpus
    if plan.feasible:
        assert keeps_constraints(problem, plan)
        assert plan.deferred == problem.scores.share_below(plan.threshold)
        assert (plan.heavy_gpus > 0) == (plan.deferred > 0)


@settings(deadline=None)
@given(problems())
def test_one_gpu_more_never_lowers_the_threshold(problem: Problem) -> None:
    fewer, more = allocate(problem), allocate(replace(problem, gpus=problem.gpus + 1))
    if fewer.feasible:
        assert more.feasible and more.threshold >= fewer.threshold


@settings(deadline=None)
@given(problems(), st.integers(1, 100))
def test_less_demand_never_lowers_the_threshold(problem: Problem, percent: int) -> None:
    less = allocate(replace(problem, demand=problem.demand * percent / 100))
    plan = allocate(problem)
    if plan.feasible:
        assert less.feasible and less.threshold >= plan.threshold


@settings(deadline=None)
@given(problems())
def test_a_plan_made_again_from_itself_changes_nothing(problem: Problem) -> None:
    plan = allocate(problem)
    assert allocate(replace(problem, now=plan)) == plan


@settings(deadline=None)
@given(problems())
def test_the_present_plan_settles_only_ties(problem: Problem) -> None:
    plan, fresh = allocate(problem), allocate(replace(problem, now=None))
    assert (plan.threshold, plan.feasible) == (fresh.threshold, fresh.feasible)


@settings(deadline=None)
@given(problems(), st.integers(0, 20))
def test_no_plan_with_this_threshold_changes_fewer_roles(problem: Problem, present: int) -> None:
    now = Allocation(0.5, present, problem.gpus - present, 1, 1, 0.5, True)
    plan = allocate(replace(problem, now=now))
    if not (plan.feasible and plan.deferred):
        return
    changes = abs(plan.light_gpus - present)
    for light_gpus in range(problem.gpus + 1):
        if abs(light_gpus - present) < changes:
            other = replace(plan, light_gpus=light_gpus, heavy_gpus=problem.gpus - light_gpus)
            assert not any(
                keeps_constraints(problem, replace(other, light_batch=light, heavy_batch=heavy))
                for light in problem.light_ns
                for heavy in problem.heavy_ns
            )


# ----------------------------------------------------------------------------------------- ties


def test_spare_gpus_are_heavy_without_a_present_plan() -> None:
    # Batches of 2 of both take 1.75 s of 2 s; one light GPU serves all, and two heavy ones would do for f =
    # 0.8.
    plan = allocate(tiny(demand=2.0))
    assert plan == Allocation(1.0, 1, 3, 1, 2, 1.0, True)


def test_spare_gpus_keep_their_roles() -> None:
    now = Allocation(0.5, 2, 2, 1, 1, 0.5, True)
    assert allocate(tiny(demand=2.0, now=now)).light_gpus == 2
    # Three light GPUs would leave one heavy one, which is too little for t = 1.
    assert allocate(tiny(demand=2.0, now=replace(now, light_gpus=3))).light_gpus == 2
    # A GPU is gone.
    assert allocate(tiny(demand=1.0, gpus=3, now=replace(now, light_gpus=4))).light_gpus == 2


def test_all_gpus_are_light_at_threshold_0() -> None:
    plan = allocate(of_cascade("sdturbo", 16, 330.0))
    assert (plan.threshold, plan.light_gpus, plan.heavy_gpus) == (0.0, 16, 0)
    assert (
        plan.light_batch == 16
    )  # the only one that is enough and within the SLO with no heavy one
    assert plan.heavy_batch == 4  # what is deferred already ends within the SLO


def test_nothing_deferred_needs_no_heavy_batch() -> None:
    plan = allocate(tiny(slo_ns=120 * NS_PER_MS))
    assert (plan.threshold, plan.light_batch, plan.feasible) == (0.0, 1, True)
    assert plan.heavy_batch == 1  # none is within the SLO


def test_a_curve_that_defers_nothing_at_first_gives_the_greatest_such_threshold() -> None:
    flat = ScoreCurve((0.0, 0.3, 1.0), (0.0, 0.0, 1.0))
    plan = allocate(tiny(demand=50.0, scores=flat))
    assert (plan.threshold, plan.deferred, plan.light_gpus, plan.feasible) == (0.3, 0.0, 4, True)


def test_without_demand_the_threshold_is_the_greatest() -> None:
    plan = allocate(tiny(demand=0.0))
    assert (plan.threshold, plan.light_gpus, plan.heavy_gpus) == (1.0, 1, 3)
    # A single GPU cannot serve both stages.
    single = allocate(tiny(demand=0.0, gpus=1))
    assert (single.threshold, single.light_gpus, single.feasible) == (0.0, 1, True)


def test_the_heavy_stage_may_have_its_own_rate() -> None:
    # 3 heavy GPUs serve 3.75 requests/s: half of 7.5.
    assert allocate(tiny(demand=2.0, heavy_demand=7.5)).threshold == 0.5
    assert allocate(tiny(demand=9.0, heavy_demand=0.0)).threshold == 1.0


# ----------------------------------------------------------------------------------- infeasible


def test_too_much_demand_makes_all_light() -> None:
    plan = allocate(of_cascade("sdturbo", 16, 400.0))
    assert plan == Allocation(0.0, 16, 0, 16, 4, 0.0, feasible=False)


def test_too_long_queues_are_left_out() -> None:
    problem = tiny()
    plan = allocate(replace(problem, heavy_queue_ns=2 * NS_PER_S))
    assert plan == replace(allocate(problem), feasible=False) and plan.threshold > 0


def test_queues_that_leave_some_time_make_batches_smaller() -> None:
    assert allocate(tiny()).heavy_batch == 2
    plan = allocate(tiny(light_queue_ns=400 * NS_PER_MS, heavy_queue_ns=400 * NS_PER_MS))
    assert (plan.heavy_batch, plan.feasible) == (1, True)


def test_an_slo_shorter_than_any_batch_gives_the_fastest_one() -> None:
    plan = allocate(tiny(slo_ns=10 * NS_PER_MS))
    assert plan == Allocation(0.0, 4, 0, 1, 1, 0.0, feasible=False)


def test_without_gpus_nothing_is_feasible() -> None:
    plan = allocate(tiny(gpus=0))
    assert (plan.light_gpus, plan.heavy_gpus, plan.feasible) == (0, 0, False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"demand": -1.0},
        {"demand": float("nan")},
        {"heavy_demand": float("inf")},
        {"gpus": -1},
        {"thresholds": ()},
        {"light_ns": {}},
        {"heavy_ns": {1: 0}},
        {"heavy_ns": {0: 1}},
    ],
    ids=str,
)
def test_what_no_plan_can_be_made_for_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        tiny(**wrong)


# ------------------------------------------------------------------------------------ the effort


@dataclass(frozen=True)
class _CountingCurve(ScoreCurve):
    """Another class than that of the other tests, so that what they keep is not found."""

    def share_below(self, threshold: float) -> float:
        _evaluated.append(threshold)
        return super().share_below(threshold)


_evaluated: list[float] = []


def test_the_effort_is_a_bisection_for_each_pair_of_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bisected: list[int] = []
    divided: list[float] = []

    def counted_bisect(values: Any, value: float) -> int:
        bisected.append(len(values))
        return bisect_right(values, value)

    def counted_gpus(rate: float, batch: int, exec_ns: int, *, most: int) -> int:
        divided.append(rate)
        return needed(rate, batch, exec_ns, most=most)

    needed = allocator.gpus_for
    monkeypatch.setattr(allocator, "bisect_right", counted_bisect)
    monkeypatch.setattr(allocator, "gpus_for", counted_gpus)
    spec = load_cascade("sdturbo")
    curve = _CountingCurve(spec.scores.thresholds, spec.scores.deferred)
    pairs = len(spec.light.exec_ns) * len(spec.heavy.exec_ns)
    _evaluated.clear()
    for demand in (1.0, 30.0, 60.0, 500.0, 1000.0, 5000.0):
        bisected.clear()
        divided.clear()
        allocate(replace(of_cascade("sdturbo", 64, demand), scores=curve))
        # Each bisection looks at log2(201) thresholds; the number of GPUs plays no part.
        assert len(bisected) <= pairs + 1 and set(bisected) <= {len(THRESHOLDS)}
        assert len(divided) <= pairs + 2 * len(spec.light.exec_ns)
    assert _evaluated == list(THRESHOLDS)  # once for all plans


# --------------------------------------------------------------------- what it is compared with


def spec_with(static_gpus: int, *plan: float) -> CascadeSpec:
    return CascadeSpec(
        name="cascade",
        light=StageSpec("light", ms(100, 150)),
        heavy=StageSpec("heavy", ms(1000, 1600)),
        slo_ns=2 * NS_PER_S,
        scores=ScoreCurve((0.0, 1.0), (0.0, 1.0)),
        static_gpus=static_gpus,
        static_plan=plan,
    )


@pytest.mark.parametrize(
    ("gpus", "threshold", "light", "heavy"),
    [
        (16, 0.25, 4, 12),
        (8, 0.25, 2, 6),
        (10, 0.25, 3, 7),  # 2.5
        (2, 0.25, 1, 1),
        (64, 0.25, 16, 48),
        (1, 0.0, 1, 0),
        (0, 0.0, 0, 0),
    ],
)
def test_the_static_plan_in_proportion(gpus: int, threshold: float, light: int, heavy: int) -> None:
    plan = static_plan(spec_with(16, 0.25, 4, 12, 16, 4), gpus)
    assert plan == Allocation(threshold, light, heavy, 16, 4, threshold, True)


def test_each_stage_of_a_static_plan_keeps_a_gpu() -> None:
    plan = static_plan(spec_with(16, 0.5, 1, 15, 2, 1), 3)
    assert (plan.light_gpus, plan.heavy_gpus) == (1, 2)
    plan = static_plan(spec_with(16, 0.5, 15, 1, 2, 1), 3)
    assert (plan.light_gpus, plan.heavy_gpus) == (2, 1)


@pytest.mark.parametrize("spec", [spec_with(0), spec_with(16, 0.5, 0, 16, 1, 1)])
def test_a_spec_without_a_static_plan_is_refused(spec: CascadeSpec) -> None:
    with pytest.raises(InvalidConfig, match="a static plan is"):
        static_plan(spec, 16)


@pytest.mark.parametrize("name", ["sdturbo", "sdxs", "sdxlltn"])
def test_the_published_static_plans_have_16_gpus(name: str) -> None:
    plan = static_plan(load_cascade(name), 16)
    assert plan.light_gpus + plan.heavy_gpus == 16


def proteus_of(demand: float, **more: Any) -> allocator.ProteusPlan:
    given: dict[str, Any] = {
        "gpus": 4,
        "light_ns": ms(100, 160),
        "heavy_ns": ms(1000, 1600),
        "slo_ns": 2 * NS_PER_S,
    }
    return proteus(demand=demand, **(given | more))


def test_proteus_has_the_most_heavy_gpus_that_serve_a_quarter_more() -> None:
    # A light GPU serves 12.5 requests/s, a heavy one 1.25.
    plan = proteus_of(13.0)  # 16.25, which 1 and 3 GPUs serve exactly
    assert (plan.light_gpus, plan.heavy_gpus, plan.light_batch, plan.heavy_batch) == (1, 3, 2, 2)
    assert plan.feasible and plan.light_share == pytest.approx(12.5 / 16.25)
    assert proteus_of(13.1).light_gpus == 2
    assert proteus_of(4.0) == replace(plan, light_gpus=0, heavy_gpus=4, light_share=0.0)


def test_proteus_heeds_queues_and_the_slo() -> None:
    assert proteus_of(1.0, queue_factors=(0.0, 0.5)).heavy_batch == 1
    late = proteus_of(1.0, queue_factors=(0.0, 1.5))
    assert (late.heavy_gpus, late.light_share, late.feasible) == (0, 1.0, True)
    assert not proteus_of(1.0, slo_ns=NS_PER_MS).feasible


def test_proteus_with_too_much_demand_is_all_light() -> None:
    plan = proteus_of(41.0)
    assert (plan.light_gpus, plan.feasible, plan.light_share) == (4, False, 1.0)
    assert proteus_of(1.0, gpus=0).light_share == 1.0


def test_proteus_with_equal_qualities_serves_the_most() -> None:
    assert proteus_of(1.0, qualities=(1.0, 1.0)).light_gpus == 4


@settings(deadline=None)
@given(problems(), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.floats(0, 2), st.floats(0, 2))
def test_proteus_against_every_plan(
    problem: Problem, qualities: tuple[float, float], light_wait: float, heavy_wait: float
) -> None:
    """Also plans that leave GPUs idle, with every pair of batches."""
    plan = proteus(
        gpus=problem.gpus,
        demand=problem.demand,
        light_ns=problem.light_ns,
        heavy_ns=problem.heavy_ns,
        slo_ns=problem.slo_ns,
        qualities=qualities,
        queue_factors=(light_wait, heavy_wait),
    )

    def rates(exec_ns: Any, wait: float) -> list[float]:
        within = (b for b, ns in exec_ns.items() if ns <= problem.slo_ns / (1 + wait))
        return [throughput(batch, exec_ns[batch]) for batch in within]

    light, heavy = rates(problem.light_ns, light_wait), rates(problem.heavy_ns, heavy_wait)
    best = max(
        (
            x1 * qualities[0] + x2 * qualities[1]
            for x1 in range(problem.gpus + 1 if light else 1)
            for x2 in range(problem.gpus - x1 + 1 if heavy else 1)
            if x1 * max(light, default=0) + x2 * max(heavy, default=0)
            >= 1.25 * problem.demand * (1 - 1e-9)
        ),
        default=None,
    )
    assert plan.feasible == (best is not None)
    if best is not None:
        assert plan.light_gpus * qualities[0] + plan.heavy_gpus * qualities[1] == pytest.approx(
            best
        )


def test_clipper_has_the_largest_batch_within_the_slo() -> None:
    times = ms(100, 150, 220)
    found = [clipper_batch(times, slo * NS_PER_MS) for slo in (99, 100, 219, 220, 999)]
    assert found == [1, 1, 2, 4, 4]


@pytest.mark.parametrize(
    ("present", "after"), [(1, 2), (2, 4), (3, 4), (4, 8), (7, 8), (8, 8), (16, 8)]
)
def test_without_time_outs_the_batch_grows_by_one_size(present: int, after: int) -> None:
    assert aimd_batch(present, False, (8, 4, 2, 1)) == after


@pytest.mark.parametrize(
    ("present", "after"), [(8, 4), (7, 4), (5, 2), (3, 2), (2, 1), (1, 1), (32, 8)]
)
def test_after_time_outs_the_batch_is_halved(present: int, after: int) -> None:
    assert aimd_batch(present, True, (8, 4, 2, 1)) == after
