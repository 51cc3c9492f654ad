"""The bounds: each holds against every schedule there is on tiny problems, and against the simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from bound_problems import MS, most_served, problems, verify
from slosched.bound.achievable import achievable
from slosched.bound.bounds import CellBounds, Effort, bound_cell
from slosched.bound.capacity import capacity_bound
from slosched.bound.exact import is_exactly_solvable, optimum
from slosched.bound.problem import Batch, Cluster, GpuKind, Problem, Request, cells_of
from slosched.bound.window import useful_classes, window_bound
from slosched.config import GpuProfile, ModelProfile
from slosched.config_file import load_profile
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_S
from slosched.workloads import parse_workload

pytest.importorskip("scipy")

GRID = 100_000


def upper(problem: Problem, *, largest: int = 10**6, grid_ns: int = GRID) -> int:
    found = window_bound(
        problem, problem.requests, grid_ns=grid_ns, largest=largest, time_limit_s=60
    )
    assert found.served is not None
    return found.served


# ------------------------------------------------------------------- against trying everything


@settings(max_examples=40, deadline=None)
@given(problems(one_gpu=True, most=6))
def test_the_exact_optimum_is_what_trying_everything_finds(problem: Problem) -> None:
    assert is_exactly_solvable(problem)
    assert verify(problem, optimum(problem)) == most_served(problem)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_schedule_serves_more_than_the_upper_bounds(problem: Problem) -> None:
    best = most_served(problem)
    assert upper(problem) >= best
    assert upper(problem, grid_ns=GRID * 10) >= best, "a coarse grid is a bound too"
    assert capacity_bound(problem) >= best - 1e-6
    assert verify(problem, achievable(problem, width=4)) <= best


@settings(max_examples=25, deadline=None)
@given(problems())
def test_fluid_work_is_an_upper_bound_too(problem: Problem) -> None:
    found = window_bound(problem, problem.requests, grid_ns=GRID, largest=1, time_limit_s=60)
    assert found.served is None, "one coefficient is too few for anything"
    several = window_bound(problem, problem.requests, grid_ns=GRID, largest=10**6, time_limit_s=60)
    largest = several.size
    for limit in (largest - 1, largest * 3 // 4, largest // 2):
        squeezed = window_bound(
            problem, problem.requests, grid_ns=GRID, largest=limit, time_limit_s=60
        )
        assert squeezed.served is None or squeezed.served >= most_served(problem)


def test_a_search_that_is_wide_enough_finds_the_optimum_where_waiting_pays() -> None:
    """Two requests 0.5 ms apart: only in one batch, which must wait for the second, both are in time."""
    table = {1: 3 * MS, 2: 4 * MS}
    requests = (Request(0, 0, 5 * MS), Request(0, MS // 2, 5 * MS + MS // 2))
    problem = Problem((GpuKind("gpu", 1),), ((table,),), requests)
    schedule = achievable(problem, width=4)
    assert verify(problem, schedule) == most_served(problem) == 2
    assert schedule == [Batch(0, 0, 2, MS // 2, 4 * MS + MS // 2, (0, 1))]
    assert optimum(problem) == schedule


def test_classes_that_a_larger_one_beats_are_of_no_use() -> None:
    assert useful_classes({1: 29, 2: 43, 4: 62}) == {1: 1, 2: 2, 4: 3}
    assert useful_classes({1: 29, 2: 70, 4: 62, 8: 62}) == {1: 1, 8: 2}
    assert useful_classes({1: 5, 2: 5}) == {2: 1}
    assert useful_classes({}) == {}


# ------------------------------------------------------------------------------------- by hand


def one_gpu(*requests: tuple[int, int]) -> Problem:
    """One GPU with the first table of the study's profile; (release, due) in ms."""
    table = {1: 29 * MS // 10, 2: 43 * MS // 10, 4: 62 * MS // 10, 8: 104 * MS // 10}
    made = tuple(Request(0, release * MS, due * MS) for release, due in requests)
    return Problem((GpuKind("fig7", 1),), ((table,),), made)


def test_capacity_counts_full_batches_of_the_best_class_that_fits() -> None:
    problem = one_gpu(*[(0, 7)] * 10)
    # Within 7 ms four fit in 6.2 ms: 7 / (6.2 / 4) of the ten.
    assert capacity_bound(problem) == pytest.approx(7 / (6.2 / 4))
    assert upper(problem) == 4 == len(achievable(problem, width=4)[0].requests)
    assert capacity_bound(one_gpu((0, 2))) == 0 == upper(one_gpu((0, 2)))


def test_capacity_gives_each_kind_of_gpu_the_work_it_does_best() -> None:
    fast, slow = {1: 1 * MS}, {1: 10 * MS}
    kinds = (GpuKind("a", 1), GpuKind("b", 1))
    requests = (Request(0, 0, 10 * MS),) * 20 + (Request(1, 0, 10 * MS),) * 20
    problem = Problem(kinds, ((fast, slow), (slow, fast)), requests)
    assert capacity_bound(problem) == pytest.approx(20)
    halved = replace(problem, classes=((fast, slow), (slow, {})))
    assert capacity_bound(halved) == pytest.approx(11)


def test_the_programme_does_not_sell_fractions_of_a_batch() -> None:
    """Requests too far apart to share a batch each cost a batch of their own."""
    apart = one_gpu(*[(3 * i, 3 * i + 4) for i in range(4)])
    assert upper(apart) == 4
    assert upper(one_gpu(*[(i, i + 4) for i in range(8)])) <= 5


def test_optimum_of_the_study() -> None:
    """One GPU, one model: the study's clairvoyant optimum, within three standard errors."""
    exec_ns = {1: 2_600_000, 2: 3_800_000, 4: 5_600_000, 8: 9_100_000, 16: 15_700_000}
    profile = GpuProfile("study", {"m": ModelProfile("m", exec_ns, 0, 1)}, 2**30)
    cluster = Cluster((profile,), 900_000, 250_000, NS_PER_S)
    for slo, rate, said in (("10ms", "1200", 56.0), ("25ms", "600", 100.0)):
        sweep = parse_workload("slo-exp-1", ["m", "1", "poisson", rate, slo, slo, "2", "mul", "10"])
        (cell,) = cells_of(sweep, cluster, seed=3)
        found = 100 * verify(cell.problem, optimum(cell.problem)) / cell.requests
        assert abs(found - said) < 2.5, (slo, rate, found)


# ------------------------------------------------------------------------ cells of a workload

FIG7 = Cluster((load_profile("fig7"),) * 2, 400_000, 400_000, 100 * MS)
QUICK = Effort(windows=2, window_ns=60 * MS, width=4)


def cell_of(*words: str, cluster: Cluster = FIG7, effort: Effort = QUICK) -> CellBounds:
    name, *values = words
    first, *_ = cells_of(parse_workload(name, values), cluster, seed=1)
    return bound_cell(first, effort)


SWEEP = ("slo-exp-1", "resnet50_v2", "4", "poisson", "800")


def test_releases_and_dues_have_the_ways_that_everybody_pays() -> None:
    words = [*SWEEP[1:], "2", "4", "2", "mul", "0.5"]
    cluster = replace(FIG7, lead_ns=900_000, tail_ns=250_000)
    first, second = cells_of(parse_workload(SWEEP[0], words), cluster)
    assert (first.step.text, second.step.text) == ("2x", "4x")
    assert first.slo_ns == 2 * 2_900_000 and second.duration_ns == NS_PER_S // 2
    for cell in (first, second):
        for request, offset_ns in zip(cell.problem.requests, cell.offsets_ns, strict=True):
            at_ns = cell.step.start_ns + offset_ns
            assert request.release_ns == at_ns + 900_000
            assert request.due_ns == at_ns + cell.slo_ns - 250_000


def test_bounds_are_in_order() -> None:
    for slo in ("1.6", "3"):
        found = cell_of(*SWEEP, slo, slo, "2", "mul", "0.3")
        assert found.upper is not None
        assert found.achievable <= found.best_upper <= found.capacity <= 1
        assert found.looseness < 0.06, slo


def test_what_cannot_be_served_at_all_and_what_can_be_served_whole() -> None:
    nothing = cell_of(*SWEEP, "1", "1", "2", "mul", "0.3")
    assert (nothing.capacity, nothing.best_upper, nothing.achievable) == (0, 0, 0)
    everything = cell_of(
        "slo-exp-1", "resnet50_v2", "4", "poisson", "50", "40", "40", "2", "mul", "1"
    )
    assert (everything.best_upper, everything.achievable, everything.windows) == (1, 1, ())


def test_windows_that_cover_the_span_give_a_strict_bound() -> None:
    effort = replace(QUICK, windows=4)
    found = cell_of(*SWEEP, "2.3", "2.3", "2", "mul", "0.2", effort=effort)
    assert found.in_every_window and found.upper is not None
    assert sum(window.requests for window in found.windows) == found.requests
    served = sum(window.upper or 0 for window in found.windows)
    assert found.upper == pytest.approx(min(1.0, served / found.requests))


def test_only_the_span_counts_but_what_follows_competes() -> None:
    words = (*SWEEP, "3.4", "3.4", "2", "mul", "1")
    found = cell_of(*words, effort=replace(QUICK, span_ns=NS_PER_S // 4))
    assert found.span_ns == NS_PER_S // 4 and 150 < found.requests < 250
    with pytest.raises(InvalidConfig, match="nothing is sent in its first"):
        cell_of(*words, effort=replace(QUICK, span_ns=1000))


def test_one_gpu_and_one_model_are_exact() -> None:
    alone = replace(FIG7, profiles=FIG7.profiles[:1])
    words = ("slo-exp-1", "resnet50_v2", "1", "poisson", "500", "3", "3", "2", "mul", "0.5")
    exact = cell_of(*words, cluster=alone)
    assert exact.exact and exact.upper == exact.achievable < 1 and exact.looseness == 0
    assert not cell_of(*words, cluster=FIG7).exact


def test_mixed_models_slos_and_unequal_gpus() -> None:
    short = ModelProfile("short", {1: 2 * MS, 4: 4 * MS}, 0, 1)
    long = ModelProfile("long", {1: 50 * MS, 2: 80 * MS}, 0, 1)
    halved = ModelProfile("short", {1: 4 * MS, 4: 8 * MS}, 0, 1)
    fast = GpuProfile("fast", {"short": short, "long": long}, 2**30)
    slow = GpuProfile("slow", {"short": halved}, 2**30)
    cluster = Cluster((fast, slow, slow), 200_000, 200_000, NS_PER_S)
    found = cell_of(
        "mix",
        "short:3:1800:7ms,long:2:40:250ms",
        "300ms",
        cluster=cluster,
        effort=replace(QUICK, largest=60_000),
    )
    assert found.upper is not None and any(window.fluid for window in found.windows)
    assert 0.5 < found.achievable <= found.best_upper <= found.capacity


def test_the_same_twice() -> None:
    words = (*SWEEP, "2.3", "2.3", "2", "mul", "0.2")
    assert cell_of(*words) == cell_of(*words)


def test_weights_that_do_not_fit_are_said() -> None:
    small = replace(FIG7.profiles[0], weights_cache_bytes=300 * 2**20)
    cluster = replace(FIG7, profiles=(small, small))
    found = cell_of(*SWEEP, "40", "40", "2", "mul", "0.2", cluster=cluster)
    assert any("ignore loads" in note for note in found.notes)
    assert not cell_of(*SWEEP, "40", "40", "2", "mul", "0.2").notes


def test_a_programme_that_is_too_large_is_said() -> None:
    words = (*SWEEP, "2.3", "2.3", "2", "mul", "0.2")
    found = cell_of(*words, effort=replace(QUICK, largest=100))
    assert found.upper is None and found.best_upper == found.capacity
    assert any("--window-length" in note for note in found.notes)


def test_batches_are_limited_where_the_scheduler_is() -> None:
    problem = cells_of(
        parse_workload(SWEEP[0], [*SWEEP[1:], "5", "5", "2", "mul", "0.1"]),
        replace(FIG7, max_batch=4, max_exec_ns=5 * MS),
    )[0].problem
    assert problem.classes[0] == ({1: 2_900_000, 2: 4_300_000},)


def test_what_has_no_bound_says_so() -> None:
    with pytest.raises(InvalidConfig, match="closed loops"):
        cells_of(parse_workload("spam", ["resnet50_v2"]), FIG7, duration_ns=NS_PER_S)
    with pytest.raises(UnknownName, match="unknown model 'nobody'"):
        cells_of(parse_workload(SWEEP[0], ["nobody", *SWEEP[2:], "2", "2", "2", "mul", "1"]), FIG7)
    with pytest.raises(InvalidConfig, match="--grid"):
        cell_of(*SWEEP, "3", "3", "2", "mul", "0.2", effort=replace(QUICK, grid_ns=5 * MS))
    with pytest.raises(InvalidConfig, match="width must be at least 1"):
        Effort(width=0)
    with pytest.raises(InvalidConfig, match="one GPU"):
        optimum(Problem((GpuKind("a", 2),), (({1: 1},),), ()))
