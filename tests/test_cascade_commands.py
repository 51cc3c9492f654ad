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
from typer.testing import CliRunner, Result

from made_cascade_run import mixed_run
from slosched.analysis import style
from slosched.cascade.compare import Cell, Comparison
from slosched.cascade.presets import Variant
from slosched.cascade_spec import CascadeOptions
from slosched.cli import cascade_artifact
from slosched.cli.app import app
from slosched.cli.cascade import _variants
from slosched.cli.cascade import app as cascade_app
from slosched.cli.cascade_options import cascade_options
from slosched.cli.sim_display import SimDisplay
from slosched.errors import InvalidConfig

SHORT = ("--trace", "fixed_4", "--workers", "4", "--duration", "8s")


def ran(*words: str) -> Result:
    return CliRunner().invoke(app, ["cascade", *words])


def done(*words: str) -> Result:
    result = ran(*words)
    assert result.exit_code == 0, result.output
    return result


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


def test_equal_arguments_give_equal_numbers(tmp_path: Path) -> None:
    words = ("run", "sdxs", *SHORT, "--policy", "diffserve", "--seed", "3", "--json")
    first, second = (
        json.loads(
            CliRunner().invoke(app, ["cascade", *words, "--out", str(tmp_path / name)]).stdout
        )
        for name in ("a", "b")
    )
    assert first["summary"] == second["summary"] and first["bound"] == second["bound"]
    assert first["run_dir"].endswith("a") and len(first["files"]) == 10


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
        (("run", "sdturbo", "--over-provision", "0.5"), "over_provision"),
        (("run", "sdturbo", "--plan-every", "soon"), "--plan-every"),
        (("run", "sdturbo", "--scores", "nowhere.txt"), "nowhere.txt"),
        (("compare", "sdturbo", "--policies", "cascade,cascade"), "named twice"),
        (("compare", "sdturbo", "--policies", "cascade:x=1"), "unknown option 'x'"),
        (("compare", "sdturbo", "--policies", "fifo"), "unknown policy of cascades"),
        (("controller", "-ap", "3", "-c", "sdturbo"), "-ap 3 (cost ILP) fails in the artifact too"),
        (("controller", "-ap", "9", "-c", "sdturbo"), "take 5 (DiffServe)"),
        (("controller", "-c", "sdturbo"), "-ap"),
        (("worker", "-c", "sdturbo"), "add --do_simulate"),
    ],
)
def test_errors_say_what_to_do(
    words: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ran(*words)
    assert result.exit_code == 2
    assert problem in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_options_lie_over_a_preset() -> None:
    base = CascadeOptions(over_provision=1.2)
    given = {"plan_every": "2s", "routing": "random", "drop_at": None, "queue_term": False}
    made = cascade_options(base, given)
    assert (made.plan_every_ns, made.routing, made.queue_term) == (2_000_000_000, "random", False)
    assert (made.over_provision, made.drop_at) == (1.2, 1.0)
    with pytest.raises(InvalidConfig):
        cascade_options(base, {"routing": "any"})


# ------------------------------------------------------------------------------------- compare


def test_a_comparison_is_resumed(tmp_path: Path) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light,diffserve", "--seeds", "2")
    out = ("--out", str(tmp_path))
    result = done(*words, *out)
    assert "FID (table)" in result.output and " +- " in result.output
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["cells_reused"] == 0 and document["seeds"] == [0, 1]
    light = document["policies"]["clipper-light"]
    assert light["estimates"]["fid"] == {"mean": 22.77, "half": 0.0}
    assert [cell["seed"] for cell in light["cells"]] == [0, 1]
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert table[0].startswith("| policy | violations | FID (table) | FID (pessimistic) |")
    assert len(table) == 4 + 1 + 3
    assert table[5] == "| clipper-light | violations | FID (table) | FID (pessimistic) |"
    assert table[7].startswith("| less diffserve | ")
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert "sdturbo_quality_violations.png" in names and len(names) == 4

    (tmp_path / "diffserve" / "seed=1" / "summary.json").unlink()
    again = done(*words, *out, "--json")
    resumed = json.loads(again.stdout)
    assert resumed["cells_reused"] == 3
    assert resumed["policies"] == document["policies"]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a short comparison's time."""
    monkeypatch.setattr("slosched.cascade.compare._draw", lambda *_: [])


@pytest.mark.usefixtures("no_figures")
def test_differences_are_of_the_same_seeds(tmp_path: Path) -> None:
    words = (
        "compare",
        "sdturbo",
        *SHORT,
        "--policies",
        "diffserve,cascade,clipper-light",
        "--seeds",
        "2",
    )
    result = done(*words, "--out", str(tmp_path))
    document = json.loads((tmp_path / "compare.json").read_text())
    cells = {name: each["cells"] for name, each in document["policies"].items()}
    differences = document["differences"]
    assert differences["of"] == "cascade"  # wherever it stands
    assert list(differences["less"]) == ["diffserve", "clipper-light"]
    for name, keys in differences["less"].items():
        for key, estimate in keys.items():
            one, two = (a[key] - b[key] for a, b in zip(cells["cascade"], cells[name], strict=True))
            assert estimate["mean"] == pytest.approx((one + two) / 2)
            # Student's t of one degree of freedom, times the error of the mean of two.
            assert estimate["half"] == pytest.approx(12.706 * abs(one - two) / 2)
    mean = differences["less"]["clipper-light"]["fid"]["mean"]
    [line] = [line for line in result.output.splitlines() if line.startswith("less clipper-light ")]
    assert f"{mean:+.2f} +- " in line


def test_one_seed_has_differences_without_intervals() -> None:
    variants = (Variant("a", "DIFFSERVE"), Variant("b", "PROTEUS"))
    cell = {"fid": None, "pessimistic_fid": None}
    summaries = {
        name: [{"summary": {**cell, "violation_ratio": ratio}}]
        for name, ratio in (("a", 0.25), ("b", 0.5))
    }
    comparison = Comparison("mine", variants, (0,), summaries, 0)
    assert comparison.subject == "a"  # the first, where ours is not there
    assert comparison.difference_rows()[1] == [["less b", "-0.2500", "-", "-"]]


def test_a_preset_takes_the_options_that_are_given() -> None:
    given = {"drop_at": 3.0, "routing": None}
    variants = _variants(None, "sanity", CascadeOptions(), given)
    assert {each.options.drop_at for each in variants} == {3.0}
    assert [each.options.routing for each in variants] == ["random"] * 4 + ["least-loaded"]


# --------------------------------------------------------------------------------------- Ctrl-C


def press_ctrl_c(*_: object, **__: object) -> None:
    """What stands for a drawing function: SIGINT comes while it runs. By itself it would go on drawing."""
    signal.raise_signal(signal.SIGINT)


def interrupted(result: Result) -> None:
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "slosched: interrupted"
    assert "Traceback" not in result.output and "stopping" not in result.output


def drafts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".slosched-")]


@pytest.fixture
def ctrl_c_while_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second figure is being drawn when Ctrl-C is pressed: the first one is there."""
    save = style.save
    saved: list[str] = []

    def save_one(figure: Any, out: Path, stem: str, **more: Any) -> list[Path]:
        if saved:
            press_ctrl_c()
        saved.append(stem)
        return save(figure, out, stem, **more)

    monkeypatch.setattr(style, "save", save_one)


@pytest.mark.usefixtures("ctrl_c_while_drawing")
def test_ctrl_c_ends_a_run_at_once_while_figures_are_drawn(tmp_path: Path) -> None:
    words = ("run", "sdturbo", *SHORT, "--policy", "clipper-light", "--out", str(tmp_path))
    interrupted(ran(*words))
    assert not (tmp_path / "summary.json").exists()  # it says that all files are there
    assert [path.name for path in sorted((tmp_path / "figures").iterdir())] == [
        "sdturbo_confidence_threshold.pdf",
        "sdturbo_confidence_threshold.png",
    ]
    assert not drafts(tmp_path)


@pytest.mark.usefixtures("ctrl_c_while_drawing")
def test_ctrl_c_ends_a_comparison_at_once_while_figures_are_drawn(tmp_path: Path) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1")
    interrupted(ran(*words, "--out", str(tmp_path)))
    assert (tmp_path / "compare.json").is_file() and not drafts(tmp_path)
    assert len(list((tmp_path / "figures").iterdir())) == 2
    json.loads((tmp_path / "compare.json").read_text())


@pytest.mark.usefixtures("ctrl_c_while_drawing")
def test_ctrl_c_ends_a_plot_at_once(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run")
    interrupted(CliRunner().invoke(app, ["plot", "cascade", "--cascade", "sdturbo", str(run)]))
    assert len(list((run / "figures").iterdir())) == 2 and not drafts(tmp_path)


def test_ctrl_c_between_the_files_of_two_runs_ends_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def finish_one(cell: Cell, *rest: Any) -> dict[str, Any]:
        made.append(cell.name)
        press_ctrl_c()  # which is noted, and the files of this run are finished
        return {}

    monkeypatch.setattr("slosched.cascade.compare._finished", finish_one)
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "2")
    result = ran(*words, "--out", str(tmp_path))
    assert result.exit_code == 130 and "Traceback" not in result.output
    assert made == ["clipper-light seed=0"] and not (tmp_path / "compare.json").exists()


def test_ctrl_c_in_a_run_says_where_its_parts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SimDisplay, "__call__", lambda self, progress: signal.raise_signal(signal.SIGTERM)
    )
    monkeypatch.setattr("slosched.sim.run._PROGRESS_EVERY_NS", 0)
    result = ran("run", "sdturbo", *SHORT, "--out", str(tmp_path))
    assert result.exit_code == 128 + signal.SIGTERM
    assert f"partial results are in {tmp_path}" in result.output
    assert not (tmp_path / "figures").exists()


# ------------------------------------------------------------------------------ folders of others


@pytest.mark.usefixtures("no_figures")
def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1")
    done(*words, "--out", str(tmp_path))
    result = ran(*words, "--drop-at", "3", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "holds a run of other settings (drop_at is 1.0, not 3.0)" in result.output


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_another_source_is_made_again_unless_its_settings_were_others(
    tmp_path: Path,
) -> None:
    words = ("compare", "sdturbo", *SHORT, "--policies", "clipper-light", "--seeds", "1", "--json")
    out = ("--out", str(tmp_path))
    done(*words, *out)
    summary = tmp_path / "clipper-light" / "seed=0" / "summary.json"
    document = json.loads(summary.read_text())
    older = {**document, "source": "another", "spec_sha256": "another"}
    del older["options"]["queue_term"]  # an option that its version did not have
    summary.write_text(json.dumps(older))
    again = json.loads(CliRunner().invoke(app, ["cascade", *words, *out]).stdout)
    assert again["cells_reused"] == 0
    summary.write_text(json.dumps({**document, "spec_sha256": "another"}))
    assert "(another content of a file that it read)" in ran(*words, *out).output


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
