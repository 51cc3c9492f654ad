"""`slosched exp` as a command: options, errors, reports, all experiments at once, and what its pages say."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer.main
from typer.testing import CliRunner

import made_experiment
from slosched.cli import exp
from slosched.cli.app import app
from slosched.errors import InvalidConfig
from slosched.faasm.frame_run import options_of
from slosched.faasm.frame_table import EXPERIMENTS
from slosched.faasm.names import REPLACED, VARIABLES
from slosched.telemetry.manifest import read_manifest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "faasm.md").read_text()


@pytest.fixture(autouse=True)
def _made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = dict(EXPERIMENTS)
    made_experiment.offer()
    registered = len(exp.app.registered_commands)
    exp._register(made_experiment.NAME, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOCKWORK_LOG_DIR", raising=False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    del exp.app.registered_commands[registered:]
    EXPERIMENTS.clear()
    EXPERIMENTS.update(before)


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["exp", *words], prog_name="slosched")


# ---------------------------------------------------------------------------------------- commands


def test_every_experiment_has_a_command_with_its_options() -> None:
    root: Any = typer.main.get_command(app)
    commands = root.commands["exp"].commands
    for name in EXPERIMENTS:
        assert name in commands, f"{name} is not there: its options cannot be imported"
        options = {option for param in commands[name].params for option in param.opts}
        assert {"--scale", "--out", "--resume", "--layout", "--json", "--seed"} <= options, name
        help_text = invoke(name, "--help").output
        assert EXPERIMENTS[name].summary.split()[0] in help_text
        config = options_of(name)
        assert config() == config()  # it can be made without options


def test_the_command_line_starts_without_what_experiments_need() -> None:
    program = "import sys, slosched.cli.app; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert not {"numpy", "numba", "torch", "sklearn", "distributed"} & set(done.stdout.split())


@pytest.mark.parametrize("command", re.findall(r"^slosched exp .*$", PAGE, re.MULTILINE))
def test_every_command_of_the_page_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(BaseException):
        pass

    def reached(*args: object, **kwargs: object) -> NoReturn:
        raise Reached

    # In this order: the second imports what the first replaces.
    monkeypatch.setattr("slosched.faasm.frame_all.run_all", reached)
    monkeypatch.setattr("slosched.faasm.frame_run.run_experiment", reached)
    EXPERIMENTS.pop(made_experiment.NAME)
    with pytest.raises(Reached):
        result = invoke(*shlex.split(command)[2:])
        pytest.fail(f"{command}: {result.output}")


def test_the_page_has_every_experiment_and_command() -> None:
    root: Any = typer.main.get_command(app)
    for name in root.commands["exp"].commands:
        assert name == made_experiment.NAME or f"exp {name}" in PAGE or f"`{name}`" in PAGE, name
    for name, each in EXPERIMENTS.items():
        if name != made_experiment.NAME:
            assert re.search(rf"^\| `{name}` \|.*\| `{each.published}` \|$", PAGE, re.MULTILINE), (
                name
            )
    assert "wasm Faaslet" in PAGE and "process per instance" in PAGE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["made", "--scale", "huge"], "--scale must be quick or published, not 'huge'"),
        (["made", "--layout", "x"], "--layout must be slosched or faasm, not 'x'"),
        (["made", "--resume"], "--resume continues the run in a directory; give it as --out DIR"),
        (["made", "--resume", "--out", "new"], "new holds no run of made to resume"),
        (["made", "--out", "-"], "'-' is not taken as an output"),
        (["made", "--workers", "x"], "--workers must be whole numbers"),
        (["made", "--fault", "x"], "unknown fault 'x'"),
        (["mad"], "unknown experiment 'mad' (did you mean made?)"),
        (["report", "."], "does not hold a run of `slosched exp`"),
        (["report", "nowhere"], "does not hold a run of `slosched exp`"),
        (["pull", "x", "alice", "host"], "unknown experiment 'x'"),
        (["pull", "sgd", "a b", "host"], "user 'a b' is not a user's name"),
        (["all", "--only", "x"], "unknown experiment 'x'"),
        (["all", "--scale", "x"], "--scale must be quick or published"),
        (["sgd", "--data", "nofile"], "nofile is not a file"),
        (["matrices", "--systems", "x"], "unknown system 'x'"),
        (["matrices", "--workers", "1", "--systems", "near"], "near does not run with"),
    ],
)
def test_every_wrong_command_is_one_line_that_says_what_to_do(words: list[str], said: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert said in result.stderr and len(result.stderr.splitlines()) == 1
    assert not [*Path().iterdir()]


@pytest.mark.parametrize(
    ("words", "missing", "said"),
    [
        (["matrices", "--systems", "slots,dask"], "distributed", "slosched[dask]"),
        (["matrices", "--systems", "near"], "redis", "slosched[state]"),
        (["matrices", "--systems", "instances"], "redis-server", "apt install redis-server"),
        (["matrices", "--kernel", "torch"], "torch", "slosched[torch]"),
        (["sgd", "--engine", "dask"], "distributed", "slosched[dask]"),
        (["inference-latency", "--systems", "dask"], "distributed", "slosched[dask]"),
        (["inference-throughput", "--network", "timm"], "timm", "pip install timm"),
        (["inference-latency"], "torch", "slosched[torch]"),
        (["coldstart"], "torch", "slosched[torch]"),
    ],
)
def test_what_is_not_installed_is_said_before_a_run_begins(
    words: list[str], missing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(
        "slosched.faasm.installed.find_spec", lambda name: None if name == missing else name
    )
    monkeypatch.setattr(
        "slosched.faasm.matrices.systems.installed_program",
        lambda: "" if missing == "redis-server" else "/bin/true",
    )
    result = invoke(*words)
    assert result.exit_code not in (0, 1) and said in result.stderr, result.output
    assert not [*Path().iterdir()]


# ------------------------------------------------------------------------------------------- runs


def test_a_run_prints_its_tables_and_writes_its_page() -> None:
    result = invoke("made", "--workers", "1,3", "--out", "out", "--layout", "faasm")
    assert result.exit_code == 0, result.output
    assert "workers  value\n      1     10\n      3     30\n" in result.stdout
    assert result.stdout.endswith("written to out; report.md has all of it\n")
    assert REPLACED in result.stderr and "[2/2] workers=3" in result.stderr
    assert Path(
        "out/sgd_reuters_svm/SYSTEM_FAASM_WORKERS_3_INTERVAL_60000_logs/RUN_TIME.log"
    ).is_file()
    again = invoke("report", "out")
    assert again.exit_code == 0 and "workers  value" in again.stdout
    printed = json.loads(invoke("report", "out", "--json").stdout)
    assert printed == {
        "directory": "out",
        "replaced": REPLACED,
        "tables": {"values": [{"workers": 1, "value": 10}, {"workers": 3, "value": 30}]},
    }
    document = invoke("made", "--workers", "1", "--out", "other", "--json")
    assert json.loads(document.stdout)["tables"]["values"] == [{"workers": 1, "value": 10}]


def test_a_run_without_a_place_gets_one_by_its_time() -> None:
    assert invoke("made", "--workers", "1").exit_code == 0
    [folder] = Path("slosched-runs").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z-exp-made", folder.name)


def test_all_runs_each_in_its_folder_and_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*EXPERIMENTS]:
        if name != made_experiment.NAME:
            EXPERIMENTS.pop(name)
    EXPERIMENTS["twin"] = EXPERIMENTS[made_experiment.NAME]

    def report(options: Any, frame: Any) -> None:
        frame.table("made-claims", [{"claim": "2x", "found": 1}])

    monkeypatch.setattr(made_experiment, "report", report)
    result = invoke("all", "--out", "out", "N_WORKERS=1")
    assert result.exit_code == 0, result.output
    index = Path("out/index.md").read_text()
    assert "[made](made/report.md)" in index and "[twin](twin/report.md)" in index
    assert REPLACED in index and "| 2x | 1 |" in index
    assert read_manifest(Path("out/twin"))["complete"] is True

    def broken(options: Any, frame: Any) -> None:
        if frame.name == "twin":
            raise InvalidConfig("the twin is broken")

    monkeypatch.setattr(made_experiment, "run", broken)
    result = invoke("all", "--out", "out", "--resume", "N_WORKERS=1")
    assert result.exit_code == 1 and "twin: failed: the twin is broken" in result.stdout
    assert "made: 1 cells" in result.stdout
    again = Path("out/index.md").read_text()
    assert "failed: the twin is broken" in again
    assert "since it was continued" in again and "since it was" not in index
    assert (
        invoke("all", "--out", "fresh", "--resume", "--only", "made", "N_WORKERS=1").exit_code == 0
    )


@pytest.mark.processes
def test_a_tasks_exit_code_is_that_of_what_it_runs(tmp_path: Path) -> None:
    """The task in a process, as a shell sees it: sgd into a place that is a file."""
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "slosched",
        "exp",
        "experiments.sgd",
        "1",
        "60000",
        "--out",
        "file",
    ]
    env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2 and "file is not a directory" in done.stderr
