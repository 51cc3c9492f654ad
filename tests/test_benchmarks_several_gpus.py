"""benchmarks/gpu/several_gpus.py: its rows and their order, rates, CPUs and budget, and one run for real."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU.parent), str(GPU)]  # its programs import one another as neighbours

import cpu_plan  # noqa: E402
import exact_rig  # noqa: E402
import exact_sweep  # noqa: E402
import exact_table  # noqa: E402
import live_and_simulated  # noqa: E402
import row_bench  # noqa: E402
import several_bare  # noqa: E402
import several_gpus  # noqa: E402
import several_kill  # noqa: E402
import several_rig  # noqa: E402
import several_sweeps  # noqa: E402
import several_table  # noqa: E402

from slosched.clock import now_ns  # noqa: E402
from slosched.config_file import load_profile  # noqa: E402
from slosched.experiment.children import Child  # noqa: E402
from slosched.loadgen.results import RunResult, StepResult  # noqa: E402
from slosched.telemetry import action_log, client_log  # noqa: E402
from slosched.telemetry.table import LogTable  # noqa: E402

MS = 1_000_000
S = 1_000_000_000
BUDGET_S = 530


def settings(gpus: int, *, device: str = "cuda") -> exact_rig.Settings:
    return exact_rig.Settings(device, "v100", 1.0, (), None, gpus=gpus, own_cpus=True)


def rig(tmp_path: Path, gpus: int, rows: dict[str, Any] | None = None) -> several_rig.SeveralRig:
    return several_rig.SeveralRig(settings(gpus), tmp_path, rows or {}, {})


# ------------------------------------------------------------------------------- rows and budget


def test_the_rows_that_show_most_fit_the_budget_with_both_kinds_of_rate_and_inputs() -> None:
    fitting, spent_s, kept_s = [], 0.0, several_gpus.ROWS["simulated"].kept_s
    for name, plan in several_gpus.ROWS.items():
        if spent_s + plan.needs_s <= BUDGET_S - 12 - kept_s and not plan.kept_s:
            fitting.append(name)
            spent_s += plan.needs_s
    assert {"profile", "lateness", "loads", "kill", "cold", "n12_r2400_scaled"} <= set(fitting)
    runs = [several_sweeps.RUNS[name] for name in fitting if name in several_sweeps.RUNS]
    assert {run.copies for run in runs} == {12, 48}
    assert {run.rate for run in runs if run.scaled} == {600, 1200, 2400}
    assert any(run.inputs for run in runs) and any(not run.scaled for run in runs)
    assert fitting[:3] == ["profile", "lateness", "loads"]
    assert list(several_gpus.ROWS)[-1] == "simulated"


def test_every_run_of_the_experiment_is_there_once() -> None:
    found = {(run.copies, run.rate, run.scaled, run.inputs) for run in several_sweeps.RUNS.values()}
    wanted = {
        (copies, rate, is_scaled, inputs)
        for copies in (12, 48)
        for rate in (600, 1200, 2400)
        for is_scaled in (False, True)
        for inputs in (False, True)
    }
    assert found == wanted
    assert len(several_sweeps.RUNS) == len(several_sweeps.FIRST) + len(several_sweeps.SECOND)


@pytest.mark.parametrize("sweep", [several_sweeps.SHORT, exact_sweep.SWEEP])
def test_a_sweep_has_as_many_steps_as_its_time_is_planned_for(sweep: tuple[str, ...]) -> None:
    from slosched.workloads import parse_workload

    workload = parse_workload("slo-exp-1", ["resnet50", "12", "poisson", "600", *sweep, "5s"])
    run = several_sweeps.Run(12, 600, scaled=False, whole=sweep == exact_sweep.SWEEP)
    assert len(workload.steps()) == run.steps and run.sweep == sweep
    assert run.needs_s > run.steps * several_sweeps.PERIOD_S


class Bench(row_bench.Bench):
    """Rows that note what time they were left."""

    NAME = "noted"

    def __init__(self, tmp_path: Path, plans: dict[str, row_bench.Plan], budget_s: float) -> None:
        options = argparse.Namespace(
            awake=None, out=tmp_path, work=None, resume=None, rows="", budget_s=budget_s, commit="x"
        )
        self._plans = plans
        super().__init__(options, settings(1, device="emulated"))

    @property
    def plans(self) -> dict[str, row_bench.Plan]:
        return self._plans

    def page(self, document: Any) -> str:
        return ""


def test_rows_leave_the_last_one_its_time(tmp_path: Path) -> None:
    left: dict[str, float] = {}

    def noting(name: str) -> exact_rig.Row:
        def row(rig: exact_rig.Rig) -> dict[str, Any]:
            left[name] = (rig.until_ns - now_ns()) / S
            return {"figures": {}, "checks": []}

        return row

    plans = {
        "first": row_bench.Plan(noting("first"), 10, 1000),
        "too long": row_bench.Plan(noting("too long"), 40, 1000),
        "last": row_bench.Plan(noting("last"), 1, 1000, kept_s=30),
    }
    bench = Bench(tmp_path, plans, budget_s=72)
    bench.run()
    assert 20 < left["first"] <= 30 and list(bench.skipped) == ["too long"]
    assert 50 < left["last"] <= 60


def test_a_later_command_judges_again_but_keeps_what_was_judged(tmp_path: Path) -> None:
    options = argparse.Namespace(
        awake=None, out=tmp_path, work=None, resume=None, rows="kill", budget_s=0.1, commit="x"
    )
    judged = {"figures": {"runs": {"kill": {"first_sent_ns": 5}}}, "checks": []}
    document = {"format": exact_table.FORMAT, "rows": {"simulated": judged}}
    (tmp_path / "several_gpus.json").write_text(json.dumps(document))
    bench = several_gpus.Bench(options, settings(1, device="emulated"))
    bench.take_up()
    assert "simulated" not in bench.rows and bench.document()["rows"]["simulated"] == judged
    held = bench.open_rig()
    assert isinstance(held, several_rig.SeveralRig) and held.simulated["kill"]["first_sent_ns"] == 5
    known = several_sweeps.known_simulation
    held.simulated["kill"]["simulated"] = {"steps": []}
    assert known(held, "kill", {"first_sent_ns": 5}) == {"steps": []}
    assert known(held, "kill", {"first_sent_ns": 6}) is None  # it was measured again


# ------------------------------------------------------------------------------ GPUs, CPUs, rates


@pytest.mark.parametrize(
    ("there", "used"), [(8, 6), (6, 6), (5, 4), (4, 4), (3, 2), (2, 2), (1, 1)]
)
def test_six_four_two_or_one_gpus_are_used(there: int, used: int) -> None:
    options = argparse.Namespace(
        emulated=None, gpus=0, profile="v100", scale=1.0, worker_options="", config=None, model="m"
    )
    found = several_gpus.settings_of(options, there)
    assert (found.gpus, found.device_of(used - 1)) == (used, f"cuda:{used - 1}")
    options.gpus = there + 1
    with pytest.raises(ValueError, match="this host has"):
        several_gpus.settings_of(options, there)
    options.gpus = 0
    with pytest.raises(ValueError, match="no GPU"):
        several_gpus.settings_of(options, 0)


@pytest.mark.parametrize(("cpus", "gpus"), [(14, 1), (30, 2), (62, 4), (126, 6)])
def test_each_process_has_cpus_of_its_own(cpus: int, gpus: int) -> None:
    plan = cpu_plan.plan_cpus(range(cpus), gpus)
    parts = [*plan.workers, plan.controller, plan.client, plan.rest]
    taken = [cpu for part in parts for cpu in part]
    assert sorted(taken) == list(range(cpus))
    assert len(plan.workers) == gpus and min(len(part) for part in parts) >= 2
    assert not set(plan.serving) & set(plan.rest)
    assert plan.of_worker(gpus - 1) == plan.workers[-1]


def test_too_few_cpus_are_not_divided() -> None:
    plan = cpu_plan.plan_cpus(range(2), 2)
    assert plan == cpu_plan.CpuPlan() and plan.of_worker(1) == ()


def test_a_process_stays_on_the_cpus_that_it_was_started_on() -> None:
    ours = os.sched_getaffinity(0)
    command = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    with cpu_plan.on_cpus([min(ours)]):
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    assert json.loads(said) == [min(ours)] and os.sched_getaffinity(0) == ours
    with cpu_plan.on_cpus(()):
        assert os.sched_getaffinity(0) == ours


def test_rates_are_scaled_by_the_gpus_and_their_speed(tmp_path: Path) -> None:
    from dataclasses import asdict, replace

    profile = load_profile("v100")
    model = profile.model("resnet50")
    faster = replace(model, exec_ns={size: ns // 2 for size, ns in model.exec_ns.items()})
    measured = replace(profile, models={"resnet50": faster})
    rows = {"profile": {"figures": {"profile": asdict(measured)}}}
    of_three = rig(tmp_path, 3, rows)
    assert of_three.rate_for(2400, as_meant=True) == 2400  # half the GPUs, twice as fast
    assert rig(tmp_path, 6, rows).rate_for(600, as_meant=True) == 1200
    assert of_three.rate_for(600, as_meant=False) == 600


# ------------------------------------------------------------------------------------------ loads


def test_only_loads_beside_all_the_others_count() -> None:
    found = [
        {"spans": [[0, 10, 10], [10, 25, 15], [25, 40, 15]]},
        {"spans": [[8, 20, 12], [20, 32, 12]]},
    ]
    # Both load from 8 to 32.
    assert several_bare.durations(found) == [15, 12, 12]
    with pytest.raises(exact_rig.RowFailed, match="loaded nothing"):
        several_bare.durations([{"spans": []}])


@pytest.mark.parametrize(
    ("gpus", "numbers"), [(1, []), (2, [2]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8])]
)
def test_ever_more_gpus_load_at_once(gpus: int, numbers: list[int]) -> None:
    assert several_bare.numbers_at_once(gpus) == numbers


def test_loads_beside_all_others_go_into_the_profile() -> None:
    alone = {"p50": 5.0}
    figures = {"alone_ns": [alone] * 6, "together_ns": {"2": {"p50": 6.0}, "6": {"p50": 9.0}}}
    found = several_bare.with_loads(
        load_profile("v100"), {"loads": {"figures": figures}}, "resnet50"
    )
    assert found.model("resnet50").weights_ns == 9
    assert found.model("resnet50").exec_ns == load_profile("v100").model("resnet50").exec_ns
    one = {"alone_ns": [alone], "together_ns": {}}
    assert several_bare.contended_weights_ns(one) == 5
    assert several_bare.with_loads(found, {}, "resnet50") == found
    checks = several_bare.load_checks([[10, 10], [10, 12]], {2: [20, 20]}, size=40)
    values = {check["what"]: check["value"] for check in checks}
    assert values["2 GPUs at once, bytes in all"] == 4.0  # bytes/ns are GB/s
    assert values["2 GPUs at once over one"] == pytest.approx(20 / 10.5)


# ------------------------------------------------------------------------------------------- kill


def log_of(columns: dict[str, type], rows: list[dict[str, int]]) -> LogTable:
    arrays = {name: np.array([row.get(name, 0) for row in rows]) for name in columns}
    return LogTable(Path("made"), arrays, 0)


def test_the_fate_of_requests_around_a_kill() -> None:
    requests = [
        {"scheduled_ns": S, "latency_ns": 10 * MS, "in_time": 1},
        {"scheduled_ns": 5 * S - MS, "latency_ns": 5 * MS, "in_time": 1},  # in flight, served
        {"scheduled_ns": 5 * S - MS, "latency_ns": 700 * MS, "code": 4},  # in flight, failed
        {"scheduled_ns": 5 * S - MS, "code": client_log.NO_ANSWER},
        {"scheduled_ns": 5 * S + 450 * MS, "latency_ns": MS, "code": 4},
        {"scheduled_ns": 6 * S, "latency_ns": MS, "in_time": 1},
    ]
    actions = [
        {"t": 4 * S, "worker_id": 1, "action_type": 2},
        {"t": 6 * S, "worker_id": 0, "action_type": 2},
        {"t": 7 * S, "worker_id": 1, "action_type": 1},  # weights: no inference yet
        {"t": 8 * S, "worker_id": 1, "action_type": 2, "controller_result_enqueue": 5 * MS},
    ]
    found = several_kill.fate(
        log_of(client_log.COLUMNS, requests), log_of(action_log.COLUMNS, actions), 5 * S, victim=1
    )
    assert found["in_flight"] == {"ok": 1, "timed out": 1, "not answered": 1}
    assert found["failed"] == {"timed out": 2, "not answered": 1}
    assert found["never_answered"] == 1 and found["after"] == 5
    assert found["back_after_ns"] == 3 * S
    assert found["regained_after_ns"] == 600 * MS  # the third bin of 200 ms is the last bad one
    fault = several_kill.as_fault(found, 1, S, 30.0)
    assert fault == {"kind": "crash", "target": "worker 1", "at_ns": 4 * S, "for_ns": 3 * S}
    lost = several_kill.as_fault(found | {"back_after_ns": None}, 1, S, 30.0)
    assert lost["for_ns"] == 26 * S


def test_service_that_never_recovers_is_not_regained() -> None:
    sent, in_time = np.array([S, 2 * S, 3 * S]), np.array([True, True, False])
    assert several_kill.regained_after_ns(sent, in_time, 1) is None
    assert several_kill.regained_after_ns(sent[:2], in_time[:2], 1) == 0


def test_the_process_under_a_supervisor_is_killed_and_not_the_supervisor(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        worker = exact_rig.Worker(Child("w", parent, tmp_path / "log"), 1, gpu=0)
        assert rig(tmp_path, 2).process_of(worker) == pid
        before_ns = now_ns()
        assert rig(tmp_path, 2).kill(worker) >= before_ns
        assert parent.wait(10) == 0  # it saw its child end
    finally:
        parent.kill()
        parent.communicate()
    with pytest.raises(exact_rig.RowFailed, match="no process"):
        rig(tmp_path, 2).process_of(worker)


# ---------------------------------------------------------------------------------- the page


def result_of(slo_factor: float, in_time: int) -> RunResult:
    step = StepResult(
        index=0,
        slo=f"{slo_factor:g}x",
        group="",
        slo_factor=slo_factor,
        slo_ns=1,
        duration_ns=1,
        sent=1000,
        in_time=in_time,
        met=in_time,
        codes={},
        latency_p50_ns=0,
        latency_p99_ns=0,
        issue_delay_p50_ns=0,
        issue_delay_p99_ns=0,
    )
    return RunResult("", (step,), True, "", 0, 0, False, False, 0)


def test_steps_below_three_point_four_are_held_to_nothing_unless_the_simulator_is_sure() -> None:
    held_from = several_sweeps.HELD_FROM
    compare = live_and_simulated.compare
    (low,) = compare(result_of(2.25, 500), result_of(2.25, 800), held_from=held_from)
    assert low["rule"] == "" and low["holds"]
    (high,) = compare(result_of(3.4, 500), result_of(3.4, 800), held_from=held_from)
    assert high["rule"] and not high["holds"]
    (sure,) = compare(result_of(2.25, 500), result_of(2.25, 1000), held_from=held_from)
    assert sure["rule"] == ">= 99.9 %" and not sure["holds"]
    checks = several_sweeps.judge_checks({"a": {"steps": [low, high]}}, {"b": "it did not end"})
    assert [(check["value"], check["bound"]) for check in checks] == [(0.0, ">= 1"), (None, ">= 1")]


def test_a_comparison_that_failed_is_told_and_not_met() -> None:
    (check,) = several_sweeps.compared_checks("x", {"error": "exit code 1: no"})
    assert "no" in check["what"] and exact_table.verdict(check) == "n/a"


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    results = several_table.RESULTS
    document = exact_table.read_results(results) if results.exists() else None
    assert several_table.PAGE.read_text(encoding="utf-8") == several_table.page(document)


# ---------------------------------------------------------------------------------- the run


@pytest.mark.processes
def test_a_run_on_two_emulated_gpus_and_its_simulation_afterwards(tmp_path: Path) -> None:
    rows = "profile,lateness,loads,n12_r600_scaled"
    command = [
        sys.executable,
        str(GPU / "several_gpus.py"),
        "--emulated",
        "2",
        "--scale",
        "0.02",
        "--out",
        str(tmp_path),
        "--rows",
        rows,
        "--commit",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "several_gpus.json"
    found = json.loads(file.read_text())["rows"]
    assert list(found) == rows.split(",")
    assert len(found["lateness"]["figures"]["gpus"]) == 2
    assert found["n12_r600_scaled"]["figures"]["sent_rate"] == 200
    compared = found["n12_r600_scaled"]["figures"]["compared"]
    assert compared["compared"] >= 1 and compared["wrong"] == 0
    assert (tmp_path / "several_gpus.profile.toml").exists()
    again = [sys.executable, str(GPU / "several_gpus.py"), "--simulate", str(file)]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = json.loads(file.read_text())["rows"]["simulated"]["figures"]
    assert len(judged["runs"]["n12_r600_scaled"]["steps"]) == 4 and not judged["missing"]
    assert "| n12_r600_scaled | 200 | 3.4x |" in (tmp_path / "several_gpus.md").read_text()


@pytest.mark.processes
def test_a_killed_worker_is_back_and_no_request_stays_without_an_answer(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(GPU / "several_gpus.py"),
        "--emulated",
        "2",
        "--scale",
        "0.2",
        "--out",
        str(tmp_path),
        "--rows",
        "profile,kill",
        "--commit",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "several_gpus.json").read_text())["rows"]["kill"]["figures"]
    assert figures["fate"]["never_answered"] == 0 and figures["victim"] == 1
    assert figures["faults"][0]["kind"] == "crash"
