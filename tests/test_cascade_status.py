"""What a running controller shows of its cascades: status, metrics, the live page, and what counts for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from made_cascade_run import a_plan
from slosched.cascade_spec import CascadeSpec, ScoreCurve, StageSpec
from slosched.cli.status_text import status_text
from slosched.cli.watch_text import watch_text
from slosched.codes import Verdict
from slosched.config import ControllerConfig, EmulationNoise, SchedulerConfig
from slosched.core.scheduler.interface import PlanMade, StageDone, StageRecord
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.values import ValueStore
from slosched.daemon.cascade_status import VERDICTS, cascade_reports
from slosched.daemon.live import LiveState
from slosched.daemon.metrics import ControllerCollector
from slosched.daemon.performer import Performer
from slosched.daemon.run_log import RunLog
from slosched.daemon.status import status_report
from slosched.sim.harness import Demand, Simulation
from slosched.telemetry.cascade_tally import CascadeTally
from slosched.telemetry.plan_log import read_plan_log
from slosched.telemetry.recent import LastMinutes
from slosched.telemetry.stage_log import read_stage_log
from slosched.telemetry.tally import Recent, Tally
from slosched.transport.frames import random_input

MS = 1_000_000
S = 1_000 * MS
PAGE = 2**24


def cascade(name: str = "pair", light: str = "small", heavy: str = "large") -> CascadeSpec:
    return CascadeSpec(
        name,
        StageSpec(light, {1: 100 * MS, 2: 150 * MS}, weights_ns=MS, weights_bytes=PAGE),
        StageSpec(heavy, {1: 900 * MS, 2: 1600 * MS}, weights_ns=MS, weights_bytes=PAGE),
        slo_ns=4 * S,
        scores=ScoreCurve((0.0, 1.0), (0.0, 1.0)),
    )


def served(policy: str = "CASCADE") -> tuple[Simulation, Tally]:
    """Forty requests of a cascade on two GPUs, counted as a controller's shell does."""
    spec = cascade()
    simulation = Simulation(
        SchedulerConfig(policy=policy, cascades=(spec,)),
        spec.profile(memory_bytes=20 * PAGE, page_bytes=PAGE),
        gpus_per_worker=(1, 1),
        noise=EmulationNoise(),
    )
    tally = Tally()
    controller = simulation.cluster.controller
    controller.on_stage = tally.cascades.add_stage
    controller.on_plan = tally.cascades.add_plan
    models = simulation.load("pair")
    outcome = simulation.run(models, [Demand(i * 200 * MS, 0) for i in range(40)], settle_ns=6 * S)
    for record in outcome.requests:
        tally.add_request(record)
    return simulation, tally


@pytest.fixture(scope="module")
def state() -> tuple[Simulation, Tally]:
    return served()


def report_of(simulation: Simulation, tally: Tally) -> dict[str, Any]:
    return status_report(simulation.scheduler, now_ns=simulation.now_ns, counted=tally.report)


def stage(key: int, verdict: Verdict, cascade: str = "pair", number: int = 0) -> StageRecord:
    return StageRecord(
        key=key,
        request_id=key,
        user_id=0,
        stage=number,
        model_id=0,
        program="large" if number else "small",
        queued_ns=0,
        due_ns=S,
        start_ns=0,
        exec_ns=MS,
        end_ns=MS,
        batch_size=1,
        worker_id=0,
        gpu_id=0,
        answers=False,
        verdict=int(verdict),
        cascade=cascade,
    )


# ------------------------------------------------------------------------------------- counting


def test_two_cascades_with_the_same_programs_are_counted_apart() -> None:
    tally = CascadeTally()
    for key, cascade in ((1, "pair"), (2, "other")):
        tally.add_stage(stage(key, Verdict.DEFERRED, cascade))
    tally.add_stage(stage(2, Verdict.HEAVY, "other", 1))
    tally.add_stage(stage(1, Verdict.UNANSWERED, "pair", 1))
    tally.add_plan(a_plan("other"))
    assert tally.report() == {
        "verdicts": {
            "other": {"deferred": 1, "heavy": 1},
            "pair": {"deferred": 1, "unanswered": 1},
        },
        "planned_gpus": {"other": {"light": 1, "heavy": 3}},
    }


def test_two_cascades_with_the_same_light_program_have_verdicts_of_their_own() -> None:
    specs = cascade(), cascade("other", heavy="huge")
    scheduler = Scheduler(
        SchedulerConfig(cascades=specs), worker_count=1, incarnation=1, version="test"
    )
    tally = CascadeTally()
    tally.add_stage(stage(1, Verdict.ACCEPTED, "other"))
    tally.add_plan(a_plan("pair"))
    pair, other = cascade_reports(scheduler, tally.report())
    assert sum(pair["verdicts"].values()) == 0 and other["verdicts"]["accepted"] == 1
    assert [each["gpus"] for each in pair["stages"]] == [1, 3]
    assert [each["gpus"] for each in other["stages"]] == [None, None]


def test_stages_of_no_cascade_are_not_counted_and_a_report_without_cascades_is_as_before() -> None:
    tally = Tally()
    tally.cascades.add_stage(stage(1, Verdict.NONE))
    assert tally.cascades.report() == {} and "cascades" not in tally.report()
    scheduler = Scheduler(SchedulerConfig(), worker_count=1, incarnation=1, version="test")
    report = status_report(scheduler, now_ns=S, counted=tally.report)
    assert "cascades" not in report
    text = asyncio.run(ControllerCollector(scheduler, tally, Recent(tally)).render())
    assert b"cascade" not in text
    live = LiveState(scheduler, LastMinutes(), life="1", cascades=tally.cascades)
    assert "cascades" not in dict(live.parts({}, S))


def test_a_live_controller_writes_and_counts_stages_and_plans(tmp_path: Path) -> None:
    config = ControllerConfig(scheduler=SchedulerConfig(), log_dir=str(tmp_path / "run"))
    log = RunLog.open(config, announce=lambda line: None)
    performer = Performer(
        Scheduler(SchedulerConfig(), worker_count=0, incarnation=1, version="test"),
        None,  # type: ignore[arg-type]  # nothing is sent
        {},
        ValueStore(random_input),
        announce=lambda line: None,
        connect=lambda worker_id, address: None,
        after_long=lambda: None,
        failed=lambda error: None,
    )
    performer.log = log
    performer.perform([StageDone(stage(1, Verdict.ACCEPTED)), PlanMade(a_plan())])
    log.close(arrived=0, answered=0, by_code={}, refused_at_door=0, bad_messages=0)
    assert read_stage_log(log.directory / "stages.tsv")["verdict"].tolist() == [1]
    assert read_plan_log(log.directory / "cascade_plans.tsv")["heavy_gpus"].tolist() == [3]
    assert log.tally.report()["cascades"] == {
        "verdicts": {"pair": {"accepted": 1}},
        "planned_gpus": {"pair": {"light": 1, "heavy": 3}},
    }


# -------------------------------------------------------------------------------------- showing


def test_the_status_has_threshold_stages_and_verdicts_of_each_cascade(
    state: tuple[Simulation, Tally],
) -> None:
    simulation, tally = state
    (shown,) = report_of(simulation, tally)["cascades"]
    assert (shown["name"], shown["ready"]) == ("pair", True)
    assert shown["threshold"] == simulation.scheduler.cluster.cascades.only().threshold
    light, heavy = shown["stages"]
    assert (light["stage"], light["model"], light["queued"]) == ("light", "small", 0)
    assert (heavy["stage"], heavy["model"], heavy["gpus_resident"]) == ("heavy", "large", 2)
    assert light["gpus"] + heavy["gpus"] == 2
    given = shown["verdicts"]
    assert tuple(given) == VERDICTS and "none" not in given
    assert given["accepted"] > 0 and given["heavy"] > 0
    ends = ("heavy", "instead", "outranked", "unanswered")
    assert given["deferred"] == sum(given[each] for each in ends)
    assert given["accepted"] + given["forced"] + given["deferred"] == 40


def test_a_policy_without_plans_has_no_gpus_of_a_stage() -> None:
    simulation, tally = served("INFER5")
    (shown,) = report_of(simulation, tally)["cascades"]
    assert [each["gpus"] for each in shown["stages"]] == [None, None]
    assert sum(shown["verdicts"].values()) >= 40
    line = next(s for s in status_text("c:1", {"cascades": [shown]}).splitlines() if "pair" in s)
    assert "GPU" not in line


def test_requests_that_wait_are_counted_by_stage() -> None:
    simulation, tally = served()
    only = simulation.scheduler.cluster.cascades.only()
    assert only.heavy is not None
    only.heavy.requests += [None] * 3  # type: ignore[list-item]
    (shown,) = report_of(simulation, tally)["cascades"]
    assert [each["queued"] for each in shown["stages"]] == [0, 3]


def test_the_text_of_the_status_prints_a_line_for_each_cascade() -> None:
    given = dict.fromkeys(VERDICTS, 0) | {"accepted": 1200, "blind light": 1}
    stages = [
        {"stage": "light", "model": "small", "queued": 3, "gpus": 1, "gpus_resident": 4},
        {"stage": "heavy", "model": "large", "queued": 5, "gpus": 3, "gpus_resident": 4},
    ]
    shown = {"name": "pair", "ready": True, "threshold": 0.5512, "stages": stages}
    line = (
        "cascade pair: threshold 0.551; light small: 3 queued, 1 GPU; heavy large: 5 queued, 3 GPUs; "
        "1,200 accepted, 1 blind light"
    )
    report = {"cascades": [shown | {"verdicts": given}]}
    assert line in status_text("c:1", report).splitlines()
    assert line in watch_text("c:1", report, None).splitlines()
    early = {"cascades": [shown | {"verdicts": {}, "ready": False}]}
    assert status_text("c:1", early).endswith("3 GPUs; no verdict yet (not ready)")
    assert "cascade" not in status_text("c:1", {})


def test_the_metrics_are_the_numbers_of_the_status(state: tuple[Simulation, Tally]) -> None:
    simulation, tally = state
    (shown,) = report_of(simulation, tally)["cascades"]
    collector = ControllerCollector(simulation.scheduler, tally, Recent(tally))
    text = asyncio.run(collector.render()).decode()
    samples = {
        (sample.name.removeprefix("slosched_cascade_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("slosched_cascade_")
    }
    wanted: dict[tuple[str, ...], float] = {
        ("verdicts_total", "pair", verdict.replace(" ", "_")): n
        for verdict, n in shown["verdicts"].items()
    }
    wanted["threshold", "pair"] = shown["threshold"]
    for each in shown["stages"]:
        wanted["requests_queued", "pair", each["stage"]] = each["queued"]
        wanted["planned_gpus", "pair", each["stage"]] = each["gpus"]
    assert samples == wanted


def test_the_live_page_gets_the_cascades_of_the_status(state: tuple[Simulation, Tally]) -> None:
    simulation, tally = state
    live = LiveState(simulation.scheduler, LastMinutes(), life="1", cascades=tally.cascades)
    told = dict(live.parts({}, simulation.now_ns))
    assert told["cascades"] == report_of(simulation, tally)["cascades"]
