"""benchmarks/scaling.py: the rig runs a cluster to its answers, and the ratios are counted right."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_rig_serves_what_two_gpus_can_and_times_each_part() -> None:
    import core_rig

    from slosched.config import SchedulerConfig

    rig = core_rig.Rig(
        SchedulerConfig(),
        core_rig.zoo(2, weights_bytes=2**24, cache_bytes=2**27),
        gpus_per_worker=(1, 1),
        check=True,
    )
    models = [model for name in ("model000", "model001") for model in rig.load(name, 2)]
    arrivals = core_rig.poisson(models, [1.0] * 4, 200.0, 100_000_000)
    parts = rig.offer(arrivals, 1.5)
    assert 240 <= parts.requests <= 360
    assert parts.requests - 5 <= sum(parts.by_code.values()) <= parts.requests
    assert parts.met >= 0.99 * sum(parts.by_code.values())
    assert set(parts.spent_ns) == {*core_rig.SCHEDULER, *core_rig.WORKER, "check"}
    shares = parts.us_per_request(*core_rig.SCHEDULER) + parts.us_per_request(*core_rig.WORKER)
    assert 0 < shares < parts.us_per_request()


def test_a_curve_is_judged_by_its_worst_point() -> None:
    import scaling

    points = [{"scheduler_us_per_action": us} for us in (10.0, 16.0, 12.0)]
    assert scaling.ratios({"gpus": points}) == [
        "6 to 150 GPUs, models everywhere: 1.60x (target < 1.5x, missed)"
    ]
    points[1]["scheduler_us_per_action"] = 14.0
    assert "1.40x (target < 1.5x, met)" in scaling.ratios({"gpus": points})[0]
