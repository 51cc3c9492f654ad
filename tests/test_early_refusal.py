"""What has no chance is refused when it arrives, nothing is where nothing is lost, and it ends soon."""

from __future__ import annotations

from pathlib import Path
from random import Random
from statistics import median
from typing import Any, cast

import pytest

from slosched.codes import REJECTIONS, Code
from slosched.config import SchedulerConfig
from slosched.config_file import load_controller_config, load_profile
from slosched.core.scheduler.estimators import ExecTable
from slosched.core.scheduler.forecast import Forecast, places_before, why_refused_early
from slosched.core.scheduler.plans import why_refused
from slosched.core.scheduler.state import Client, Instance, Request
from slosched.errors import InvalidConfig
from slosched.sim.harness import Demand, Outcome, Simulation
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
SLO_MS = 100
GPUS, COPIES = 2, 12
TABLE = ExecTable({1: 2 * MS, 2: 3 * MS, 4: 5 * MS})


def model(model_id: int = 1) -> Instance:
    return Instance(model_id, "net", 0, b1_ns=2 * MS, pages=1)


def request(of: Instance, key: int, at_ms: float, slo_ms: float = 20.0) -> Request:
    slo_ns = round(slo_ms * MS)
    return Request(key, Client(b"c", 1, "c"), key, 0, of.queue, 0.0, slo_ns, round(at_ms * MS))


def watched(batches: int = 4, each_ms: int = 10, early: float = 1.0) -> tuple[Forecast, Instance]:
    """A model that lost a request at 0 and got a full batch every `each_ms` since."""
    forecast, one = Forecast(early), model()
    forecast.lost(one.queue, now_ns=0)
    for batch in range(1, batches + 1):
        aboard = [request(one, 4 * batch + i, each_ms * (batch - 1)) for i in range(4)]
        forecast.lost(one.queue, now_ns=each_ms * batch * MS)
        forecast.served(aboard, TABLE, 5 * MS, now_ns=each_ms * batch * MS)
    return forecast, one


def start_ms(forecast: Forecast, asked: Request, at_ms: float) -> float:
    """When it is forecast to start, if that is too late; it must start 3 ms before its deadline."""
    latest_ns = asked.deadline_ns - 3 * MS
    return forecast.hopeless_start_ns(asked, latest_ns, now_ns=round(at_ms * MS)) / MS


def test_a_request_starts_with_the_batch_that_its_place_gives_it() -> None:
    forecast, one = watched()
    for waiting, expected_ms in ((3, 0), (4, 60), (8, 70)):
        one.queue.requests[:] = [request(one, 100 + i, 41) for i in range(waiting)]
        assert start_ms(forecast, request(one, 200, 41), 41) == expected_ms, waiting
    patient = request(one, 201, 41, slo_ms=40)
    assert places_before(patient) == 8
    assert start_ms(forecast, patient, 41) == 0


def test_a_request_is_not_behind_those_whose_deadlines_are_later() -> None:
    forecast, one = watched()
    one.queue.requests[:] = [request(one, 100 + i, 41, slo_ms=90) for i in range(20)]
    assert places_before(request(one, 200, 41)) == 0
    assert start_ms(forecast, request(one, 200, 41), 41) == 0


def test_the_earlier_the_setting_the_less_must_wait() -> None:
    for early, refused in ((0.4, False), (1.0, True), (3.0, True)):
        forecast, one = watched(early=early)
        one.queue.requests[:] = [request(one, 100 + i, 41) for i in range(4)]
        assert bool(start_ms(forecast, request(one, 200, 41), 41)) == refused


def test_a_batch_that_is_overdue_is_expected_now() -> None:
    forecast, one = watched()
    one.queue.requests[:] = [request(one, 100 + i, 55) for i in range(8)]
    assert start_ms(forecast, request(one, 200, 55), 55) == 75


def test_a_forecast_that_no_loss_confirms_is_none() -> None:
    forecast, one = watched()
    one.queue.requests[:] = [request(one, 100 + i, 41) for i in range(40)]
    assert start_ms(forecast, request(one, 200, 79), 79) > 0
    assert start_ms(forecast, request(one, 200, 81), 81) == 0
    forecast.served(one.queue.requests[:4], TABLE, 5 * MS, now_ns=90 * MS)
    assert forecast.idle


def test_a_model_is_not_refused_more_because_it_was_served_less() -> None:
    """When two are alike, one got no batch for long: it is forecast what turns would give it."""
    forecast, one = watched(batches=4)
    other = model(2)
    forecast.lost(other.queue, now_ns=0)
    forecast.served([request(other, 900, 0)], TABLE, 2 * MS, now_ns=200 * MS)
    forecast.lost(other.queue, now_ns=200 * MS)
    for at_ms in range(210, 900, 10):
        forecast.lost(one.queue, now_ns=at_ms * MS)
        forecast.served([request(one, at_ms, at_ms - 5)] * 4, TABLE, 5 * MS, now_ns=at_ms * MS)
    forecast.lost(other.queue, now_ns=900 * MS)
    assert start_ms(forecast, request(other, 901, 901), 901) == 0


def test_batches_that_are_not_full_could_come_sooner() -> None:
    """Requests alone cost 1.6 times as much as in fours."""
    forecast, one = Forecast(1.0), model()
    forecast.lost(one.queue, now_ns=0)
    forecast.served([request(one, 1, 0)], TABLE, 2 * MS, now_ns=32 * MS)
    one.queue.requests[:] = [request(one, 100 + i, 33) for i in range(4)]
    assert start_ms(forecast, request(one, 200, 33), 33) == pytest.approx(32 + 2 * 32 / 1.6)


def test_the_reason_names_the_forecast() -> None:
    one = model()
    one.queue.requests[:] = [request(one, 100 + i, 0) for i in range(40)]
    words = why_refused_early(request(one, 200, 10), 60 * MS, 2 * MS, 10 * MS)
    assert words == (
        "refused on arrival: as the batches of its model came lately, it must expect to wait for 50ms, "
        "behind 40 requests of its model, and takes 2ms; the deadline is in 20ms"
    )


# ----------------------------------------------------------------------------------- simulated


def simulated(
    phases: list[tuple[float, float]], early: float | None = None
) -> tuple[Outcome, float]:
    """Poisson arrivals at `load` times the capacity for each (load, seconds); and when they began, ns."""
    gpu = load_profile("fig7")
    exec_ns = gpu.model("resnet50").exec_ns
    batch = max(exec_ns)
    capacity = GPUS * batch / exec_ns[batch] * NS_PER_S
    config = SchedulerConfig(schedule_ahead_ns=5 * MS)
    if early is not None:
        config = SchedulerConfig(schedule_ahead_ns=5 * MS, early_refusal=early)
    simulation = Simulation(config, gpu, gpus_per_worker=(GPUS,), check=False)
    models = simulation.load("resnet50", COPIES)
    simulation.run_until(simulation.now_ns + NS_PER_S)
    simulation.outcome = Outcome()
    random, at_s, ends_s = Random(1), 0.0, 0.0
    demands: list[Demand] = []
    for load, seconds in phases:
        ends_s += seconds
        while (at_s := at_s + random.expovariate(load * capacity)) < ends_s:
            due = Demand(round(at_s * NS_PER_S), random.randrange(COPIES), slo_ns=SLO_MS * MS)
            demands.append(due)
        at_s = ends_s
    begin_ns = simulation.now_ns
    return simulation.run(models, demands), begin_ns


def ages(outcome: Outcome) -> list[float]:
    """How old each refused request was when it was answered, as shares of its SLO."""
    return [
        (r.departure_ns - r.arrival_ns) / r.slo_ns for r in outcome.requests if r.code in REJECTIONS
    ]


@pytest.mark.parametrize("load", [2.0, 3.0, 5.0])
def test_under_overload_most_refusals_come_at_arrival_and_goodput_holds(load: float) -> None:
    late, _ = simulated([(load, 0.6)], early=0.0)
    soon, _ = simulated([(load, 0.6)])
    assert median(ages(late)) > 0.8
    assert median(ages(soon)) < 0.01
    met = [sum(r.deadline_met for r in outcome.requests) for outcome in (late, soon)]
    assert met[1] > 0.96 * met[0]


@pytest.mark.parametrize("load", [0.5, 0.7, 0.9])
def test_below_the_capacity_nothing_is_refused_early(load: float) -> None:
    outcome, _ = simulated([(load, 0.6)])
    assert not [r for r in outcome.requests if r.code == Code.COULD_NOT_START_IN_TIME]


def test_after_an_overload_refusals_end_quickly() -> None:
    """The last one comes within the SLO after the load fell."""
    outcome, begin_ns = simulated([(4.0, 0.5), (0.6, 0.5)])
    refused = [r.departure_ns - begin_ns for r in outcome.requests if r.code in REJECTIONS]
    assert len(refused) > 500
    assert max(refused) < (500 + SLO_MS + 5) * MS


def test_at_zero_nothing_is_refused_before_it_is_hopeless() -> None:
    outcome, _ = simulated([(3.0, 0.3)], early=0.0)
    assert not [r for r in outcome.requests if "must expect" in r.reason]


# -------------------------------------------------------------------------------------- options


def test_the_option_is_read_from_a_file_and_held_to_its_range(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    path.write_text('workers = ["a:1"]\n[scheduler]\nearly_refusal = 0\n')
    assert load_controller_config(path).scheduler.early_refusal == 0.0
    for wrong in (-0.1, 11.0):
        with pytest.raises(InvalidConfig, match=r"early_refusal must be within 0\.\.10"):
            SchedulerConfig(early_refusal=wrong)
    with pytest.raises(InvalidConfig, match="early_refusal must be a number, not NaN"):
        SchedulerConfig(early_refusal=float("nan"))


def test_a_refusal_says_so_where_only_the_way_back_is_too_long() -> None:
    """After a stall: "could start in 756us at the earliest and takes 2.6ms; the deadline is in 5.85ms"."""
    one = model()
    one.resident_on[0] = cast(Any, None)
    asked = request(one, 1, at_ms=0, slo_ms=5.85)
    assert why_refused(asked, 756_000, 2_600_000, 0) == (
        "could start in 756us at the earliest and takes 2.6ms, and its result would arrive here too late; "
        "the deadline is in 5.85ms"
    )
    assert "result" not in why_refused(asked, 3_300_000, 2_600_000, 0)
