"""`slosched simulate`: what it prints, sweeps, stops, and refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.cli.sim_options import SimOptions, bits_per_s, changed, sim_spec
from slosched.errors import InvalidConfig, SloschedError, UnknownName
from slosched.telemetry.client_log import FILE_NAME, read_client_log
from slosched.telemetry.manifest import read_manifest

SWEEP = ["slo-exp-1", "resnet50_v2", "2", "poisson", "400", "3.4", "5.1", "1.5", "mul", "0.1"]


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *args])
    return result.exit_code, result.output


def test_help_teaches(tmp_path: Path) -> None:
    code, text = run("--help")
    words = " ".join(text.split())
    assert code == 0 and "TYPE WORKLOAD [VALUE]..." in words
    assert "same arguments give the same bytes" in words
    for option in (
        "--gpus",
        "--profile",
        "--latency",
        "--exec-sigma",
        "--check",
        "--vary",
        "--jobs",
    ):
        assert option in words


def test_one_run_prints_a_table_and_leaves_a_run_directory(tmp_path: Path) -> None:
    code, text = run("INFER5", *SWEEP, "--gpus", "2", "--out", str(tmp_path / "run"))
    assert code == 0, text
    assert "INFER5 on 2 GPUs (v100), inputs off, seed 0" in text
    assert re.search(r"3\.4x +8\.84ms +\d+ +\d+\.\d\d %", text)
    assert "real time" in text and f"written to {tmp_path / 'run'}" in text
    assert read_manifest(tmp_path / "run")["type"] == "INFER5"


def test_json_is_a_programs(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["simulate", "INFER5:paper", *SWEEP, "--json", "--out", str(tmp_path), "--seed", "3"]
    )
    document = json.loads(result.stdout)
    assert document["complete"] is True and len(document["steps"]) == 2
    config = read_manifest(tmp_path)["config"]
    assert config["scheduler"]["fidelity"] == "paper" and config["seed"] == 3


def test_a_placement_rule_is_part_of_what_ran(tmp_path: Path) -> None:
    args = ("INFER5", *SWEEP, "--placement", "lru", "--out", str(tmp_path))
    assert run(*args)[0] == 0
    assert read_manifest(tmp_path)["config"]["scheduler"]["placement"] == "lru"


def test_a_sweep_has_a_row_and_a_folder_for_each_run(tmp_path: Path) -> None:
    args = ("FIFO", *SWEEP, "--seeds", "2", "--vary", "gpus=1,2", "--out", str(tmp_path))
    code, text = run(*args)
    assert code == 0, text
    names = [f"gpus={gpus},seed={seed}" for gpus in (1, 2) for seed in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(re.search(rf"^{name} +\d+ ", text, re.MULTILINE) for name in names)
    assert read_manifest(tmp_path / names[2])["config"]["gpus"] == 2
    logs = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.tsv"))]
    assert run(*args)[1].splitlines()[-6:] == text.splitlines()[-6:]
    assert logs == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.tsv"))]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("INFER9", *SWEEP), "unknown scheduler TYPE 'INFER9'"),
        (("INFER5", "nonesuch"), "unknown workload 'nonesuch'"),
        (("INFER5", "simple"), "--duration"),
        (("INFER5", "no.toml"), "no.toml"),
        (("INFER5", *SWEEP, "--profile", "v100:2,fig7:2"), "names 4 GPUs, --gpus says 6"),
        (("INFER5", *SWEEP, "--profile", "nonesuch"), "unknown profile"),
        (("INFER5", *SWEEP, "--bandwidth", "fast"), "write it as 10Gbit"),
        (("INFER5", *SWEEP, "--stall", "0.1"), "PROBABILITY:DURATION"),
        (("INFER5", *SWEEP, "--stall", "x:1ms"), "PROBABILITY:DURATION"),
        (("INFER5", *SWEEP, "--latency", "1ms,2ms"), "one time or four, not 2"),
        (("INFER5", *SWEEP, "--jitter", "soon"), "--jitter"),
        (("INFER5:paper", *SWEEP, "--fidelity", "best"), "contradict"),
        (("INFER5", *SWEEP, "--placement", "best"), "unknown placement 'best'"),
        (("INFER5:paper", *SWEEP, "--placement", "lru"), "'lru' has no effect under INFER5"),
        (("INFER5", *SWEEP, "--vary", "gpus"), "NAME=V1,V2"),
        (("INFER5", *SWEEP, "--vary", "gpux=1,2"), "unknown option 'gpux'"),
        (("INFER5", *SWEEP, "--vary", "gpus=1,many"), "gpus cannot be 'many'"),
        (("INFER5", *SWEEP, "--vary", "gpus=2,2"), "two runs would be called gpus=2;"),
        (("INFER5", *SWEEP, "--vary", "gpus=2", "--vary", "gpus=4"), "gpus is varied twice"),
        (("INFER5", *SWEEP, "--bandwidth", "0Gbit"), "'0Gbit' must be above 0; leave it out"),
        (("INFER5", *SWEEP, "--pcie", "0"), "--pcie: '0' must be above 0; leave it out"),
        (
            ("INFER5", *SWEEP, "--gpus-per-worker", "0", "--faults", "random"),
            "--gpus-per-worker must be at least 1, not 0",
        ),
        (
            ("INFER5", *SWEEP, "--gpus", "0", "--faults", "random"),
            "--gpus must be at least 1, not 0",
        ),
        (("INFER5", *SWEEP, "--pcie-shared"), "needs pcie_bytes_per_s"),
        (("INFER5", *SWEEP, "--exec-like", "/nonesuch"), "nonesuch"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    args: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app(["simulate", *args])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tsv"))


def test_options_become_a_spec() -> None:
    options = SimOptions(
        gpus=3,
        profile="v100:2,fig7",
        latency="1us,2us,3us,4us",
        jitter="5us",
        bandwidth="10Gbit",
        exec_sigma=0.01,
        stall="0.001:20ms",
        pcie="12.3GB",
        clock_offset="1ms",
        clock_drift=20.0,
        inputs=True,
        check=True,
        weights_cache="1GiB",
        scheduler_options={"schedule_ahead": "5ms", "default_slo": "50ms"},
    )
    spec = sim_spec(SWEEP, "INFER5", options, seed=4, duration="2")
    assert [p.name for p in spec.profiles] == ["v100", "v100", "fig7"]
    assert {p.weights_cache_bytes for p in spec.profiles} == {2**30}
    network = spec.network
    ways = (
        network.from_client_ns,
        network.to_client_ns,
        network.to_worker_ns,
        network.from_worker_ns,
    )
    assert ways == (1000, 2000, 3000, 4000) and network.jitter_ns == 5000
    assert network.bandwidth_bits_per_s == 10**10
    noise = spec.noise
    assert (noise.exec_sigma, noise.stall_probability, noise.stall_ns) == (0.01, 0.001, 20_000_000)
    assert noise.pcie_bytes_per_s == 12_300_000_000
    assert spec.clocks.offset_ns == 1_000_000 and spec.clocks.drift_ppm == 20.0
    assert spec.scheduler.schedule_ahead_ns == 5_000_000 and spec.duration_ns == 2 * 10**9
    assert spec.inputs and spec.check and spec.seed == 4
    assert changed(SimOptions(gpus=3)) == {"gpus": 3}


def test_options_by_their_names_as_texts() -> None:
    options = SimOptions()
    for name, text in (("gpus", "3"), ("exec-sigma", "0.5"), ("check", "yes"), ("latency", "1ms")):
        options = options.with_text(name, text)
    assert (options.gpus, options.exec_sigma, options.check) == (3, 0.5, True)
    for name, text in (("schedule-ahead", "5ms"), ("max-batch", "4"), ("early_refusal", "0.5")):
        options = options.with_text(name, text)
    scheduler = options.scheduler("INFER5")
    assert (scheduler.schedule_ahead_ns, scheduler.max_batch) == (5_000_000, 4)
    assert scheduler.early_refusal == 0.5
    with pytest.raises(UnknownName):
        options.with_text("speed", "1")
    with pytest.raises(UnknownName, match=r"'max_gpus'.*; known: cascade, client_weights, "):
        SimOptions(scheduler_options={"max_gpus": 3})
    with pytest.raises(InvalidConfig, match="check cannot be 'perhaps'"):
        options.with_text("check", "perhaps")


@pytest.mark.parametrize(
    ("text", "bits"), [("10Gbit", 10**10), ("400Mbit/s", 4 * 10**8), ("2.5Gbps", 2_500_000_000)]
)
def test_bandwidths(text: str, bits: int) -> None:
    assert bits_per_s(text) == bits


@pytest.mark.parametrize("text", ["10", "10GB", "-1Gbit", "Gbit"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(SloschedError):
        bits_per_s(text)


@pytest.mark.processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_valid_part(tmp_path: Path, number: int, code: int) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "slosched",
            "simulate",
            "INFER5",
            "slo-exp-1",
            "resnet50_v2",
            "2",
            "poisson",
            "400",
            "4",
            "4",
            "2",
            "mul",
            "3000",
            "--out",
            str(tmp_path / "run"),
        ],
        env={**os.environ, "PYTHONPATH": "src"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        assert "step 1/1" in child.stderr.readline()
        child.send_signal(number)
        out, _ = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == code
    assert "this is a part of the run: stopped" in out
    manifest = read_manifest(tmp_path / "run")
    assert manifest["complete"] is False
    assert len(read_client_log(tmp_path / "run" / FILE_NAME)) == manifest["outcome"]["sent"]


def alive_in_group(group: int) -> list[int]:
    """The processes of that group, without those that only wait to be reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def wrote_rows(out: Path) -> int:
    """Runs under `out` that have sent requests."""
    return sum(log.stat().st_size > 4096 for log in out.rglob(FILE_NAME))


LONG = ["slo-exp-1", "resnet50_v2", "2", "poisson", "400", "4", "4", "2", "mul", "3000"]
PLAN_MODELS = str(Path(__file__).parent.parent / "workloads" / "plan-example.toml")


# Processes, but in virtual time: others beside them do no harm.
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        pytest.param(
            ["simulate", "INFER5", *LONG, "--seeds", "2", "--jobs", "1"],
            signal.SIGTERM,
            143,
            marks=pytest.mark.slow,
        ),
        (["simulate", "INFER5", *LONG, "--seeds", "2", "--jobs", "2"], signal.SIGTERM, 143),
        (["simulate", "INFER5", *LONG, "--seeds", "2", "--jobs", "2"], signal.SIGINT, 130),
        (["compare", "INFER5,FIFO", *LONG, "--jobs", "2"], signal.SIGTERM, 143),
        (
            ["plan", "--models", PLAN_MODELS, "--duration", "3000s", "--jobs", "2"],
            signal.SIGTERM,
            143,
        ),
    ],
)
def test_a_signal_ends_a_sweep_and_its_processes_and_leaves_valid_parts(
    tmp_path: Path, command: list[str], number: int, code: int
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "slosched", *command, "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": "src"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert child.stderr is not None
        started = 2 if command[-1] == "2" else 1
        for line in child.stderr:
            if line.count(" %") == started:  # that many runs are under way
                break
        until = time.monotonic() + 60.0
        while wrote_rows(tmp_path) < started and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(child.pid, number)  # as `timeout` and a terminal do: parent and children
        _, said = child.communicate(timeout=30)
        until = time.monotonic() + 5.0  # the helper of multiprocessing ends itself somewhat later
        while alive_in_group(child.pid) and time.monotonic() < until:
            time.sleep(0.02)
        assert not alive_in_group(child.pid)
    finally:
        child.kill()
    assert child.returncode == code, said
    parts = [path.parent for path in sorted(tmp_path.rglob("manifest.json"))]
    assert len(parts) == started
    for part in parts:
        manifest = read_manifest(part)
        assert manifest["complete"] is False and manifest["outcome"]["problem"] == "stopped"
        assert len(read_client_log(part / FILE_NAME)) == manifest["outcome"]["sent"] > 0
