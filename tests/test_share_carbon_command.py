"""`slosched share carbon` over runs that are there."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from slosched.cli.share_carbon import carbon
from slosched.share.result_paths import run_path
from slosched.share_spec import (
    Job,
    JobResult,
    Mode,
    PowerSample,
    Request,
    RunResult,
    ShareSpec,
)

S = 1_000_000_000
SPEC = ShareSpec(jobs=(Job(name="bert", model="bert"),), label="h200")
APP = typer.Typer()
APP.command()(carbon)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One hour at 1 kW in which a request is answered every minute."""
    minute = 60 * S
    rows = tuple(
        Request(
            job=0, number=k, arrived_ns=k * minute, started_ns=k * minute, ended_ns=(k + 1) * minute
        )
        for k in range(60)
    )
    power = tuple(PowerSample(at_ns=k * minute, watts=1000.0) for k in range(61))
    run = RunResult(
        mode=Mode.TM,
        repeat=0,
        jobs=(JobResult(job=0, requests=rows),),
        begin_ns=0,
        end_ns=3600 * S,
        power=power,
    )
    folder = tmp_path / run_path(SPEC, SPEC.jobs, Mode.TM, 0)
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(msgspec.json.encode(run))
    (folder / "spec.json").write_bytes(msgspec.json.encode(SPEC))
    return tmp_path


def test_an_hour_at_one_kilowatt(results: Path) -> None:
    done = CliRunner().invoke(APP, [str(results)])
    assert done.exit_code == 0, done.output
    cells = done.output.splitlines()[1].split()
    assert cells[:6] == ["bert", "tm", "r0", "3600", "1", "400"]
    assert float(cells[6]) == pytest.approx(32_602 / (4 * 365.25 * 24), rel=1e-3)
    assert cells[8:] == ["3.5", "-", "-"]
    assert "h200: grid_g_per_kwh 400, grid constant, pue 1, life_years 4" in done.output


def test_constants_of_ones_own(results: Path) -> None:
    file = results / "mine.toml"
    file.write_text("[grid]\ng_per_kwh = 10.0\npue = 2.0\n")
    done = CliRunner().invoke(APP, [str(results), "--constants", str(file), "--json"])
    (found,) = json.loads(done.output)
    assert found["carbon"]["operational_g"] == pytest.approx(20.0)
    assert found["carbon"]["constants"]["pue"] == 2.0 and found["carbon_alone"] is None
