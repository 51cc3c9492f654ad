"""One fault has one exit code, whichever command meets it; docs/reference.md has the table."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fake_controller import FakeController
from slosched import errors
from slosched.cli.app import app
from slosched.clients.aio import AsyncClient
from slosched.errors import SloschedError

ROOT = Path(__file__).parent.parent
PLAN = str(ROOT / "workloads" / "plan-example.toml")
SWEEP = "slo-exp-1 resnet50_v2 1 poisson 10 1 1 2 mul 1"
NOT_A_MODEL = SWEEP.replace("resnet50_v2", "nonesuch")
NOWHERE = "127.0.0.1:1"

#: Commands by fault. GOOD is a finished run, BAD one whose logs are none.
MISSING_FILE = (
    "worker --config none.toml",
    "worker --device emulated --profile none.toml",
    "controller INFER5 --workers 127.0.0.1:1 --config none.toml",
    "client none.toml",
    "client infer resnet50_v2 none.npy",
    "client infer resnet50_v2 none.jpg",
    "simulate INFER5 none.toml",
    f"simulate INFER5 {SWEEP} --profile none.toml",
    f"simulate INFER5 {SWEEP} --exec-like none",
    f"simulate INFER5 {SWEEP} --faults none.toml",
    "simulate INFER5 replay none.csv",
    "compare INFER5,FIFO none.toml",
    "bound none.toml",
    "validate none.toml",
    "plan --models none.toml",
    "max-rate INFER5 resnet50_v2 --slo 25ms --profile none.toml",
    "plot fig7 none",
    "plot fig5 none",
    "report none",
    "explain none",
    "trace none",
    "profile --all --config none.toml",
    "experiment fig7 --hosts none.toml",
)
MALFORMED_FILE = (
    *(
        command.replace("none.toml", file)
        for file in ("bad.toml", "unknown.toml", "folder")
        for command in MISSING_FILE
        if "none.toml" in command
    ),
    "simulate INFER5 replay bad.toml",
    f"simulate INFER5 {SWEEP} --exec-like BAD",
    *(
        f"{reader} {run}"
        for reader in ("plot fig7", "plot fig5", "report", "explain", "trace")
        for run in ("BAD", "folder", "bad.toml")
    ),
)
UNKNOWN_MODEL = (
    f"simulate INFER5 {NOT_A_MODEL}",
    f"simulate INFER5 {NOT_A_MODEL} --seeds 2 --jobs 2",
    f"compare INFER5,FIFO {NOT_A_MODEL}",
    f"bound {NOT_A_MODEL}",
    f"validate {NOT_A_MODEL}",
    "max-rate INFER5 nonesuch --slo 25ms",
    "plan --models unknown-model.toml",
    "profile nonesuch --device cpu",
    f"client CONTROLLER {SWEEP.replace('resnet50_v2', 'unknown')}",
    "client CONTROLLER infer unknown",
    "client CONTROLLER unload unknown",
    "unload unknown CONTROLLER",
    "client CONTROLLER max-rate unknown --slo 25ms",
)
UNKNOWN_NAME = (
    "nonesuch",
    "client nonesuch",
    "controller NONESUCH --workers 127.0.0.1:1",
    "simulate NONESUCH " + SWEEP,
    f"compare INFER5,NONESUCH {SWEEP}",
    f"plan --models {PLAN} --policy NONESUCH",
    f"simulate INFER5 {SWEEP} --profile nonesuch",
    "worker --device nonesuch",
    "worker --device emulated --profile nonesuch",
    "profile resnet50 --device nonesuch",
    "plot nonesuch GOOD",
    "experiment nonesuch --engine sim",
    "experiment fig7 --engine sim --configs nonesuch",
    "status --nonesuch",
)
BAD_DURATION = (
    f"client {SWEEP} --duration soon",
    "client infer resnet50_v2 --slo soon",
    "client max-rate resnet50_v2 --slo soon",
    "status --interval soon",
    "controller INFER5 --workers 127.0.0.1:1 --schedule-ahead soon",
    "controller INFER5 127.0.0.1:1 0 6 soon",
    f"simulate INFER5 {SWEEP} --duration soon",
    f"simulate INFER5 {SWEEP} --latency soon",
    "simulate INFER5 rate-list resnet50_v2 1 poisson soon 300 1",
    f"compare INFER5,FIFO {SWEEP} --duration soon",
    f"bound {SWEEP} --span soon",
    "max-rate INFER5 resnet50_v2 --slo soon",
    "max-rate INFER5 resnet50_v2 --slo 25ms --window soon",
    f"validate {SWEEP} --duration soon",
    f"plan --models {PLAN} --duration soon",
    "report GOOD --window soon",
    "trace GOOD --from soon",
)
BAD_ADDRESS = (
    "client nonsense:x infer resnet50_v2",
    "models ::1:5",
    "unload resnet50_v2 ::1:5",
    "status 127.0.0.1:99999",
    "controller INFER5 --workers nonsense",
    "controller INFER5 --workers 127.0.0.1:1 --bind not/a/host",
    "controller INFER5 --workers 127.0.0.1:1 --port 99999",
    "controller INFER5 --workers 127.0.0.1:1 --http-port 99999",
    "worker --device emulated --port 99999",
    "worker --device emulated --bind not/a/host",
    "worker --device emulated --bind 192.0.2.1 --port 0",
)
UNWRITABLE = (
    "report GOOD --out folder",
    "trace GOOD --out folder",
    "profile resnet50 --device cpu --out folder",
    "plot fig7 GOOD --out file",
    "azure-trace --out file",
    f"simulate INFER5 {SWEEP} --out file",
    f"compare INFER5,FIFO {SWEEP} --out file",
    f"plan --models {PLAN} --out file",
    "demo --out file/demo",
    "report GOOD --out /dev/full",
    "trace GOOD --out /dev/full",
)
OUTPUT_EXISTS = (
    "report GOOD --out file",
    "profile resnet50 --device cpu --out file",
    "azure-trace --out traced",
    "demo --out folder",
)
IN_USE = (
    "worker --device emulated --bind 127.0.0.1 --port PORT",
    "controller INFER5 --workers 127.0.0.1:1 --bind 127.0.0.1 --port PORT --log-dir logs",
    "controller INFER5 --workers 127.0.0.1:1 --bind 127.0.0.1 --port 0 --http-port PORT --log-dir logs2",
)
NO_ANSWER = (
    f"client {NOWHERE} {SWEEP}",
    f"client {NOWHERE} infer resnet50_v2",
    f"client {NOWHERE} max-rate resnet50_v2 --slo 25ms",
    f"models {NOWHERE}",
    f"status {NOWHERE}",
    f"unload resnet50_v2 {NOWHERE}",
)
TABLE = {
    "a missing file": (2, MISSING_FILE),
    "a malformed file": (2, MALFORMED_FILE),
    "an unknown model": (2, UNKNOWN_MODEL),
    "an unknown name": (2, UNKNOWN_NAME),
    "a bad duration": (2, BAD_DURATION),
    "a bad address": (2, BAD_ADDRESS),
    "an output in a wrong place": (2, UNWRITABLE),
    "a port in use": (4, IN_USE),
    "no answer": (5, NO_ANSWER),
    "an output that exists": (7, OUTPUT_EXISTS),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name."""
    root = tmp_path_factory.mktemp("faults")
    (root / "folder").mkdir()
    (root / "file").write_text("kept")
    (root / "bad.toml").write_text("x = [1\n")
    (root / "unknown.toml").write_text("nonesuch = 1\n")
    plan = Path(PLAN).read_text(encoding="utf-8").replace("resnet50_v2", "nonesuch")
    (root / "unknown-model.toml").write_text(plan)
    (root / "traced").mkdir()
    (root / "traced" / "invocations_per_function_md.anon.d01.csv").write_text("kept")
    bad = root / "BAD"
    bad.mkdir()
    for name in ("clockwork_request_log.tsv", "clockwork_action_log.tsv", "client_log.tsv"):
        (bad / name).write_text("x\ty\n1\t2\n")
    (bad / "request_reasons.jsonl").write_text("nonsense\n")
    (bad / "manifest.json").write_text("{")
    made = CliRunner().invoke(
        app, ["simulate", "INFER5", *SWEEP.split(), "--out", str(root / "GOOD")]
    )
    assert made.exit_code == 0, made.output
    return root


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another socket listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("fault", "command"),
    [(fault, command) for fault, (_, commands) in TABLE.items() for command in commands],
)
def test_the_same_fault_has_the_same_exit_code(
    place: Path, taken: int, monkeypatch: pytest.MonkeyPatch, fault: str, command: str
) -> None:
    monkeypatch.chdir(place)
    if fault == "no answer":  # 5 s each: what is waited for is not the question
        whole = AsyncClient.open
        monkeypatch.setattr(AsyncClient, "open", lambda client, **_: whole(client, timeout_s=0.1))
    words = command.replace("PORT", str(taken)).split()
    if "CONTROLLER" in words:
        with FakeController() as controller:
            words[words.index("CONTROLLER")] = controller.address
            ended = CliRunner().invoke(app, words)
    else:
        ended = CliRunner().invoke(app, words)
    assert ended.exit_code == TABLE[fault][0], ended.output
    *_, last = ended.stderr.splitlines()
    assert last.startswith("slosched: error: ") and len(last) > 30
    assert (place / "file").read_text() == "kept"


def test_the_table_in_the_reference_has_every_code() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    section = text.partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    rows = [
        line.split(" | ")[0].strip("| ") for line in section.splitlines() if line.startswith("| ")
    ]
    stated = {int(code) for code in rows if code.isdigit()}
    raised = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, SloschedError)
    }
    assert stated == raised | {0, 8, 70} and rows[-1] == "128 + n"
    assert {code for code, _ in TABLE.values()} <= stated


# ----------------------------------------------------------------------------- a full disk, and Ctrl-C


@pytest.mark.processes
@pytest.mark.parametrize(
    "command",
    [
        "report GOOD --out new.html",
        "trace GOOD --out new.json",
        "plot fig7 GOOD --out new",
        "azure-trace --out new-trace",
        f"simulate INFER5 {SWEEP} --out new-run",
    ],
)
def test_without_room_for_the_output_it_is_1(place: Path, command: str) -> None:
    def no_room() -> None:  # as on a full disk, for every file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    ended = subprocess.run(
        [sys.executable, "-m", "slosched", *command.split()],
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        preexec_fn=no_room,
        # Python would leave halves of modules' bytecode behind, which every later import stumbles over.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ended.returncode == 1, (ended.stdout, ended.stderr)
    assert ended.stderr.splitlines()[-1].startswith("slosched: error: ")


@pytest.mark.processes
@pytest.mark.parametrize(
    "command",
    [
        f"client {NOWHERE} {SWEEP}",
        f"client {NOWHERE} infer resnet50_v2",
        f"models {NOWHERE}",
        f"status {NOWHERE}",
        f"unload resnet50_v2 {NOWHERE}",
    ],
)
def test_ctrl_c_while_nobody_answers_is_130_at_once(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        words = command.replace(NOWHERE, f"127.0.0.1:{listener.getsockname()[1]}").split()
        process = subprocess.Popen(
            [sys.executable, "-m", "slosched", *words],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        listener.accept()  # it is connecting, and waits for an answer
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "no controller answered" not in said and "Traceback" not in said
