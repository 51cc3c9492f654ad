"""a and b of Deft's predictor from a sweep's points."""

from __future__ import annotations

from math import isclose
from typing import Any

from slosched.share.energy import Energy
from slosched.share.figures import Inflation, JobMetrics, Misses, Pauses, RunMetrics
from slosched.share.sweep_fit import fits_of
from slosched.share_spec import Boundary, BoundaryKind, Job, Mode, ShareSpec, Status


def point(
    every: int, apart_ms: float | None, *, alone_ms: float | None = 100.0, **fields: Any
) -> tuple[ShareSpec, list[RunMetrics]]:
    """A point of one job with 912 boundaries in a request."""
    boundary = Boundary(kind=BoundaryKind.SYNC, every=every)
    given = {"mode": Mode.GATE, "runs": "eager", "boundary": boundary, **fields}
    job = JobMetrics(
        job=0,
        name="model_A",
        model="m",
        batch=1,
        priority=0,
        status=Status.OK,
        reason="",
        pid=1,
        n=10,
        work=10.0,
        throughput_per_s=1.0,
        latency=None,
        wait_mean_ms=None,
        inflation=Inflation(apart_mean_ms=apart_ms),
        misses=Misses(),
        pauses=Pauses(),
        solo_mean_ms=alone_ms,
        runs=given["runs"],
        boundaries=given.get("boundaries", 912),
    )
    run = RunMetrics(
        mode=given["mode"],
        repeat=0,
        window_s=1.0,
        jobs=(job,),
        complete=True,
        energy=Energy(window_s=1.0),
        pauses=Pauses(),
    )
    spec = ShareSpec(jobs=(Job(name="model_A", model="m", boundary=given["boundary"]),))
    return spec, [run]


def line(every: int) -> float:
    """Deft's own: 11.5 us for each of 912 // every boundaries, and 2.92 ms."""
    return 100 + 0.0115 * (912 // every) + 2.92


def test_the_line_of_a_sweep_is_found() -> None:
    [fit] = fits_of(point(every, line(every)) for every in (1, 4, 10, 100, 10_000))
    assert isclose(fit.a_ms, 0.0115, rel_tol=1e-6) and isclose(fit.b_ms, 2.92, rel_tol=1e-6)
    assert (fit.points, fit.job, fit.mode) == (5, "model_A", Mode.GATE)
    assert isclose(fit.explained, 1)
    assert "gate: model_A: delay = 0.0115 ms x boundaries of kind sync + 2.92 ms" in fit.text
    # Without runs alone, the delay is over the quickest point: the slope is the same.
    [rough] = fits_of(point(every, line(every), alone_ms=None) for every in (1, 4, 10_000))
    assert isclose(rough.a_ms, 0.0115, rel_tol=1e-6) and abs(rough.b_ms) < 1e-6


def test_segments_count_as_they_are_left() -> None:
    given: dict[str, Any] = {"runs": "graphs", "mode": Mode.PREEMPT, "boundary": Boundary()}
    points = [point(1, 100 + 0.009 * n, boundaries=n, **given) for n in (0, 10, 60)]
    [fit] = fits_of(points)
    assert isclose(fit.a_ms, 0.009, rel_tol=1e-6) and abs(fit.b_ms) < 1e-9
    assert fit.kind is BoundaryKind.SEGMENT


def test_what_does_not_vary_or_has_no_distance_has_no_fit() -> None:
    assert not fits_of(point(every, line(every)) for every in (1, 4))
    assert not fits_of(point(4, line(4)) for _ in range(5))
    for fields in (
        {"runs": "graphs"},
        {"mode": Mode.EXCLUSIVE},
        {"boundary": Boundary(kind=BoundaryKind.LAYER)},
        {"boundary": Boundary(kind=BoundaryKind.SYNC, tuned=True)},
    ):
        assert not fits_of(point(every, line(every), **fields) for every in (1, 4, 10))
    assert not fits_of(point(every, None) for every in (1, 4, 10))
