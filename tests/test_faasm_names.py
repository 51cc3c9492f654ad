"""The original's tasks, switches and variables: each line of the table against what the command line does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer.main
from typer.testing import CliRunner

import made_experiment
from slosched.cli import exp
from slosched.cli.app import app
from slosched.cli.exp_names import (
    TASK,
    names_document,
    names_markdown,
    switch_rows,
    understood,
    variable_text,
)
from slosched.command_line import command_rows
from slosched.errors import InvalidConfig, MissingPackage, UnknownName
from slosched.faasm.frame_run import Order, options_of
from slosched.faasm.frame_table import EXPERIMENTS
from slosched.faasm.names import TASKS, VARIABLES, Task

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "faasm.md").read_text()

_SGD = "sgd --workers 10 --interval 60000 --size full --modes shared"
_MATRICES = "matrices --scale published --workers 10 --systems slots"
_INFERENCE = "inference-throughput --scale published --systems slosched --cold 500"
#: Every `inv` line of the original's page of experiments (docs/experiments.md, 2020), with values for its
#: variables, and the words behind `slosched exp` that it runs; none where it has no effect.
LINES = {
    "libs.native": "",
    "matrix-data.generate-all": "",
    "data.matrix-upload-s3": "",
    "data.matrix-download-s3": "",
    "data.reuters-state": "",
    "data.reuters-state --micro": "",
    "knative.build-native sgd reuters_svm": "",
    "upload sgd reuters_svm": "",
    "knative.deploy-native sgd reuters_svm --replicas=10": "",
    "knative.deploy --replicas=10": "",
    "experiments.sgd --native 10 60000": f"{_SGD} --modes copies",
    "experiments.sgd --bm 10 60000": _SGD,
    "experiments.sgd 10 60000": _SGD,
    "knative.delete-native sgd reuters_svm": "",
    "knative.delete-worker --hard": "",
    "upload python mat_mul --py": "",
    "knative.deploy-native-python --replicas=10": "",
    "experiments.matrix-multi 10 --native": f"{_MATRICES} --systems instances",
    "experiments.matrix-multi 10": _MATRICES,
    "knative.build-native tf image": "",
    "upload tf image": "",
    "tf.upload tf.state": "",
    "knative.deploy --replicas=1": "",
    "knative.deploy-native tf image --replicas=1": "",
    "experiments.tf-lat": "inference-latency --scale published --systems slosched,container "
    "--cold 5,50,500 --rungs L3",
    "knative.deploy-native tf image --replicas=30": "",
    "knative.deploy --replicas=18": "",
    "experiments.tf-tpt --native": f"{_INFERENCE} --systems container --cold 5,10,20,40,80",
    "experiments.tf-tpt": _INFERENCE,
    "experiments.sgd-pull-results alice cluster02": "pull sgd alice cluster02",
    "experiments.matrix-pull-results alice cluster02": "pull matrices alice cluster02",
    "experiments.tf-lat-pull-results alice cluster02": "pull inference-latency alice cluster02",
    "experiments.tf-tpt-pull-results alice cluster02": "pull inference-throughput alice cluster02",
}
#: The variables that the page sets for all runs of TensorFlow, and for all others.
SET_THERE = (
    "COLD_START_DELAY_MS",
    "TF_CODEGEN",
    "SGD_CODEGEN",
    "PYTHON_CODEGEN",
    "PYTHON_PRELOAD",
    "N_WORKERS",
)


class _Reached(BaseException):
    """Where the work would begin; passes every handler."""


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reached(*args: Any, **kwargs: Any) -> NoReturn:
        raise _Reached((args, kwargs))

    monkeypatch.setattr("slosched.faasm.frame_run.run_experiment", reached)
    monkeypatch.setattr("slosched.faasm.pull.pull_results", reached)
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _says_its_options(order: Order, **_: Any) -> NoReturn:
    raise InvalidConfig(str(order.options))


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["exp", *words], prog_name="slosched")


def values_for(task: Task) -> list[str]:
    numbers = {"MAT_SIZE": "64", "MATRIX_SIZE": "64", "WORKERS": "2", "N_WORKERS": "2"}
    numbers |= {"INTERVAL": "60000", "N_SPLITS": "1", "N": "5"}
    return [numbers.get(name, "x") for name in task.arguments]


def skip_without(task: Task) -> None:
    """Skip where the experiment that the task runs is not installed; test_exp_command.py asks for all."""
    root: Any = typer.main.get_command(app)
    if task.runs and task.runs[1] not in root.commands["exp"].commands:
        pytest.skip(f"{task.runs[1]} is not in this installation")


def with_value(switch: str) -> list[str]:
    return [switch.rstrip("="), "3"] if switch.endswith("=") else [switch]


# ------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_the_originals_page_runs_or_says_why_not(line: str) -> None:
    wanted = LINES[line]
    words = shlex.split(line)
    found = understood(words)
    assert [" ".join(each.runs[1:]) for each in found if each.runs] == ([wanted] if wanted else [])
    names = [word for word in words if word in TASKS and "." in word] or words[:1]
    assert all(TASKS[name].documented for name in names)
    if wanted:
        with pytest.raises(_Reached):
            pytest.fail(invoke(*words).output)
        return
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    for name in names:
        assert f"{name}: no effect: {TASKS[name].why}" in result.output


def test_the_table_marks_what_the_originals_page_has() -> None:
    there = {word for line in LINES for word in line.split() if word in TASKS}
    assert {name for name, task in TASKS.items() if task.documented} == there


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_the_table_does_what_its_row_says(name: str) -> None:
    task = TASKS[name]
    assert bool(task.runs) != bool(task.why)
    skip_without(task)
    words = [name, *values_for(task)]
    if task.runs:
        with pytest.raises(_Reached):
            pytest.fail(invoke(*words).output)
    else:
        result = invoke(*words)
        assert result.exit_code == 0 and result.output.startswith(f"{name}: no effect: ")
    assert here_of("tasks")[f"`{task.usage}`"] == task.ours


@pytest.mark.parametrize(
    ("name", "switch"), [(task.name, switch) for task in TASKS.values() for switch in task.switches]
)
def test_every_switch_of_the_table_does_what_its_row_says(name: str, switch: str) -> None:
    task, what = TASKS[name], TASKS[name].switches[switch]
    [found] = understood([name, *with_value(switch), *values_for(task)])
    if isinstance(what, str):
        assert f"{switch.rstrip('=')}: no effect: {what}" in found.notes
    else:
        assert task.runs and [*found.runs[-len(what) :]] == [
            each.replace("{}", "3") for each in what
        ]
        skip_without(task)
        with pytest.raises(_Reached):
            pytest.fail(invoke(name, *with_value(switch), *values_for(task)).output)
    if switch.endswith("="):
        assert understood([name, f"{switch}3", *values_for(task)]) == [found]


def test_a_switch_that_is_not_native_is_overridden_by_the_one_that_is() -> None:
    with pytest.raises(_Reached) as reached:
        pytest.fail(invoke("experiments.sgd", "10", "60000", "--native", "--micro").output)
    [order], _ = reached.value.args[0]
    assert order.experiment == "sgd" and order.options.modes == ("copies",)
    assert order.options.size == ("micro",) and order.options.workers == (10,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["experiments.sgd", "10"],
            "experiments.sgd: INTERVAL is missing; it is written experiments.sgd WORKERS",
        ),
        (["experiments.sgd", "1", "2", "3"], "experiments.sgd: '3' is one argument too many"),
        (
            ["experiments.sgd", "1", "2", "--nativ"],
            "unknown switch of experiments.sgd '--nativ' (did you mean --native?)",
        ),
        (
            ["experiments.sg", "1", "2"],
            "unknown task 'experiments.sg'; known: experiments.sgd, ",
        ),
        (["knative.deploy", "--replicas"], "knative.deploy: --replicas takes a value"),
        (["experiments.tf-lat", "--out"], "experiments.tf-lat: --out takes a value"),
        (["experiments.sgd", "x", "60000"], "--workers must be whole numbers"),
        ([TASK], "missing argument"),
    ],
)
def test_a_wrong_task_is_one_line_that_says_what_to_do(words: list[str], said: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.splitlines()[-1].startswith("slosched: error: ")


def test_our_options_may_stand_behind_a_task() -> None:
    with pytest.raises(_Reached) as reached:
        pytest.fail(
            invoke("experiments.sgd_multi", "--scale", "quick", "--out=here", "--resume").output
        )
    [order], _ = reached.value.args[0]
    assert (order.scale, str(order.out), order.resume) == ("quick", "here", True)


def test_what_a_reason_names_is_a_command() -> None:
    root: Any = typer.main.get_command(app)
    reasons = [task.why for task in TASKS.values()] + [
        variable.why for variable in VARIABLES.values()
    ]
    reasons += [
        what for task in TASKS.values() for what in task.switches.values() if isinstance(what, str)
    ]
    named = {
        match
        for reason in reasons
        for match in re.findall(r"slosched ([a-z]+)(?: ([a-z-]+))?", reason)
    }
    assert len(named) > 5
    for command, inner in named:
        assert command in root.commands, command
        commands = getattr(root.commands[command], "commands", None)
        assert commands is None or inner in {*commands, *EXPERIMENTS}, f"{command} {inner}"


# -------------------------------------------------------------------------------------- variables


@pytest.fixture
def made() -> Iterator[None]:
    made_experiment.offer()
    registered = len(exp.app.registered_commands)
    exp._register(made_experiment.NAME, "")
    yield
    del exp.app.registered_commands[registered:]
    EXPERIMENTS.pop(made_experiment.NAME)


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.usefixtures("made")
def test_every_variable_sets_an_option_or_says_why_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = VARIABLES[name]
    fields = {row.field: row for row in command_rows(made_experiment.Options)}
    field = next((each for each in variable.fields if each in fields), None)
    for words, environment in (([f"{name}=7"], {}), ([], {name: "7"})):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(_Reached) as reached:
            pytest.fail(invoke("made", *words).output)
        [order], _ = reached.value.args[0]
        usual = made_experiment.Options()
        changed = {key for key in fields if getattr(order.options, key) != getattr(usual, key)}
        assert changed == ({field} if field else set())
    assert here_of("variables")[f"`{name}`"] == variable_text(name)


@pytest.mark.usefixtures("made")
def test_variables_say_what_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_WORKERS", "3")
    monkeypatch.setenv("TF_CODEGEN", "on")
    monkeypatch.setenv("HOST", "here")  # other programs use this name
    monkeypatch.setattr("slosched.faasm.frame_run.run_experiment", _says_its_options)
    result = invoke("made", "COLD_START_DELAY_MS=800")
    assert "slosched: N_WORKERS=3 is taken as --workers 3" in result.stderr
    assert (
        "slosched: TF_CODEGEN=on: no effect: Python functions are not compiled ahead of time"
        in result.stderr
    )
    assert "HOST" not in result.stderr and "workers=(3,), cold_delay_ns=800000000" in result.stderr
    result = invoke("made", "--workers", "1,2")
    assert "slosched: N_WORKERS=3: no effect: --workers is given" in result.stderr
    assert "workers=(1, 2)" in result.stderr
    for setting in ("N_WORKER=3", "N_WORKERS"):
        result = invoke("made", setting)
        assert (
            result.exit_code == 2
            and "is not a variable of the original as NAME=VALUE" in result.stderr
        )
    result = invoke("made", "N_WORKERS=x")
    assert result.exit_code == 2 and "--workers must be whole numbers" in result.stderr
    result = invoke("inference-latency", "COLD_START_DELAY_MS=0", "BENCH_DELAY_MS=0")
    assert "delay_ns=0" in result.stderr and "think_ns=0" in result.stderr
    assert "--duration: '0' is too short" in invoke("inference-latency", "--duration", "0").stderr


def test_the_variables_of_the_originals_page_are_there() -> None:
    assert set(SET_THERE) <= set(VARIABLES)


def test_a_variable_that_sets_an_option_finds_one_somewhere() -> None:
    fields = set()
    for name in EXPERIMENTS:
        try:
            fields |= {row.field for row in command_rows(options_of(name))}
        except MissingPackage:
            pytest.skip(f"{name} is not there")
    for name, variable in VARIABLES.items():
        assert not variable.fields or fields & set(variable.fields), name


# ----------------------------------------------------------------------------------- page and help


def here_of(first_heading: str) -> dict[str, str]:
    """Each name of the page's table with that heading, and what it is here; several names share a row."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    found: dict[str, str] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        names, here = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        found |= dict.fromkeys(names.split(", "), here)
    return found


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    for table in names_markdown().split("\n\n"):
        assert table in PAGE
    assert len(here_of("tasks")) == len(TASKS) and len(here_of("variables")) == len(VARIABLES)
    switches = here_of("switches")
    for task, switch, meaning in switch_rows():
        if meaning.startswith("no effect") and meaning != TASKS[task].ours:
            assert meaning == switches.get(f"`{switch}`", switches.get(f"`{task} {switch}`"))


@pytest.mark.parametrize("words", [("names",), (TASK, "--help")], ids=["names", "help"])
def test_names_and_the_help_have_every_row(words: tuple[str, ...]) -> None:
    text = invoke(*words).output
    for task in TASKS.values():
        assert f"\n{task.usage}\n    {task.ours}\n" in text
    for name in VARIABLES:
        assert f"\n{name}\n    {variable_text(name)}" in text
    for _, switch, meaning in switch_rows():
        if meaning.startswith("no effect"):
            assert f"    {switch}: {meaning}\n" in text


def test_names_as_json_have_every_row() -> None:
    document = names_document()
    assert len(document["tasks"]) == len(TASKS) and len(document["variables"]) == len(VARIABLES)  # type: ignore[arg-type]


def test_words_that_are_not_read_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="one argument too many"):
        understood(["tf.upload", "x"])
    with pytest.raises(UnknownName, match="unknown task 'upload-all'"):
        understood(["upload-all"])
