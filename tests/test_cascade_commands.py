"""`slosched cascade` and `slosched plot cascade`: runs, comparisons, the artifact's flags, errors."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cascade_cli import SHORT, done, ran
from made_cascade_run import mixed_run
from slosched.cascade_spec import CascadeOptions
from slosched.cli import cascade_artifact
from slosched.cli.app import app
from slosched.cli.cascade import app as cascade_app
from slosched.cli.cascade_options import cascade_options
from slosched.codes import Code
from slosched.errors import (
    InvalidConfig,
    InvalidRequest,
    MissingPackage,
    PeerUnreachable,
    SloschedError,
)

# ----------------------------------------------------------------------------------------- run


def test_a_run_in_virtual_time_leaves_everything(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = done("run", "sdturbo", *SHORT, "--policy", "clipper-light", "--out", str(out))
    assert "FID (table)" in result.output and "FID (pessimistic)" in result.output
    assert "clairvoyant fluid bound" in result.output
    assert "no image was made or scored" in result.output
    document = json.loads((out / "summary.json").read_text())
    assert document["policy"] == "CLIPPER-LIGHT" and document["kind"] == "simulated"
    summary = document["summary"]
    assert summary["light"] == summary["answered"] > 10 and summary["fid"] == 22.77
    assert {path.name for path in (out / "logs").iterdir()} == {
        "slo_timeouts_per_second.csv",
        "thres_per_second.csv",
        "query_num_per_second.csv",
    }
    assert (out / "figures" / "sdturbo_fid.png").is_file()


def test_equal_arguments_give_equal_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_matplotlib(*_: object, **__: object) -> None:
        raise MissingPackage("it is not there")

    words = ("run", "sdxs", *SHORT, "--policy", "diffserve", "--seed", "3", "--json")
    first = done(*words, "--out", str(tmp_path / "a"))
    monkeypatch.setattr("slosched.cascade.run.draw_runs", no_matplotlib)
    second = done(*words, "--out", str(tmp_path / "b"))
    assert second.stderr.splitlines()[-1] == "slosched: no figures: it is not there"
    one, other = json.loads(first.stdout), json.loads(second.stdout)
    assert one["summary"] == other["summary"] and one["bound"] == other["bound"]
    assert one["run_dir"].endswith("a") and len(one["files"]) == 10 and len(other["files"]) == 4


def test_published_graphs_by_option(tmp_path: Path) -> None:
    words = ("--trace", "fixed_4", "--workers", "4", "--duration", "30s")
    result = done(
        "run", "sdturbo", *words, "--policy", "clipper-light", "--published", "--out", str(tmp_path)
    )
    assert "not as measured" in result.output and "Mean FID: " in result.output


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("run", "sdturb"), "unknown cascade 'sdturb' (did you mean sdturbo?)"),
        (("run", "sdturbo", "--policy", "diffserv"), "did you mean diffserve"),
        (("run", "sdturbo", "--policy", "INFER5"), "unknown policy of cascades"),
        (("run", "sdturbo", "--preset", "insane"), "unknown preset"),
        (("run", "sdturbo", "--trace", "4by32"), "unknown trace"),
        (("run", "sdturbo", "--over-provision", "0.5"), "--over-provision must be within 1..10"),
        (("run", "sdturbo", "--fixed-threshold", "-0.5"), "--fixed-threshold must be within 0..1"),
        (("run", "sdturbo", "--fixed-threshold", "nan"), "--fixed-threshold must be within 0..1"),
        (("run", "sdturbo", "--live", "--faults", "FAULTS"), "leave --live out"),
        (("run", "sdturbo", "--trace", "nowhere.txt"), "cannot read the trace nowhere.txt"),
        (
            ("run", "sdturbo", "--duration", "1ms"),
            "no request within 1ms; give a longer --duration",
        ),
        (("compare", "sdturbo", "--duration", "1ms"), "no request within 1ms"),
        (("compare", "sdturbo", "--policies", ""), "with commas between"),
        (("run", "sdturbo", "--plan-every", "soon"), "--plan-every"),
        (("run", "sdturbo", "--scores", "nowhere.txt"), "nowhere.txt"),
        (("compare", "sdturbo", "--policies", "cascade,cascade"), "named twice"),
        (("compare", "sdturbo", "--policies", "cascade:x=1"), "unknown option 'x'"),
        (("compare", "sdturbo", "--policies", "fifo"), "unknown policy of cascades 'fifo'"),
        (("controller", "-ap", "3", "-c", "sdturbo"), "-ap 3 (cost ILP) fails in the artifact too"),
        (("controller", "-ap", "9", "-c", "sdturbo"), "take 5 (DiffServe)"),
        (("controller", "-c", "sdturbo"), "-ap"),
        (("worker", "-c", "sdturbo"), "add --do_simulate"),
    ],
)
def test_errors_say_what_to_do(
    words: tuple[str, ...],
    problem: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = tmp_path_factory.mktemp("faults") / "faults.toml"
    faults.write_text("")
    monkeypatch.chdir(tmp_path)
    result = ran(*(str(faults) if word == "FAULTS" else word for word in words))
    assert result.exit_code == 2
    assert problem in result.stderr
    assert not result.stdout and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_options_lie_over_a_preset() -> None:
    base = CascadeOptions(over_provision=1.2)
    given = {"plan_every": "2s", "routing": "random", "drop_at": None, "queue_term": False}
    made = cascade_options(base, given)
    assert (made.plan_every_ns, made.routing, made.queue_term) == (2_000_000_000, "random", False)
    assert (made.over_provision, made.drop_at) == (1.2, 1.0)
    with pytest.raises(InvalidConfig):
        cascade_options(base, {"routing": "any"})


# ---------------------------------------------------------------------------- the artifact's commands


def flags(name: str) -> dict[str, set[str]]:
    group: Any = typer.main.get_command(cascade_app)
    return {param.name: set(param.opts) for param in group.commands[name].params}


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("controller", {"--port -p", "--allocation_policy -ap", "--cascade -c"}),
        (
            "load-balancer",
            {"--port -p", "--controller_ip -cip", "--controller_port -cport", "--cascade -c"},
        ),
        (
            "worker",
            {
                "--ip_address -ip",
                "--port -p",
                "--controller_ip -cip",
                "--controller_port -cport",
                "--cascade -c",
                "--is_sink",
                "--do_simulate",
            },
        ),
        (
            "client",
            {
                "--ip_address -ip",
                "--port -p",
                "--lb_ip -lbip",
                "--lb_port -lbport",
                "--trace_file -trace",
            },
        ),
    ],
)
def test_the_flags_are_the_artifacts(command: str, wanted: set[str]) -> None:
    known = {frozenset(opts) for opts in flags(command).values()}
    assert {frozenset(each.split()) for each in wanted} <= known


def test_the_ports_and_policies_are_the_artifacts() -> None:
    ports = {
        name: next(p for p in command.params if p.name == "port").default
        for name, command in typer.main.get_command(cascade_app).commands.items()  # type: ignore[attr-defined]
        if any(p.name == "port" for p in command.params)
    }
    assert ports == {
        "controller": 50050,
        "load-balancer": 50048,
        "worker": 50051,
        "sink": 50100,
        "client": 51050,
    }
    assert [cascade_artifact.policy_of(ap) for ap in ("5", "6", "7", "8")] == [
        "DIFFSERVE",
        "CLIPPER-HEAVY",
        "CLIPPER-LIGHT",
        "DIFFSERVE-STATIC",
    ]
    options = cascade_artifact.OPTIONS
    assert (options.over_provision, options.drop_at, options.routing) == (1.2, 1.5, "random")


@pytest.mark.parametrize(
    ("error", "hinted"),
    [
        (InvalidRequest("no worker knows it", code=Code.UNKNOWN_MODEL), True),
        (InvalidRequest("too long", code=Code.INVALID_REQUEST), False),
        (PeerUnreachable("no controller answered"), False),
    ],
)
def test_the_client_hints_at_another_cascade_only_where_its_own_is_unknown(
    error: SloschedError, hinted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr("slosched.cli.run.run_live", fail)
    result = ran("client", "--logs", str(tmp_path))
    assert result.exit_code == error.exit_code
    assert result.stderr == f"slosched: error: {error}\n"
    assert ("name that one with --cascade\n" in result.stdout) == hinted
    (log,) = tmp_path.iterdir()
    text = log.read_text()
    assert f"failed: {error}\n" in text and "prompts to sdturbo" in text and " -c" not in text


def test_the_client_reads_its_words_before_it_makes_a_log(tmp_path: Path) -> None:
    for words in (("--duration", "-1"), ("-cip", "a b"), ("-trace", "nowhere.txt")):
        result = ran("client", *words, "--logs", str(tmp_path / "logs"))
        assert result.exit_code == 2 and not result.stdout
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- plot


def test_plot_cascade_draws_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mixed_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["plot", "cascade", "--cascade", "sdturbo", str(run)])
    assert result.exit_code == 0, result.output
    assert "average SLO violation ratio 0.3750" in result.output
    assert (run / "figures" / "sdturbo_confidence_threshold.png").is_file()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plot", "cascade"])
    assert result.exit_code == 2 and "name a RUN_DIR" in result.output
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["plot", "cascade", "file"])
    assert result.exit_code == 2 and "file is not a directory" in result.output
    mixed_run(tmp_path / "logs" / "run_5.5")
    result = CliRunner().invoke(app, ["plot", "cascade", "--json"])
    assert json.loads(result.stdout)["runs"]["run_5.5"]["violations"] == 3


# ------------------------------------------------------------------------------------ processes


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("load-balancer", "-cip", "localhost", "-c", "sdturbo"), "load balancer: not needed"),
        (("sink",), "sink: not needed"),
        (("worker", "--is_sink", "-p", "50100", "-c", "sdturbo"), "sink: not needed"),
    ],
)
def test_roles_that_are_not_needed_stay_until_they_are_ended(
    words: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "slosched", "cascade", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert line in process.stdout.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(20)
    (log,) = (tmp_path / "logs").iterdir()
    assert line in log.read_text() and log.name.startswith(("load_balancer_", "worker_50100"))


@pytest.mark.processes
def test_a_live_run_leaves_the_same_files(tmp_path: Path) -> None:
    words = ("run", "sdturbo", *SHORT, "--policy", "diffserve", "--live", "--seed", "1")
    out = tmp_path / "live"
    result = done(*words, "--drop-at", "0", "--out", str(out))
    assert "4 GPUs joined" in result.output and "FID (pessimistic)" in result.output
    document = json.loads((out / "summary.json").read_text())
    assert document["kind"] == "live" and document["summary"]["requests"] > 10
    assert (out / "stages.tsv").is_file() and (out / "client_log.tsv").is_file()
    assert (out / "logs" / "slo_timeouts_per_second.csv").is_file()
    assert {path.name for path in (out / "logs").glob("*.log")} == {
        "worker.log",
        "controller.log",
        "client.log",
    }


@pytest.mark.processes
def test_the_artifacts_steps(tmp_path: Path) -> None:
    """A controller, a worker and a client by the artifact's flags: the CSV files are there in the end."""
    command = [sys.executable, "-m", "slosched", "cascade"]
    port, worker_port = (str(each) for each in free_ports(2))
    files = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([*command, *words], **files)  # type: ignore[call-overload]
        for words in (
            ("controller", "-p", port, "-ap", "7", "-c", "sdturbo"),
            ("worker", "-cport", port, "-p", worker_port, "-c", "sdturbo", "--do_simulate"),
        )
    ]
    try:
        client = ("client", "-cport", port, "-trace", "fixed_4", "--duration", "4s")
        replayed = subprocess.run(
            [*command, *client], cwd=tmp_path, capture_output=True, text=True, timeout=90
        )
        assert replayed.returncode == 0, replayed.stderr
        assert replayed.stdout.endswith("Trace ended\n")
        for process in started:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        for process in started:
            process.kill()
            process.wait(20)
    logs = tmp_path / "logs"
    served = (logs / "slo_timeouts_per_second.csv").read_bytes()
    assert served.startswith(b"succeed,timeout,drop,total\r\n")
    assert (logs / "thres_per_second.csv").is_file() and (
        logs / "query_num_per_second.csv"
    ).is_file()
    assert (logs / f"worker_{worker_port}.log").is_file()
    assert "emulates sd-turbo" in (logs / f"model_{worker_port}.log").read_text()


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
