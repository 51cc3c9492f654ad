"""What a running controller shows of functions and slots: status, metrics, live page, and their counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from made_call_run import MS as MILLI
from made_call_run import family as made_family
from slosched.cli.status_text import status_text
from slosched.codes import ActionType
from slosched.core.scheduler.interface import ActionRecord
from slosched.core.worker.emulated_calls import (
    AwaitAll,
    Chain,
    EmulatedFunction,
    Raise,
    Run,
    Script,
)
from slosched.daemon.live import LiveState
from slosched.daemon.metrics import ControllerCollector
from slosched.daemon.run_log import RunLog
from slosched.daemon.status import status_report
from slosched.messages import Span
from slosched.sim.calls import CallArrival, CallSimulation, CallSpec
from slosched.sim.hosts import HostPlan
from slosched.telemetry.call_log import read_call_log
from slosched.telemetry.call_part_log import read_call_part_log
from slosched.telemetry.recent import LastMinutes
from slosched.telemetry.tally import Recent, Tally

MS = 1_000_000


def served(calls: int = 5) -> tuple[CallSimulation, Tally, LastMinutes]:
    """Calls of `fan`, of which each asks for two of `leaf`, one of which raises; counted as a shell does."""
    leaf = EmulatedFunction(name="leaf", scripts=(Script((Run(2 * MS),)), Script((Raise("no"),))))
    fan = EmulatedFunction(
        name="fan",
        scripts=(
            Script((Run(MS), Chain("leaf", 2, numbers=(0, 1)), AwaitAll(catch=True), Run(MS))),
        ),
        expected_ns=2 * MS,
    )
    arrivals = tuple(
        CallArrival(at_ns=n * 20 * MS, function="fan", slo_ns=500 * MS) for n in range(calls)
    )
    simulation = CallSimulation(
        CallSpec(hosts=(HostPlan((fan, leaf), slots=2),), arrivals=arrivals)
    )
    outcome = simulation.run()
    tally, recent = Tally(), LastMinutes()
    for record in outcome.calls:
        tally.calls.add(record)
    for action in outcome.actions:
        tally.add_action(action)
        recent.add_action(action)
    return simulation, tally, recent


@pytest.fixture(scope="module")
def state() -> tuple[CallSimulation, Tally, LastMinutes]:
    return served()


def report_of(simulation: CallSimulation, tally: Tally, *, brief: bool = False) -> dict[str, Any]:
    scheduler = simulation.cluster.controller.scheduler
    now_ns = simulation.kernel.now_ns
    return status_report(scheduler, now_ns=now_ns, brief=brief, counted=tally.report)


def test_the_status_has_each_function_and_the_slots_of_each_host(
    state: tuple[CallSimulation, Tally, LastMinutes],
) -> None:
    simulation, tally, _ = state
    report = report_of(simulation, tally)
    functions = {each["name"]: each for each in report["functions"]}
    assert list(functions) == ["fan", "leaf"]
    assert functions["leaf"]["codes"] == {"ok": 5, "call raised": 5}
    assert functions["fan"]["children"] == 10
    assert functions["fan"]["ran_ns"] == 5 * 2 * MS
    assert functions["fan"]["ready_on"] == 1 and not functions["fan"]["gpu"]
    assert report["models"] == [] and report["model_instances"] == 0
    (device,) = report["workers"][0]["gpus"]
    assert (device["host"], device["slots"], device["running"], device["suspended"]) == (
        True,
        2,
        0,
        0,
    )
    text = status_text("here", report)
    assert "function leaf (host): loaded, ready on 1, 0 queued" in text
    assert "10 calls (5 ok, 5 call raised)" in text
    assert re.search(r"0/0 \(host\) .* 0 \(0 of 2 slots\)", text)


def test_a_brief_status_counts_the_functions_too(
    state: tuple[CallSimulation, Tally, LastMinutes],
) -> None:
    report = report_of(*state[:2], brief=True)
    assert "functions" not in report
    assert report["counted"]["functions"]["fan"]["calls"] == 5
    assert report["workers"][0]["gpus"][0]["slots"] == 2


def test_a_suspended_call_is_shown_beside_the_slots() -> None:
    hold = EmulatedFunction(name="hold", scripts=(Script((Run(500 * MS),)),), expected_ns=500 * MS)
    fan = EmulatedFunction(name="fan", scripts=(Script((Chain("hold"), AwaitAll())),))
    simulation = CallSimulation(
        CallSpec(
            hosts=(HostPlan((fan, hold), slots=3),),
            arrivals=(CallArrival(at_ns=0, function="fan", slo_ns=9_000 * MS),),
        )
    )
    seen: list[dict[str, Any]] = []

    def look(_: object) -> None:
        report = report_of(simulation, Tally())
        seen.append(report["workers"][0]["gpus"][0] | {"text": status_text("here", report)})

    kernel = simulation.kernel
    simulation.cluster.controller.on_call_part = lambda part: kernel.at(
        kernel.now_ns + 50 * MS, look
    )
    simulation.run()
    assert (seen[0]["running"], seen[0]["suspended"]) == (1, 1)
    assert "1 (1 of 3 slots) + 1 suspended" in seen[0]["text"]


def families(tally: Tally, simulation: CallSimulation) -> dict[str, dict[tuple[str, ...], float]]:
    scheduler = simulation.cluster.controller.scheduler
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in ControllerCollector(scheduler, tally, Recent(tally)).collect():
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_the_metrics_are_what_happened(state: tuple[CallSimulation, Tally, LastMinutes]) -> None:
    simulation, tally, _ = state
    found = families(tally, simulation)
    assert found["slosched_function_calls_total"] == {
        ("leaf", "ok"): 5,
        ("leaf", "call_raised"): 5,
        ("fan", "ok"): 5,
    }
    assert found["slosched_function_run_seconds_total"]["leaf",] == pytest.approx(0.010)
    assert found["slosched_host_slots"] == {("0", "0"): 2}
    assert found["slosched_host_cold_starts_total"] == {("0", "0"): 2}
    # The calls that raised are not counted here: they did not end with code 0.
    assert found["slosched_host_busy_seconds_total"]["0", "0"] == pytest.approx(0.020)
    assert not found.get("slosched_gpu_pages") and not found.get("slosched_model_instances")


def test_a_controller_without_functions_says_nothing_of_them() -> None:
    simulation, _, _ = served(calls=0)
    scheduler = simulation.cluster.controller.scheduler
    for worker in scheduler.cluster.workers.values():
        worker.gpus.clear()
    scheduler.cluster.models.clear()
    tally = Tally()
    report = status_report(scheduler, now_ns=0, counted=tally.report)
    assert "functions" not in report and "functions" not in tally.report()
    found = families(tally, simulation)
    assert not [name for name in found if "function" in name or "host_" in name]
    live = LiveState(scheduler, LastMinutes(), life="1")
    assert not [key for key, _ in live.parts({}, simulation.kernel.now_ns) if "function" in key]


def test_the_live_page_has_a_row_for_each_function(
    state: tuple[CallSimulation, Tally, LastMinutes],
) -> None:
    simulation, tally, recent = state
    scheduler, now_ns = simulation.cluster.controller.scheduler, simulation.kernel.now_ns
    live = LiveState(scheduler, recent, life="1", calls=tally.calls)
    data: dict[str, Any] = {}
    for key, value in live.parts({}, now_ns):
        if isinstance(value, list):
            data.setdefault(key, []).extend(value)
        elif key:
            data[key] = value
    assert data["functions_in_all"] == 2 and data["models"] == []
    rows = {row["name"]: row for row in data["functions"]}
    assert (rows["leaf"]["calls"], rows["leaf"]["failed"]) == (10, 5)
    assert rows["leaf"]["run_us"] == pytest.approx(1000)  # half of them ran 2 ms
    (gpu,) = data["gpus"]
    assert gpu["host"] and gpu["slots"] == 2
    assert data["lanes"] == []  # calls overlap in the slots of a host
    assert data["gpus_in_all"]["hosts"] == 1
    only = dict(live.parts({"models": "no such"}, now_ns))
    assert "functions" not in only and only["functions_in_all"] == 2


def test_a_host_is_busy_by_its_slots_and_not_while_calls_are_suspended() -> None:
    recent, second = LastMinutes(), 1_000 * MS
    start_ns = 1_600_000_000 * second

    def call(begin_ns: int, end_ns: int, ran_ns: int) -> ActionRecord:
        return ActionRecord(
            action_id=1,
            action_type=ActionType.CALL,
            code=0,
            worker_id=0,
            gpu_id=0,
            model_id=0,
            batch_size=1,
            sent_ns=start_ns,
            expected_duration_ns=0,
            expected_start_ns=0,
            expected_complete_ns=0,
            result_received_ns=start_ns + end_ns,
            processed_ns=start_ns + end_ns,
            requests_queued=0,
            copies_loaded=0,
            exec=Span(start_ns + begin_ns, start_ns + end_ns, ran_ns),
        )

    for _ in range(4):
        recent.add_action(call(0, second - MS, second // 2))
    last_ns = start_ns + second
    assert recent.exec_percent(0, 0, last_ns, width=4)[-1] == 50
    assert recent.exec_percent(0, 0, last_ns)[-1] == 100
    mean, _ = recent.busy_mean(0, 0, last_ns, seconds=1, width=8)
    assert mean == pytest.approx(25)


def test_the_run_log_keeps_calls_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    log = RunLog(tmp_path, announce=lambda _: None)
    calls, parts = made_family()
    for part in parts:
        log.call_part(part)
    for record in calls:
        log.call(record)
    log.close(arrived=1, answered=1, by_code={0: 1}, refused_at_door=0, bad_messages=0)
    assert len(read_call_log(tmp_path / "calls.tsv")) == 4
    assert len(read_call_part_log(tmp_path / "call_parts.tsv")) == 5
    manifest = (tmp_path / "manifest.json").read_text()
    assert '"call_rows": 4' in manifest and '"call_part_rows": 5' in manifest
    assert log.tally.report()["functions"]["parent"]["suspended_ns"] == 11 * MILLI
