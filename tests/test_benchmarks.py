"""The benchmarks' meter and tables: what they count, void and print. Nothing is timed here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its programs import one another as a program's neighbours

import serving_core  # noqa: E402
import stall_meter  # noqa: E402
import tables  # noqa: E402
import windows  # noqa: E402
from cluster import Cluster, Load  # noqa: E402
from stall_meter import BOUNDS, Readings, Sample, Stall, StallMeter  # noqa: E402

from slosched.clock import now_ns  # noqa: E402
from slosched.telemetry import client_log  # noqa: E402
from slosched.telemetry.client_log import ClientRecord, format_client  # noqa: E402

MS = 1_000_000
S = 1_000_000_000


def readings(*stalls: Stall, foreign_ns: int = 0, steal_ns: int = 0) -> Readings:
    """A meter that sampled at 0, 5 and 10 s; all foreign work and theft was in the first half."""
    samples = (
        Sample(0, 0, 0, {7: 0}),
        Sample(5 * S, steal_ns, foreign_ns, {7: 1 * S}),
        Sample(10 * S, steal_ns, foreign_ns, {7: 2 * S}),
    )
    return Readings("real-time", stalls, samples)


# ------------------------------------------------------------------------------------ the meter


def test_a_quiet_window_counts() -> None:
    found = readings(Stall(0, 2 * S, 2 * MS)).disturbance(1 * S, 4 * S)
    assert found.stalls == 1 and found.longest_stall_ns == 2 * MS
    assert found.reasons(BOUNDS) == ()


@pytest.mark.parametrize(
    ("meter", "reason"),
    [
        (readings(Stall(0, 2 * S, 25 * MS)), "the machine stood still for 25 ms"),
        (readings(*(Stall(1, i * 10 * MS, 5 * MS) for i in range(110, 150))), "lost to stalls"),
        (readings(foreign_ns=1 * S), "20 % of a CPU used by other processes"),
        (readings(steal_ns=S // 2), "10 % of a CPU taken by the host"),
    ],
)
def test_each_disturbance_voids_the_window_it_overlaps_and_no_other(
    meter: Readings, reason: str
) -> None:
    [found] = meter.disturbance(1 * S, 4 * S).reasons(BOUNDS)
    assert reason in found
    assert meter.disturbance(6 * S, 9 * S).reasons(BOUNDS) == ()


def test_a_stall_across_an_edge_is_counted_for_the_part_inside() -> None:
    found = readings(Stall(0, 1 * S + 4 * MS, 8 * MS)).disturbance(1 * S, 2 * S)
    assert found.stalled_share == pytest.approx(0.004)
    assert found.longest_stall_ns == 8 * MS


def test_stalls_of_two_cpus_at_once_are_not_added_up() -> None:
    both = readings(Stall(0, 2 * S, 8 * MS), Stall(1, 2 * S, 8 * MS))
    assert both.disturbance(1 * S, 3 * S).stalled_share == pytest.approx(0.004)


def test_a_window_the_meter_did_not_see_is_an_error() -> None:
    with pytest.raises(ValueError, match="whole window"):
        readings().disturbance(9 * S, 11 * S)


def test_cpu_time_is_interpolated_and_flat_beyond_the_samples() -> None:
    assert readings().cpu_s(7, 1 * S, 6 * S) == pytest.approx(1.0)
    assert readings().cpu_s(7, 9 * S, 99 * S) == pytest.approx(0.2)
    assert readings().cpu_s(8, 0, 5 * S) == 0


def test_meter_lines_are_read_back() -> None:
    assert stall_meter.parse_stalls(1, ["20 5", ""]) == [Stall(1, 20, 5)]
    sample = Sample(1, 2, 3, {4: 5})
    assert stall_meter.parse_samples([json.dumps(vars(sample)), ""]) == [sample]


def burn(cpu_s: float) -> None:
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come within 20 s"
        time.sleep(0.05)


def test_our_cpu_time_is_told_from_that_of_others() -> None:
    as_ours = stall_meter.CpuCounter(os.getpid())
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        as_foreign = stall_meter.CpuCounter(sleeper.pid)
        ours, foreign = as_ours.sample(), as_foreign.sample()
        burn(0.3)
        us = os.getpid()
        assert sleeper.pid in ours.ours_ns and list(foreign.ours_ns) == [sleeper.pid]
        assert as_ours.sample().ours_ns[us] - ours.ours_ns[us] >= 0.25 * S
        assert as_foreign.sample().foreign_ns - foreign.foreign_ns >= 0.25 * S
    finally:
        sleeper.kill()
        sleeper.wait(10)


def test_foreign_work_of_a_process_that_ended_is_counted() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        counter = stall_meter.CpuCounter(sleeper.pid)
        before = counter.sample().foreign_ns
        program = "import time\nwhile time.process_time() < 0.4: pass"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
        assert counter.sample().foreign_ns - before >= 0.3 * S
    finally:
        sleeper.kill()
        sleeper.wait(10)


@pytest.mark.processes
def test_the_meter_sees_a_stall_and_ends_its_children(tmp_path: Path) -> None:
    with StallMeter(tmp_path) as meter:
        own = meter.readings().samples[-1].ours_ns
        [ticker] = [pid for pid in own if words_of(pid)[-2:] == ["tick", "0"]] or [0]
        if not ticker:
            pytest.skip("this machine gives us no CPU 0")
        os.kill(ticker, signal.SIGSTOP)  # a machine that stands still, as far as it can tell
        time.sleep(0.3)
        os.kill(ticker, signal.SIGCONT)
        wait_for(lambda: any(s.cpu == 0 and s.late_ns > 200 * MS for s in meter.readings().stalls))
    for pid in own:
        assert pid == os.getpid() or not any("stall_meter.py" in word for word in words_of(pid))


def words_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    return []


# ---------------------------------------------------------------------------------- the windows


def test_a_client_log_is_cut_into_its_steps_without_the_settling(tmp_path: Path) -> None:
    records = [
        ClientRecord(
            scheduled_ns=i * 10 * MS,
            issue_delay_ns=1,
            latency_ns=2 * MS,
            request_id=i,
            user_id=0,
            model_id=0,
            slo_factor=1.5 if i < 200 else 2.25,
            slo_ns=3_900_000,
            code=0,
            in_time=True,
        )
        for i in range(400)
    ]
    path = tmp_path / client_log.FILE_NAME
    path.write_text("\n".join([client_log.HEADER, *map(format_client, records)]) + "\n")
    first, second = windows.steps_of(client_log.read_client_log(path))
    assert (first.slo_factor, len(first.rows), first.start_ns) == (1.5, 150, 500 * MS)
    assert (second.slo_factor, len(second.rows)) == (2.25, 200)
    assert second.end_ns == 3990 * MS + 2 * MS


class ScriptedRecorder(windows.Recorder):
    """A recorder whose runs come from a script: for each run, whether each of its steps is void."""

    def __init__(self, script: list[list[bool]], *, tries: int, until_ns: int) -> None:
        super().__init__(cast(Any, None), Path(), BOUNDS, tries=tries, until_ns=until_ns)
        self._script = script
        self.loads: list[Load] = []

    def _run(self, cluster: Cluster, load: Load, repeat: int, attempt: int) -> list[windows.Window]:
        first = float(load.slo_start)
        verdicts = self._script[len(self.loads)]
        self.loads.append(load)
        return [
            windows.Window(
                **window(slo_factor=first * 1.5**i, void=["a stall"] if void else []),
                copies=12,
                gpus=6,
                inputs=False,
                seed=load.seed,
                repeat=repeat,
                attempt=attempt,
                start_ns=0,
                codes={},
                disturbance=readings().disturbance(1 * S, 2 * S),
            )
            for i, void in enumerate(verdicts)
        ]


SWEEP = Load(rate=600, copies=12, slo_start="1.5", slo_end="3.375", period_s=5, seed=2, steps=3)


def test_only_a_void_step_is_run_again_with_other_arrivals_until_it_is_clean() -> None:
    script = [[False, True, False], [True], [False]]
    recorder = ScriptedRecorder(script, tries=4, until_ns=now_ns() + 60 * S)
    last = recorder.record(cast(Any, None), SWEEP)
    assert [(w.slo_factor, w.attempt, w.void) for w in last] == [
        (1.5, 1, []),
        (2.25, 3, []),
        (3.375, 1, []),
    ]
    again = recorder.loads[1:]
    assert [(load.slo_start, load.slo_end, load.steps) for load in again] == [
        ("2.25", "2.25", 1)
    ] * 2
    assert len({load.seed for load in recorder.loads}) == 3


def test_tries_and_time_bound_the_repetitions() -> None:
    script = [[True]] * 9
    bounded = ScriptedRecorder(script, tries=3, until_ns=now_ns() + 60 * S)
    assert bounded.record(cast(Any, None), SWEEP)[0].void and len(bounded.loads) == 3
    late = ScriptedRecorder(script, tries=3, until_ns=now_ns() - 1)
    assert late.record(cast(Any, None), SWEEP)[0].void and len(late.loads) == 1


# ----------------------------------------------------------------------------------- the tables


def window(**changes: Any) -> dict[str, Any]:
    return {
        "rate": 600,
        "slo": "3.38x",
        "slo_factor": 3.375,
        "slo_ns": 8_775_000,
        "duration_s": 5.0,
        "sent": 3000,
        "in_time": 2997,
        "met": 3000,
        "latency_p50_ns": 4 * MS,
        "latency_p99_ns": 8 * MS,
        "issue_delay_p50_ns": MS // 10,
        "issue_delay_p99_ns": MS,
        "cpu_s": {"controller": 0.9, "worker": 0.6, "client": 0.3},
        "void": [],
    } | changes


def record(**data: Any) -> dict[str, Any]:
    host = {"python": "3.11", "cpu_model": "a CPU", "cpu_usable": 2, "memory_bytes": 2**33}
    return {
        "ran_at": "2026-01-02T03:04:05+00:00",
        "machine": host | {"platform": "Linux"},
        "versions": {"slosched": "0.1", "commit": "abc", "numpy": "2"},
        "settings": {"window_s": 5.0, "quick": False},
        "meter": {"priority": "real-time"},
    } | data


def cells(text: str, line: int = 2) -> list[str]:
    """The cells of one line of a Markdown table; 0 is the heading."""
    return [cell.strip() for cell in text.splitlines()[line].strip("|").split("|")]


def test_void_windows_count_in_no_figure_but_are_told() -> None:
    void = window(in_time=0, met=0, latency_p99_ns=500 * MS, void=["the machine stood still"])
    text = tables.render("sweep", record(windows=[void, window()]))
    assert cells(text) == [
        "600",
        "3.38x",
        "1.00",
        "0.9990",
        "1.0000",
        "0.999",
        "≥ 0.99 met",
        "4.00",
        "8.00",
        "1.00",
        "1 (1 void)",
    ]
    assert "| 600 | 300 | 200 | 100 | 0.36 |" in text
    assert "2 windows of 5 s, 1 of them void" in text and "slosched 0.1 (abc)" in text


def test_a_line_without_a_clean_window_is_not_measured() -> None:
    text = tables.render("sweep", record(windows=[window(void=["stood still"])]))
    assert "not measured" in cells(text)[6] and cells(text)[3] == "–"  # noqa: RUF001


def test_a_missed_target_is_called_missed_and_no_rounding_meets_it() -> None:
    text = tables.render("sweep", record(windows=[window(sent=100_000, in_time=98_999)]))
    assert cells(text)[3] == "0.9899" and cells(text)[6] == "≥ 0.99 **missed**"


def test_targets_hold_from_their_slo_up_and_nowhere_else() -> None:
    low = window(slo="2.25x", slo_factor=2.25, slo_ns=5_850_000, in_time=10)
    assert cells(tables.render("sweep", record(windows=[low])))[6] == ""


def test_single_is_compared_with_the_peer() -> None:
    fast = window(slo="25ms", slo_factor=0.0, slo_ns=25 * MS)
    row = cells(tables.render("single", record(windows=[fast])))
    assert row[:4] == ["25ms", "1.03", "0.28", "0.29"] and row[9].endswith(": met")
    slow = fast | {"latency_p99_ns": 21 * MS}
    assert cells(tables.render("single", record(windows=[slow])))[9].endswith("**missed**")


def test_inputs_hold_up_to_the_first_rate_that_does_not() -> None:
    steady = {"slo": "100ms", "slo_factor": 0.0, "slo_ns": 100 * MS}
    rates = [window(rate=r, **steady) for r in (50, 100, 400)]
    late = window(rate=200, **steady | {"issue_delay_p99_ns": 3 * MS})
    text = tables.render("inputs", record(windows=[*rates, late]))
    assert "**100 requests/s hold (60 MB/s" in text
    assert [cells(text, line)[1] for line in (4, 5, 6, 7)] == ["yes", "yes", "no", "yes"]


def test_growth_is_fitted_to_what_follows_the_first_minute() -> None:
    samples = [
        {"at_s": s, "rss": 50e6 + (s - 60) * 1000 if s >= 60 else 0.1} for s in range(0, 300, 5)
    ]
    fitted = tables.growth(samples, "rss")
    assert fitted is not None
    assert fitted[0] == pytest.approx(60_000) and fitted[1] == pytest.approx(50e6)
    assert tables.growth(samples[:20], "rss") is None


def test_memory_that_grows_misses_its_target() -> None:
    sizes = [
        {"at_s": s, "controller_bytes": 5e7, "worker_bytes": 5e7 + 1e4 * s, "client_bytes": 1e6}
        for s in range(0, 600, 5)
    ]
    text = tables.render("memory", record(minutes=10, rate=1200, samples=sizes))
    assert cells(text, 4)[-1].endswith("met") and cells(text, 5)[-1].endswith("**missed**")


def test_startup_says_whether_torch_came_along() -> None:
    run = {"ready_s": 0.4, "joined_s": 0.6, "rss_bytes": 2**26, "torch_is_loaded": False}
    good = cells(tables.render("startup", record(runs=[run])))
    bad = cells(tables.render("startup", record(runs=[run | {"torch_is_loaded": True}])))
    assert good[0] == "0.40" and good[6].endswith("met") and bad[6].endswith("**missed**")


def test_the_readme_has_a_place_for_every_part() -> None:
    text = (BENCHMARKS / "README.md").read_text()
    for name in serving_core.PARTS:
        begin, end = tables.markers(name)
        assert text.count(begin) == text.count(end) == 1


def test_tables_replace_what_stands_between_the_markers_and_nothing_else() -> None:
    begin, end = tables.markers("issue-delay")
    parts = {"issue-delay": record(windows=[window(rate=2400)])}
    once = tables.fill(f"before\n{begin}\nold\n{end}\nafter\n", parts)
    assert once.startswith(f"before\n{begin}\n\n| R |") and once.endswith(f"{end}\nafter\n")
    assert "old" not in once and tables.fill(once, parts) == once
    with pytest.raises(tables.BadResults, match="issue-delay"):
        tables.fill("no markers", parts)


def test_the_readme_is_what_the_results_say() -> None:
    if not tables.RESULTS.exists():
        pytest.skip("nothing has been measured yet")
    text = (BENCHMARKS / "README.md").read_text()
    assert tables.fill(text, tables.read_results(tables.RESULTS)["parts"]) == text


def test_results_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(tables.BadResults, match=r"run serving_core\.py"):
        tables.read_results(path)
    path.write_text('{"format": 99}')
    with pytest.raises(tables.BadResults, match="format 1"):
        tables.read_results(path)
    path.write_text('{"format": 1, "parts": {"other": {}}}')
    with pytest.raises(tables.BadResults, match="other"):
        tables.read_results(path)


def test_a_part_that_is_run_again_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    serving_core._merge(path, "sweep", record(windows=[]))
    serving_core._merge(path, "memory", record(samples=[]))
    serving_core._merge(path, "sweep", record(windows=[window()]))
    parts = tables.read_results(path)["parts"]
    assert set(parts) == {"sweep", "memory"} and len(parts["sweep"]["windows"]) == 1
