"""The command line as a user meets it: real processes, real sockets, exit codes."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from slosched.cli import doctor
from slosched.experiment.children import Child, Children
from slosched.version import __version__

pytestmark = pytest.mark.processes

HEAVY = ("torch", "matplotlib", "zmq", "uvloop", "numpy", "transformers", "PIL")
COMMANDS: tuple[list[str], ...] = (
    [],
    ["worker"],
    ["controller"],
    ["client"],
    ["client", "slo-exp-1"],
    ["client", "infer"],
    ["models"],
    ["status"],
    ["profile"],
    ["plot"],
    ["plot", "fig7"],
    ["doctor"],
    ["demo"],
    ["max-rate"],
    ["client", "max-rate"],
    ["unload"],
)


def slosched(
    *args: str, cwd: Path | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slosched", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        check=False,
    )


def test_version() -> None:
    done = slosched("--version")
    assert (done.returncode, done.stdout) == (0, f"slosched {__version__}\n")


def test_every_help_is_light_and_teaches() -> None:
    """One process for all: after every --help, nothing heavy has been imported."""
    code = f"""
import sys
from typer.testing import CliRunner
from slosched.cli.app import app
for command in {COMMANDS!r}:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, (command, result.output)
    assert command in (["client"], ["plot"], []) or "Examples:" in result.output, command
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["no-such-command"], 2, "unknown command 'no-such-command'; known: "),
        (["controller", "INFER9", "a:1"], 2, "unknown scheduler TYPE 'INFER9'"),
        (["client", "no-such-workload"], 2, "unknown workload 'no-such-workload'"),
        (["worker", "--device", "emulated", "--profile", "p999"], 2, "unknown profile 'p999'"),
        (
            ["plot", "fig99", "x"],
            2,
            "unknown figure 'fig99' (did you mean fig9?); known: calls, cascade, fig10, fig11, fig5",
        ),
        (["plot", "fig7", "no-such-dir"], 2, "no-such-dir is not a directory"),
        (["worker", "--no-such-option"], 2, "--no-such-option"),
        (["status", "127.0.0.1:1"], 5, "no controller answered at 127.0.0.1:1"),
        (["profile", "resnet50", "--device", "emulated"], 2, "has nothing to measure"),
        (["profile", "resnet50", "--batches", "0"], 2, "--batches"),
    ],
)
def test_errors_are_words_and_a_code(args: list[str], code: int, said: str) -> None:
    done = slosched(*args)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "slosched", "doctor", "--seconds", "0.2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_doctor_knows_every_extra() -> None:
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())[
        "project"
    ]["optional-dependencies"]
    found = {check.name.strip("[]"): check.value for check in doctor._packages(has_gpu=False)}
    assert set(found) == {"packages", *extras}
    for extra in set(extras) - {"torch"}:
        named = {re.split(r"[><=\[ ]", each)[0] for each in extras[extra]} - {
            "torch",
            "transformers",
        }
        assert all(package in found[extra] for package in named - {"cuda-bindings"}), extra


def test_doctor_says_ok_or_warn_of_everything() -> None:
    done = slosched("doctor", "--seconds", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"open files", "cores", "timer", "stalls", "clock", "GPU", "port 12345"} <= set(checks)
    for check in checks.values():
        assert check["ok"] is not bool(check["advice"]), check
    text = slosched("doctor", "--seconds", "0.2").stdout.splitlines()
    assert all(line.startswith(("ok ", "warn ", " ")) for line in text[:-1])


# ------------------------------------------------------------------------------ a whole cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Children, Path]]:
    """Two emulated GPUs and a controller: (its address, the processes, the telemetry's directory)."""
    directory = tmp_path_factory.mktemp("cluster")
    with Children() as children:
        loopback = ("--bind", "127.0.0.1", "--port", "0")
        worker = children.start(
            "worker",
            ["worker", "--device", "emulated", "--gpus", "2", *loopback],
            directory / "w.log",
        )
        address = f"127.0.0.1:{children.wait_ready(worker, within_s=30)}"
        logs = directory / "run"
        controller = children.start(
            "controller",
            [
                "controller",
                "INFER5",
                address,
                "0",
                "2",
                "5000000",
                *loopback,
                "--log-dir",
                str(logs),
            ],
            directory / "c.log",
        )
        yield f"127.0.0.1:{children.wait_ready(controller, within_s=30)}", children, logs


def test_a_sweep_from_one_end_to_the_other(
    cluster: tuple[str, Children, Path], tmp_path: Path
) -> None:
    address, _, _ = cluster
    done = slosched(
        "client",
        address,
        "slo-exp-1",
        "resnet50_v2",
        "2",
        "fixed-rate",
        "50",
        "20",
        "40",
        "2",
        "mul",
        "0.5",
        "--no-inputs",
        "--json",
        "--out",
        str(tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [step["slo"] for step in document["steps"]] == ["20x", "40x"]
    assert document["complete"]
    assert document["sent"] == 48  # a request of each copy at 40, 80, .. below 1000 ms
    assert (tmp_path / "out" / "client_log.tsv").is_file()
    assert "SLO 20x" in done.stderr  # plain progress lines, on stderr


def test_models_status_and_infer(cluster: tuple[str, Children, Path]) -> None:
    address, _, _ = cluster
    done = slosched("client", address, "infer", "resnet50_v2", "--slo", "2s", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["deadline_met"] is True
    models = json.loads(slosched("models", address, "--json").stdout)
    assert models["loadable"] == ["resnet50"]
    assert models["models"][0]["b1_ns"] == 2_600_000
    status = json.loads(slosched("client", address, "status", "--json").stdout)
    assert status["ready"] is True
    assert status["requests"]["arrived"] >= 1
    assert (
        "2 copies" in slosched("status", address).stdout
        or "1 copies" in slosched("status", address).stdout
    )


def test_an_impossible_deadline_is_told_and_fails(cluster: tuple[str, Children, Path]) -> None:
    done = slosched("client", cluster[0], "infer", "resnet50_v2", "--slo", "1ms")
    assert done.returncode == 1
    assert "deadline" in done.stdout and "(code 8)" in done.stderr
    assert "would have run 2.6ms" in done.stdout


def test_an_unknown_model_is_told(cluster: tuple[str, Children, Path]) -> None:
    done = slosched("client", cluster[0], "infer", "resnet9000")
    assert done.returncode != 0
    assert "resnet9000" in done.stderr
    assert "resnet50" in done.stderr


def test_a_port_in_use_is_told(cluster: tuple[str, Children, Path]) -> None:
    port = cluster[0].rpartition(":")[2]
    done = slosched("worker", "--device", "emulated", "--bind", "127.0.0.1", "--port", port)
    assert done.returncode == 4
    assert f"port {port}" in done.stderr
    assert "in use" in done.stderr


def test_ctrl_c_leaves_a_valid_partial_sweep(
    cluster: tuple[str, Children, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "slosched",
            "client",
            cluster[0],
            "slo-exp-1",
            "resnet50_v2",
            "2",
            "poisson",
            "50",
            "20",
            "100",
            "2",
            "mul",
            "60",
            "--no-inputs",
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "step 1/3" in line and " 0 r/s" not in line)
        assert re.search(r"[1-9]\d* r/s", line)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 130, stderr
    assert "a part of the run" in stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"] is False
    rows = (out / "client_log.tsv").read_text().splitlines()
    assert len(rows) == manifest["outcome"]["sent"] + 1


def test_sigterm_completes_the_telemetry(cluster: tuple[str, Children, Path]) -> None:
    """Ends the module's cluster: stays the last test that uses it."""
    address, children, logs = cluster
    slosched("client", address, "infer", "resnet50_v2", "--slo", "2s")
    controller: Child = children._children[-1]
    children.end(controller)
    assert controller.process.returncode == 0, controller.last_line()
    manifest = json.loads((logs / "manifest.json").read_text())
    assert manifest["complete"] is True
    rows = (logs / "clockwork_request_log.tsv").read_text().splitlines()
    assert len(rows) == manifest["outcome"]["requests_arrived"] + 1
    assert len(rows[1].split("\t")) == 12


# -------------------------------------------------------------------------------------- the demo


def test_demo_without_a_real_model(tmp_path: Path) -> None:
    done = slosched(
        "demo", "--seconds", "6", "--no-real", "--out", "demo", cwd=tmp_path, timeout=110
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "demo" / "emulated"
    for name in (
        "clockwork_request_log.tsv",
        "clockwork_action_log.tsv",
        "client_log.tsv",
        "manifest.json",
        "worker.log",
        "controller.log",
    ):
        assert (run / name).is_file(), name
    assert "judged by the controller, from arrival" in done.stdout
    assert "judged by the client, from the scheduled send" in done.stdout
    assert str(Path("demo")) in done.stdout.splitlines()[-1]
    assert _processes_in(tmp_path) == []


def test_a_demo_that_is_interrupted_ends_its_children(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "slosched", "demo", "--no-real", "--out", str(tmp_path / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        next(line for line in process.stderr if "step 1/12" in line)
        children = _children_of(process.pid)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert len(children) == 3  # worker, controller, client
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert "partial results are in" in stderr


def _children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _processes_in(directory: Path) -> list[int]:
    """Processes that run in `directory`: what a command started there has left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").resolve(strict=True) == directory:
                found.append(int(entry.name))
    return found
