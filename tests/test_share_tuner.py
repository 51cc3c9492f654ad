"""The tuner of boundaries beside Deft's."""

from __future__ import annotations

from math import isclose

import pytest
from msgspec.structs import replace

from slosched.core.share.tuner import (
    DEFT_CANDIDATES,
    Measured,
    candidate,
    deft_best,
    deft_closed_form,
    fit_cost,
    tune,
    tuned_boundary,
)
from slosched.errors import InvalidConfig
from slosched.share_spec import Boundary, BoundaryKind, Job

MS = 1_000_000

#: Deft's table: launches n, mean ms of one k, and the best of its 13 candidates.
DEFT = [
    (913, 0.104, 10),  # Faster R-CNN 1440p
    (954, 0.033, 20),  # Faster R-CNN 720p
    (4745, 0.09, 20),  # RetinaNet b16
    (2475, 0.0217, 50),  # Mask R-CNN v2 720p
    (246, 0.727, 2),  # DeepLabv3 1440p
    (247, 0.189, 4),  # DeepLabv3 720p
]


@pytest.mark.parametrize(("n", "k_ms", "best"), DEFT)
def test_defts_table(n: int, k_ms: float, best: int) -> None:
    assert len(DEFT_CANDIDATES) == 13
    assert deft_best(n, k_ms) == best
    # The closed form minimises the same sum over all real numbers, so its neighbours hold the best candidate.
    closed = deft_closed_form(n, k_ms)
    assert isclose(closed, (0.0115 * n / k_ms) ** 0.5)
    below = max(each for each in DEFT_CANDIDATES if each <= closed)
    above = min(each for each in DEFT_CANDIDATES if each >= closed)
    assert best in (below, above)


def test_the_fit_finds_a_line() -> None:
    slope, intercept = fit_cost((x, 0.0115 * x + 2.92) for x in (1, 10, 100, 913))
    assert isclose(slope, 0.0115)
    assert isclose(intercept, 2.92)
    for points in ([], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)], [(1.0, float("nan")), (2.0, 1.0)]):
        with pytest.raises(InvalidConfig, match="line"):
            fit_cost(points)


def test_the_tuner_weighs_by_rates() -> None:
    """The more seldom the urgent job comes, the farther apart the boundaries: about as sqrt(1 / rate)."""
    low = Measured(exec_ns=110 * MS, pieces=913)
    seldom = tune(replace(low, high_rate_per_s=0.1), BoundaryKind.SYNC)
    often = tune(replace(low, high_rate_per_s=40), BoundaryKind.SYNC)
    assert seldom.every > 5 * often.every
    # Within a tenth of the closed form for the mean wait, tau = sqrt(2 T c) at one arrival for each run.
    once = tune(low, BoundaryKind.SYNC)
    tau_ns = (2 * 110 * MS * 11_500) ** 0.5
    assert isclose(once.every * 110 * MS / 913, tau_ns, rel_tol=0.12)


def test_the_tuner_is_the_best_of_all() -> None:
    measured = Measured(exec_ns=50 * MS, pieces=200, high_rate_per_s=7)
    best = tune(measured, BoundaryKind.SYNC)
    every_one = [candidate(measured, every, 1, 11_500) for every in range(1, 201)]
    assert best.loss_ns_per_s <= 1.02 * min(each.loss_ns_per_s for each in every_one)


def test_the_slo_bounds_the_longest_wait() -> None:
    low = Measured(exec_ns=110 * MS, pieces=913, longest_ns=3 * MS, high_rate_per_s=0.1)
    free = tune(low, BoundaryKind.SYNC)
    bound = tune(replace(low, high_exec_ns=40 * MS, high_slo_ns=45 * MS), BoundaryKind.SYNC)
    assert free.longest_wait_ns > 5 * MS >= bound.longest_wait_ns
    assert bound.fits
    hopeless = tune(replace(low, high_exec_ns=40 * MS, high_slo_ns=41 * MS), BoundaryKind.SYNC)
    assert not hopeless.fits
    assert hopeless.every == 1


def test_tuned_boundary_changes_only_what_asks_for_it() -> None:
    measured = Measured(exec_ns=110 * MS, pieces=913)
    asks = Boundary(kind=BoundaryKind.SYNC, tuned=True)
    tuned = tuned_boundary(Job(name="a", model="m", boundary=asks), measured)
    assert tuned.every > 1
    assert not tuned.tuned
    for kept in (Boundary(), Boundary(kind=BoundaryKind.NONE, tuned=True)):
        assert tuned_boundary(Job(name="a", model="m", boundary=kept), measured) is kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"exec_ns": 0, "pieces": 1},
        {"exec_ns": 1, "pieces": 0},
        {"exec_ns": 1, "pieces": 1, "high_rate_per_s": float("inf")},
        {"exec_ns": 1, "pieces": 1, "low_rate_per_s": -1.0},
    ],
)
def test_wrong_measurements_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match=r"tuner|rates"):
        Measured(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="launches"):
        deft_closed_form(0, 1.0)
