"""Figures of a run show the requests of its own client, whichever other clients used the controller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.analysis.runs import distinct_names, open_run, read_requests
from slosched.analysis.tables import CONTROLLER_VIEW, summarise_steps
from slosched.cli.app import app
from slosched.telemetry.client_log import COLUMNS as CLIENT_COLUMNS
from slosched.telemetry.client_log import HEADER as CLIENT_HEADER
from slosched.telemetry.request_log import COLUMNS, HEADER

MS = 10**6
BEGIN_NS = 1_800_000_000 * 10**9


def request_row(request_id: int, at_ns: int, *, model_id: int = 0, slo_ns: int = 25 * MS) -> str:
    cells = dict.fromkeys(COLUMNS, "0") | {
        "t": str(at_ns + 5 * MS),
        "request_id": str(request_id),
        "model_id": str(model_id),
        "latency": str(5 * MS),
        "deadline": str(slo_ns),
        "deadline_met": "1",
    }
    return "\t".join(cells.values())


def client_row(request_id: int, at_ns: int) -> str:
    cells = dict.fromkeys(CLIENT_COLUMNS, "0") | {
        "scheduled_ns": str(at_ns),
        "latency_ns": str(6 * MS),
        "request_id": str(request_id),
        "slo_ns": str(25 * MS),
        "in_time": "1",
    }
    return "\t".join(cells.values())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    own = [(n, BEGIN_NS + n * 10 * MS) for n in range(1, 101)]
    rows = [request_row(n, at_ns) for n, at_ns in own]
    # `client infer` an hour before with the same numbers, model and user; another model; another SLO; a number
    # of its own.
    rows[:0] = [request_row(n, BEGIN_NS - 3600 * 10**9 + n) for n in range(1, 4)]
    rows += [request_row(7, BEGIN_NS, model_id=5), request_row(900, BEGIN_NS + MS)]
    rows += [request_row(901, BEGIN_NS + 2 * MS, slo_ns=MS)]
    (tmp_path / "clockwork_request_log.tsv").write_text("\n".join([HEADER, *rows, ""]))
    client_rows = [client_row(n, at_ns - MS) for n, at_ns in own]
    (tmp_path / "client_log.tsv").write_text("\n".join([CLIENT_HEADER, *client_rows, ""]))
    return tmp_path


def test_other_clients_requests_are_no_part_of_a_sweep(run_dir: Path) -> None:
    run = open_run(run_dir)
    assert run.requests is not None
    assert run.requests["request_id"].tolist() == list(range(1, 101))
    assert (run.requests["t"] > BEGIN_NS).all()
    steps = [s for s in summarise_steps(run_dir) if s.view == CONTROLLER_VIEW]
    assert [step.requests for step in steps] == [100]
    assert 90 < steps[0].offered_rps < 110
    assert len(read_requests(run_dir, only=["t"])) == 100


def test_without_a_client_s_log_or_for_everyone_all_rows_count(run_dir: Path) -> None:
    assert len(read_requests(run_dir, everyone=True)) == 106
    (run_dir / "client_log.tsv").unlink()
    assert len(read_requests(run_dir)) == 106


def test_a_sweep_that_does_not_count_says_so_where_it_is_shown(run_dir: Path) -> None:
    verdict = "INVALID: issue delay p99 9ms is above its bound of 2ms"
    manifest = {"kind": "client", "complete": True, "outcome": {"valid": False, "verdict": verdict}}
    (run_dir / "client_manifest.json").write_text(json.dumps(manifest))
    assert "(INVALID)" in open_run(run_dir).label
    shown = CliRunner().invoke(app, ["plot", "fig7", str(run_dir)])
    assert shown.exit_code == 0 and verdict in shown.output


def test_directories_of_one_name_are_told_apart() -> None:
    paths = [Path("/runs/infer5/seed=0"), Path("/runs/fifo/seed=0"), Path("/runs/fifo/seed=1")]
    assert distinct_names(paths) == ["infer5/seed=0", "fifo/seed=0", "fifo/seed=1"]
    assert distinct_names(paths[1:]) == ["seed=0", "seed=1"]
    assert distinct_names([paths[0], paths[0]]) == ["seed=0", "seed=0"]  # one run, twice
    assert distinct_names([]) == []


def test_a_client_s_log_of_another_run_takes_nothing_away(run_dir: Path) -> None:
    rows = [client_row(n, BEGIN_NS) for n in range(5000, 5010)]
    (run_dir / "client_log.tsv").write_text("\n".join([CLIENT_HEADER, *rows, ""]))
    assert len(read_requests(run_dir)) == 106
