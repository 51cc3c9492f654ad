"""The programs and workloads at the top level do what their READMEs say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fake_controller import FakeController

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.processes


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "clients" / program), *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_infer_one() -> None:
    with FakeController() as controller:
        done = run("infer_one.py", controller.address, "toy")
        assert (done.returncode, done.stderr) == (0, "")
        assert "toy takes float32 of shape (3, 4)" in done.stdout
        assert "output of shape (2,)" in done.stdout and "ok after 3ms of 100ms" in done.stdout
        controller.code, controller.reason = 8, "no plan"
        done = run("infer_one.py", controller.address, "toy")
        assert done.returncode == 1 and "not served: model 'toy': no plan" in done.stdout


def test_infer_async() -> None:
    with FakeController() as controller:
        done = run("infer_async.py", controller.address, "toy", "20")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["20", "answered"]


def test_sweep_from_a_file(tmp_path: Path) -> None:
    short = (ROOT / "workloads" / "fig7.toml").read_text().replace("period = 30 ", "period = 0.1 ")
    assert "period = 0.1 " in short
    (tmp_path / "short.toml").write_text(short)
    with FakeController() as controller:
        done = run("sweep.py", controller.address, str(tmp_path / "short.toml"))
        cut = run("sweep.py", controller.address, "workloads/fig7.toml", "--seconds", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("slo-exp-1: 12 x resnet50_v2, poisson 600/s")
    assert [line.split()[0] for line in lines[2:14]][:3] == ["1x", "1.5x", "2.25x"]
    assert len(lines) == 16 and lines[14].startswith("99 % in time (client), with 99 % confidence")
    assert (cut.returncode, cut.stderr) == (0, "")
    assert [line.split()[0] for line in cut.stdout.splitlines()[2:-2]] == ["1x"]


def test_embedded() -> None:
    done = run("embedded.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok after") == 2 and "batch of 1 on worker 0 GPU" in done.stdout


def test_no_controller_is_one_line() -> None:
    done = run("infer_one.py", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no controller answered at 127.0.0.1:1")
    assert "Traceback" not in done.stderr


def test_programs_are_short() -> None:
    for program in (ROOT / "clients").glob("*.py"):
        assert len(program.read_text().splitlines()) < 60, program
