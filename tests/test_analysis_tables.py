"""The numbers of a sweep's steps, from hand-made logs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from slosched.analysis.runs import labels, open_run
from slosched.analysis.tables import (
    CLIENT_VIEW,
    CONTROLLER_VIEW,
    as_json,
    render_text,
    summarise_steps,
)
from slosched.errors import InvalidConfig
from slosched.telemetry.manifest import finish_manifest, write_manifest
from slosched.telemetry.run_dir import CLIENT_MANIFEST
from slosched.telemetry.table import MalformedLog
from synthetic_run import (
    B1_NS,
    MS,
    START_NS,
    S,
    client,
    request,
    sweep,
    write_clients,
    write_requests,
)

REQUESTS = "clockwork_request_log.tsv"
CLIENTS = "client_log.tsv"


def test_a_step_by_hand(tmp_path: Path) -> None:
    # Eleven arrivals 0.1 s apart; the SLO is 5.2 ms. One late, two refused, one timed out.
    records = [request(i * S // 10, (i + 1) * MS // 2, factor=2.0, number=i) for i in range(7)]
    records.append(request(7 * S // 10, 9 * MS, factor=2.0))
    records += [request(i * S // 10, 50_000, factor=2.0, code=8) for i in (8, 9)]
    records.append(request(10 * S // 10, 5 * MS, factor=2.0, code=4))
    write_requests(tmp_path / REQUESTS, records)
    (step,) = summarise_steps(tmp_path)
    assert step.view == CONTROLLER_VIEW
    assert (step.step, step.sweep, step.slo_factor) == (0, 0, 2.0)
    assert step.slo_ns == 2 * B1_NS
    assert step.slo_text == "2x"
    assert step.start_ns == START_NS
    assert step.requests == 11
    assert step.duration_ns == pytest.approx(1.1 * S, rel=1e-9)
    assert step.offered_rps == pytest.approx(10)
    assert step.satisfied == 7
    assert step.satisfaction == pytest.approx(7 / 11)
    assert step.goodput_rps == pytest.approx(7 / 1.1)
    # Percentiles of the eight successes 0.5, 1, ..., 3.5 and 9 ms, linearly interpolated.
    assert step.p50_ns == pytest.approx(2.25 * MS)
    assert step.p99_ns == pytest.approx((3.5 + 0.93 * 5.5) * MS)
    assert step.by_code == {4: 1, 8: 2}


def test_steps_come_in_time_order_and_by_arrival(tmp_path: Path) -> None:
    # The last request of the first step departs long after the second step began.
    records = [request(0, MS, factor=8.0), request(S, 5 * S, factor=8.0)]
    records += [request(S + i * MS, MS, factor=1.5) for i in range(2, 5)]
    write_requests(tmp_path / REQUESTS, records)
    steps = summarise_steps(tmp_path)
    assert [(s.step, s.slo_factor, s.requests) for s in steps] == [(0, 8.0, 2), (1, 1.5, 3)]


def test_absolute_slos_are_steps_too(tmp_path: Path) -> None:
    records = [request(0, 11 * MS, factor=0.0, slo_ns=10 * MS)]
    records += [request(S, 11 * MS, factor=0.0, slo_ns=15 * MS) for _ in range(2)]
    write_requests(tmp_path / REQUESTS, records)
    steps = summarise_steps(tmp_path)
    assert [(s.slo_text, s.requests, s.satisfied) for s in steps] == [
        ("10ms", 1, 0),
        ("15ms", 2, 2),
    ]


def test_both_views_each_with_its_own_satisfaction(tmp_path: Path) -> None:
    records = [request(i * S // 10, 5 * MS, factor=2.0, number=i) for i in range(10)]
    write_requests(tmp_path / REQUESTS, records)
    late = [client(r, 300_000 if r.request_id % 2 else 100_000) for r in records]
    write_clients(tmp_path / CLIENTS, late)
    controller, seen = summarise_steps(tmp_path)
    assert (controller.view, controller.satisfaction) == (CONTROLLER_VIEW, 1.0)
    assert (seen.view, seen.satisfaction) == (CLIENT_VIEW, 0.5)
    assert seen.p50_ns == pytest.approx(5.2 * MS)


def test_a_second_sweep_on_a_running_controller_stands_apart(tmp_path: Path) -> None:
    first = sweep(seed=1)
    second = [
        request(r.arrival_ns - START_NS + 60 * S, MS, factor=r.slo_factor) for r in sweep(seed=2)
    ]
    write_requests(tmp_path / REQUESTS, first + second)
    steps = summarise_steps(tmp_path)
    assert [s.sweep for s in steps] == [0] * 5 + [1] * 5
    assert [s.slo_factor for s in steps[:5]] == [s.slo_factor for s in steps[5:]]
    assert all(2.9 * S < s.duration_ns < 3.1 * S for s in steps)
    assert all(s.satisfaction == 1 for s in steps[5:])


def test_two_interleaved_slos_are_one_sweep(tmp_path: Path) -> None:
    # A slow background stream whose gaps are long, and a dense one beside it.
    slow = [request(i * 6 * S, MS, factor=9.0) for i in range(8)]
    dense = [request(i * S // 20, MS, factor=2.0) for i in range(800)]
    write_requests(tmp_path / REQUESTS, slow + dense)
    assert sorted((s.slo_factor, s.sweep) for s in summarise_steps(tmp_path)) == [(2, 0), (9, 0)]


def test_a_step_of_one_request_has_no_rates(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, [request(0, 50_000, code=8)])
    (step,) = summarise_steps(tmp_path)
    assert math.isnan(step.offered_rps)
    assert math.isnan(step.p99_ns)
    (document,) = as_json([step])
    assert document["p99_ns"] is None
    assert document["goodput_rps"] is None
    assert document["by_code"] == {"8": 1}
    json.dumps(document, allow_nan=False)
    assert " - " in render_text([step])


def test_tables_say_who_judged_and_what_the_codes_mean(tmp_path: Path) -> None:
    records = sweep(seed=3)
    write_requests(tmp_path / REQUESTS, records)
    write_clients(tmp_path / CLIENTS, [client(r, 0) for r in records])
    steps = summarise_steps(tmp_path)
    text = render_text(steps)
    for view in (CONTROLLER_VIEW, CLIENT_VIEW):
        assert f"judged by the {view}" in text
    assert text.count("2.25x") == 2
    assert "8 could not start in time" in text
    assert max(map(len, text.splitlines())) <= 110


def test_nearly_all_is_not_printed_as_all(tmp_path: Path) -> None:
    records = [request(i * MS, MS) for i in range(30_000)] + [request(0, MS, code=8)]
    write_requests(tmp_path / REQUESTS, records)
    text = render_text(summarise_steps(tmp_path))
    assert "99.99 %" in text
    assert "100.00" not in text


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"holds no run: expected clockwork_request_log\.tsv"):
        summarise_steps(tmp_path)
    with pytest.raises(InvalidConfig, match="does not exist"):
        summarise_steps(tmp_path / "absent")


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, sweep(seed=4))
    text = (tmp_path / REQUESTS).read_text().splitlines(keepends=True)
    text[40] = "nonsense\n"
    (tmp_path / REQUESTS).write_text("".join(text))
    with pytest.raises(MalformedLog, match=r"request_log\.tsv, line 41"):
        summarise_steps(tmp_path)


def test_a_killed_run_is_a_valid_partial_one(tmp_path: Path) -> None:
    records = sweep(seed=5)
    write_requests(tmp_path / REQUESTS, records)
    data = (tmp_path / REQUESTS).read_bytes()
    (tmp_path / REQUESTS).write_bytes(data[:-7])
    assert sum(s.requests for s in summarise_steps(tmp_path)) == len(records) - 1


def test_labels_from_the_client_s_manifest(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, sweep(seed=6))
    write_manifest(tmp_path, "controller", {"policy": "INFER5"})
    assert re.fullmatch(r"N=3, R≈(9\d|1[01]\d)", open_run(tmp_path).label)  # counted
    spec = {"model": "resnet50", "copies": 12, "rate": 600.0}
    write_manifest(tmp_path, "client", spec, name=CLIENT_MANIFEST)
    assert open_run(tmp_path).label == "N=12, R=600 (partial)"
    finish_manifest(tmp_path, {"complete": True}, name=CLIENT_MANIFEST)
    assert open_run(tmp_path).label == "N=12, R=600"


def test_labels_of_published_names_and_of_runs_alike(tmp_path: Path) -> None:
    name = "file=controller_dist=poisson_rate=2400_num-models=48_request.csv"
    write_requests(tmp_path / name, sweep(seed=7))
    assert open_run(tmp_path / name).label == "N=48, R=2400"
    for run in ("left", "right"):
        write_requests(tmp_path / run / REQUESTS, sweep(seed=8))
    runs = [open_run(tmp_path / run) for run in ("left", "right")]
    assert labels(runs) == [f"{run.label} · {run.path.name}" for run in runs]
    assert runs[0].label == runs[1].label


def test_logs_in_the_folders_of_each_side(tmp_path: Path) -> None:
    records = sweep(seed=9)
    write_requests(tmp_path / "controller" / REQUESTS, records)
    write_clients(tmp_path / "client" / CLIENTS, [client(r, 0) for r in records])
    assert {s.view for s in summarise_steps(tmp_path)} == {CONTROLLER_VIEW, CLIENT_VIEW}
