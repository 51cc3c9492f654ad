"""benchmarks/gpu/exact_time.py: what its rows count, what its table says, and one row for real."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU.parent), str(GPU)]  # its programs import one another as neighbours

import exact_bare  # noqa: E402
import exact_cold  # noqa: E402
import exact_live  # noqa: E402
import exact_rig  # noqa: E402
import exact_table  # noqa: E402
import exact_time  # noqa: E402
import live_and_simulated  # noqa: E402
import row_bench  # noqa: E402

from slosched.child_processes import ready_port  # noqa: E402
from slosched.config_file import load_profile  # noqa: E402
from slosched.loadgen.results import RunResult, StepResult  # noqa: E402
from slosched.messages import NO_SPAN, GpuStats, InferResult, Span  # noqa: E402
from slosched.telemetry import action_log, client_log  # noqa: E402

MS = 1_000_000
US = 1_000


# ------------------------------------------------------------------------------------- lateness


def started(earliest_ms: float, begin_ns: int, end_ns: int, ahead_ms: float = 2) -> Any:
    earliest = round(earliest_ms * MS)
    result = InferResult(
        session=1,
        action_id=1,
        copy_input=NO_SPAN,
        exec=Span(begin_ns, end_ns, end_ns - begin_ns),
        copy_output=NO_SPAN,
        gpu_id=0,
        gpu_clock_before_mhz=0,
        gpu_clock_mhz=0,
        received_ns=earliest - round(ahead_ms * MS),
        sent_ns=end_ns,
    )
    return exact_bare.Started(earliest, result)


def test_a_start_is_late_against_its_plan_or_the_end_of_the_action_before() -> None:
    found = exact_bare.judge_starts(
        [
            started(10, 10 * MS + 3 * US, 12 * MS),
            started(11, 12 * MS + 7 * US, 13 * MS),  # the first ran longer than planned
            started(20, 20 * MS + 5 * US, 21 * MS),
        ],
        0,
        least=3,
    )
    late = found["figures"]["late_ns"]
    assert (late["n"], late["p50"], late["max"]) == (3, 5 * US, 7 * US)
    checks = {check["what"]: check for check in found["checks"]}
    assert checks["start lateness of Infer, host, p50"]["value"] == 5.0
    # The device took as long as the host saw: its own start was as late.
    assert checks["device-side start (end noticed less exec), p50"]["value"] == 5.0
    enough = checks["actions that were planned 1 ms ahead"]
    assert (enough["value"], enough["bound"]) == (3, ">= 3")


def test_an_action_that_came_too_late_to_be_planned_does_not_count() -> None:
    found = exact_bare.judge_starts(
        [started(10, 12 * MS, 13 * MS, ahead_ms=0.9), started(20, 20 * MS, 21 * MS)], 0, least=2
    )
    assert found["figures"]["late_ns"]["n"] == 1
    assert found["figures"]["planned_less_than_1_ms_ahead"] == 1
    with pytest.raises(exact_rig.RowFailed, match="3 failed"):
        exact_bare.judge_starts([], 3, least=1)


def test_what_the_driver_said_is_summed_up() -> None:
    stats = [
        GpuStats(sm_clock_mhz=mhz, power_mw=300_000, throttle_reasons=4) for mhz in (1900, 1980)
    ]
    found = exact_bare.gpu_meanwhile(stats)
    assert found["sm_clock_mhz"]["p50"] == 1940 and found["throttle_reasons"] == [4]
    assert exact_bare.gpu_meanwhile([]) == {}


# ---------------------------------------------------------------------------------- what logs say


def write_actions(directory: Path, rows: list[dict[str, int]]) -> None:
    lines = [action_log.HEADER]
    lines += ["\t".join(str(row.get(name, 0)) for name in action_log.COLUMNS) for row in rows]
    (directory / action_log.FILE_NAME).write_text("\n".join(lines) + "\n")


def write_requests(directory: Path, rows: list[dict[str, int]]) -> None:
    lines = [client_log.HEADER]
    lines += ["\t".join(str(row.get(name, 0)) for name in client_log.COLUMNS) for row in rows]
    (directory / client_log.FILE_NAME).write_text("\n".join(lines) + "\n")


def infer(end_ns: int, exec_ns: int, **more: int) -> dict[str, int]:
    """An inference that was sent 5 ms before its end and whose result came at its end."""
    return {
        "t": end_ns,
        "controller_result_enqueue": 5 * MS,
        "worker_exec_complete": 5 * MS,
        "action_type": 2,
        "batch_size": 1,
        "worker_exec_duration": exec_ns,
        "expected_exec_duration": exec_ns,
        "expected_exec_complete": 5 * MS,
    } | more


def test_predictions_are_judged_after_ten_samples_of_a_model_and_batch(tmp_path: Path) -> None:
    rows = [infer(i * 10 * MS, 1 * MS, expected_exec_duration=9 * MS) for i in range(10)]
    rows += [infer(200 * MS, 1 * MS, expected_exec_duration=1_010_000)]
    rows += [infer(210 * MS, 2 * MS, expected_exec_complete=5_100_000, batch_size=3)]
    rows += [infer(220 * MS, 1 * MS, expected_exec_complete=5_200_000)]
    rows += [infer(230 * MS, 1 * MS, expected_exec_duration=9 * MS, status=10)]
    write_actions(tmp_path, rows)
    sizes = {1: MS, 2: MS, 4: 2 * MS}
    found = exact_live.prediction_errors(exact_live.actions_of(tmp_path), sizes)
    assert found["exec_error"]["n"] == 2 and found["exec_error"]["max"] == pytest.approx(0.01)
    assert found["completion_error_ns"]["max"] == 200_000
    with pytest.raises(exact_rig.RowFailed, match="more than 10 times"):
        write_actions(tmp_path, rows[:3])
        exact_live.prediction_errors(exact_live.actions_of(tmp_path), sizes)


def test_goodput_is_compared_with_graphs_of_the_sizes_that_ran(tmp_path: Path) -> None:
    # Four seconds of batches of 16 (one with 12 aboard) every 20 ms, each 16 ms long, after the first.
    ends = [1_000 * MS + i * 20 * MS for i in range(1, 201)]
    write_actions(
        tmp_path, [infer(end, 16 * MS, batch_size=12 if end == ends[5] else 16) for end in ends]
    )
    write_requests(
        tmp_path,
        [
            {"scheduled_ns": end - 25 * MS, "latency_ns": 25 * MS, "in_time": 1, "request_id": i}
            for end in ends
            for i in range(16)
        ]
        + [{"scheduled_ns": 0, "code": 4}, {"scheduled_ns": ends[-1], "code": 4}],
    )
    found = exact_live.closed_loop(tmp_path, {1: 2 * MS, 16: 16 * MS})
    assert found["graph_rate_per_s"] == pytest.approx(1000)
    assert found["goodput_per_s"] == pytest.approx(800, rel=0.005)
    assert found["of_graph_rate"] == pytest.approx(0.8, rel=0.005)
    assert found["gpu_busy"] == pytest.approx(0.8, rel=0.005)
    assert found["batch_sizes"].keys() == {"16"} and found["aboard_of_slots"] < 1


def test_a_cold_requests_latency_loses_its_exec_and_its_own_load(tmp_path: Path) -> None:
    load = {"action_type": 1}
    write_actions(
        tmp_path,
        [
            infer(1_005 * MS, 1 * MS, model_id=4, **load),
            infer(2_003 * MS, 2 * MS, model_id=4, **load),
            infer(2_004 * MS, 3 * MS, model_id=5, **load),
            infer(2_009 * MS, 1 * MS, model_id=4, **load),  # after the answer
            infer(2_004_500_000, 1 * MS, model_id=4),
        ],
    )
    cold = {"cold": 1, "exec_ns": MS}
    write_requests(
        tmp_path,
        [
            {"scheduled_ns": 1_000 * MS},
            {"scheduled_ns": 2_000 * MS, "latency_ns": 5 * MS, "model_id": 4, **cold},
            {"scheduled_ns": 2_100 * MS, "latency_ns": MS, "model_id": 9, **cold},
        ],
    )
    found = exact_cold.cold_figures(tmp_path, tmp_path, 900 * MS)
    assert found["beyond_exec_and_load_ns"]["n"] == 1 and found["cold_without_a_load"] == 1
    assert found["beyond_exec_and_load_ns"]["p50"] == 2 * MS
    assert found["of_it_before_the_load_ns"]["p50"] == 1 * MS
    assert found["of_it_between_load_and_exec_ns"]["p50"] == 500 * US
    assert found["of_it_after_exec_ns"]["p50"] == 500 * US
    # Three loads of 2, 3 and 1 ms ended in the 200 ms that count.
    assert found["pcie_busy"] == pytest.approx(6 / 200)


def test_noise_is_measured_over_profiled(tmp_path: Path) -> None:
    rows = [infer(i * MS, round(MS * (0.99 + 0.0002 * i))) for i in range(1, 101)]
    write_actions(tmp_path, rows)
    noise = live_and_simulated.noise_of(exact_live.actions_of(tmp_path), {1: MS})
    assert len(noise) == 201 and noise == sorted(noise)
    assert noise[100] == pytest.approx(1.0, abs=0.001) and noise[0] == pytest.approx(0.9902)


# --------------------------------------------------------------------------------------- verdicts


def result_of(*in_time: int) -> RunResult:
    steps = tuple(
        StepResult(
            index=i,
            slo=f"{i}x",
            group="",
            slo_factor=float(i),
            slo_ns=i,
            duration_ns=1,
            sent=10_000,
            in_time=n,
            met=n,
            codes={},
            latency_p50_ns=0,
            latency_p99_ns=0,
            issue_delay_p50_ns=0,
            issue_delay_p99_ns=0,
        )
        for i, n in enumerate(in_time)
    )
    return RunResult("", steps, True, "", 0, 0, False, False, 0)


def test_a_sure_step_is_held_to_999_and_the_others_to_two_points() -> None:
    live, simulated = result_of(9_990, 9_989, 9_700, 9_000), result_of(9_995, 9_995, 9_900, 9_300)
    steps = live_and_simulated.compare(live, simulated)
    assert [step["holds"] for step in steps] == [True, False, True, False]
    assert [step["rule"] for step in steps] == [">= 99.9 %"] * 2 + ["within 2 points"] * 2


@pytest.mark.parametrize(
    ("value", "bound", "said"),
    [
        (4.9, "< 5", "met"),
        (5.0, "< 5", "**missed**"),
        (0.3, "<= 0.3", "met"),
        (89.9, ">= 90", "**missed**"),
        (None, "< 5", "n/a"),
        (7.0, "", ""),
    ],
)
def test_a_bound_is_met_or_missed(value: float | None, bound: str, said: str) -> None:
    assert exact_table.verdict(exact_rig.check("it", value, "us", bound)) == said


def test_options_that_the_worker_does_not_offer_are_left_out_and_told() -> None:
    words = ["--config", "w.toml", "--dtype", "float16", "--channels-last", "--host-images", "64"]
    kept, dropped = exact_rig.split_options(words, "--config FILE\n--channels-last\n")
    assert kept == ["--config", "w.toml", "--channels-last"]
    assert dropped == ["--dtype", "float16", "--host-images", "64"]
    assert exact_rig.split_options(words, "") == (words, [])


def test_a_profile_survives_a_rows_json() -> None:
    profile = load_profile("v100")
    assert exact_rig.read_profile(asdict(profile)) == profile
    assert exact_rig.read_profile(json.loads(json.dumps(asdict(profile)))) == profile


def document(**more: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "ran_at": "2026-01-02T03:04:05",
        "seconds": 60.0,
        "gpu": {"name": "a GPU", "driver_version": "1.2"},
        "machine": {"cpu_model": "C", "cpu_usable": 2, "platform": "L", "python": "3"},
        "versions": {"slosched": "0 (abc)", "torch": ""},
        "meter": {"priority": "real-time", "cpus": [1]},
        "settings": {"device": "cuda:0", "scale": 1.0},
        "rows": {},
        "failed": {},
        "skipped": {},
    } | more


def test_the_page_says_what_was_missed_failed_and_left_out() -> None:
    row = {"checks": [exact_rig.check("lateness", 6.0, "us", "< 5")], "void": ["it stood still"]}
    text = exact_table.page(
        document(
            rows={"lateness": row},
            failed={"cold": "RowFailed: a | b\nc"},
            skipped={"peer_mosec": "3 s of the budget were left"},
            options_not_offered=["--dtype", "float16"],
        )
    )
    assert "| lateness | < 5 us | 6 us | **missed** | lateness | it stood still |" in text
    assert "| row cold |  | failed | **not measured** | cold | RowFailed: a / b c |" in text
    assert "row peer_mosec" in text and "a GPU, driver 1.2" in text
    figures = {"gpu": exact_bare.gpu_meanwhile([GpuStats(sm_clock_mhz=1980, throttle_reasons=4)])}
    lateness = {"checks": [], "figures": figures}
    assert "SM clock 1980 MHz" in exact_table.page(document(rows={"lateness": lateness}))
    assert "did not offer `--dtype float16`" in text and "dry run" not in text


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    if not exact_table.RESULTS.exists():
        pytest.skip("nothing has been measured on a GPU yet")
    committed = exact_table.read_results(exact_table.RESULTS)
    assert committed["settings"]["scale"] == 1, "a dry run is not committed"
    assert exact_table.PAGE.read_text(encoding="utf-8") == exact_table.page(committed)


def test_results_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(exact_table.BadResults):
        exact_table.read_results(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"format": 9}')
    with pytest.raises(exact_table.BadResults, match="format 1"):
        exact_table.read_results(tmp_path / "other.json")


# --------------------------------------------------------------------------------------- the run


def bench(tmp_path: Path, **more: Any) -> exact_time.Bench:
    options = {
        "awake": None,
        "out": tmp_path,
        "work": None,
        "resume": None,
        "rows": "",
        "budget_s": 60.0,
        "commit": "x",
    }
    settings = exact_rig.Settings("emulated", "v100", 1.0, (), None)
    return exact_time.Bench(argparse.Namespace(**(options | more)), settings)


def test_a_row_that_fails_or_takes_too_long_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(rig: exact_rig.Rig) -> dict[str, Any]:
        raise ValueError("broken")

    def hangs(rig: exact_rig.Rig) -> dict[str, Any]:
        return {"figures": {}, "checks": [exact_rig.check("never", float(_forever()), "s")]}

    def works(rig: exact_rig.Rig) -> dict[str, Any]:
        return {"figures": {}, "checks": [exact_rig.check("it", 1.0, "s")]}

    rows = {
        "breaks": row_bench.Plan(breaks, 1, 5),
        "hangs": row_bench.Plan(hangs, 1, 0.2),
        "works": row_bench.Plan(works, 1, 5),
        "long": row_bench.Plan(works, 1000, 2000),
    }
    monkeypatch.setattr(exact_time, "ROWS", rows)
    first = bench(tmp_path)
    first.run()
    first.write()
    found = exact_table.read_results(tmp_path / "exact_time.json")
    assert list(found["rows"]) == ["works"] and list(found["skipped"]) == ["long"]
    assert found["failed"]["breaks"] == "ValueError: broken"
    assert found["failed"]["hangs"].startswith("OutOfTime")
    rows["works"] = row_bench.Plan(breaks, 1, 5)
    again = bench(tmp_path)
    again.run()
    assert "works" in again.rows and "works" not in again.failed


def _forever() -> int:
    import time

    time.sleep(30)
    return 0


@pytest.mark.processes
def test_one_row_on_an_emulated_gpu_and_again(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(GPU / "exact_time.py"),
        "--device",
        "emulated",
        "--scale",
        "0.01",
        "--out",
        str(tmp_path),
        "--rows",
        "lateness",
        "--commit",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "exact_time.json").read_text())
    figures = found["rows"]["lateness"]["figures"]
    # Event time: an emulated GPU starts on the nanosecond, whenever the host wakes.
    assert figures["late_ns"]["n"] >= 50 and abs(figures["late_ns"]["p50"]) < 5 * US
    assert figures["failed"] == 0 and 0.2 < figures["gpu_busy"] <= 0.9
    assert (tmp_path / "exact_time.md").read_text() == exact_table.page(found)
    again = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert again.returncode == 0 and "lateness: there already" in again.stdout


@pytest.mark.processes
def test_the_open_loop_client_and_the_asyncio_server_speak_http(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, str(GPU / "peers" / "asyncio_server.py"), "emulated", "v100"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = ready_port(server.stdout.readline())
        assert port is not None, "the benchmark waits for this line"
        address = f"127.0.0.1:{port}"
        out = tmp_path / "cells.json"
        done = subprocess.run(
            [
                sys.executable,
                str(GPU / "peers" / "open_loop.py"),
                f"http://{address}/inference",
                "--rates",
                "100",
                "--slos-ms",
                "1,1000",
                "--seconds",
                "0.5",
                "--out",
                str(out),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        server.kill()
        server.communicate(timeout=10)
    impossible, easy = json.loads(out.read_text())
    assert impossible["in_time"] == 0  # batch 1 takes 2.6 ms
    assert easy["served"] == easy["sent"] == easy["in_time"] > 10
    assert easy["latency_p50_ns"] >= 2.6 * MS


def test_the_quantiles_of_nothing_are_none() -> None:
    assert exact_rig.spread([])["p50"] is None
    assert exact_rig.spread(np.array([1, 2, 3]))["p50"] == 2.0
