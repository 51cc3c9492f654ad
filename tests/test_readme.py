"""What README.md and the other documents say: commands, programs, tables, links."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer.main
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.codes import Code
from slosched.config_file import load_worker_config
from slosched.telemetry import action_log, client_log, request_log

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
#: Where the commands stand that a reader copies. The pages that are run as a whole have tests of their own.
PAGES = [
    REFERENCE,
    *((ROOT / "docs" / f"{name}.md").read_text() for name in ("experiment", "functions", "faasm")),
]
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
DOCUMENTS += [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
#: These, and the pages with figures and results.
LINKED = [
    *DOCUMENTS,
    *(
        page
        for folder in ("analysis", "benchmarks")
        for page in sorted((ROOT / folder).rglob("*.md"))
    ),
]

_FOLDERS = ("clients", "daemon", "workloads", "analysis", "benchmarks")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every line of a code block, fenced or indented, that is a slosched command."""
    fenced = [line for block in blocks(text, "sh") for line in block.splitlines()]
    indented = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [c for c in (*fenced, *indented) if c.startswith("slosched ") and "──" not in c]


README_COMMANDS = commands(README)
PAGE_COMMANDS = [command for page in PAGES for command in commands(page)]
FOLDER_COMMANDS = [
    # The comment behind a command, and the usage form's "...", are for the reader.
    command.partition("  #")[0].replace("...", "").strip()
    for folder in _FOLDERS
    for command in commands((ROOT / folder / "README.md").read_text())
]


class _Reached(BaseException):
    """The command line was understood: this is where the work would begin. Passes every handler."""


def _reached(*args: object, **kwargs: object) -> NoReturn:
    raise _Reached


@pytest.mark.parametrize("command", [*README_COMMANDS, *PAGE_COMMANDS, *FOLDER_COMMANDS])
def test_every_command_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # It imports `run_many` by name, and must not find the one that stands there meanwhile.
    importlib.import_module("slosched.experiment.simulated")
    for target in (
        "slosched.faasm.frame_all.run_all",
        "slosched.faasm.frame_run.run_experiment",
        "slosched.daemon.worker.run_worker",
        "slosched.daemon.supervisor.run_workers",
        "slosched.daemon.controller.run_controller",
        "slosched.cli.run.run_live",
        "slosched.sim.jobs.run_many",  # before `simulate`, which it imports by name
        "slosched.sim.run.simulate",
        "slosched.sim.plan.plan",
        "slosched.bound.bounds.bound_cell",
        "slosched.clients.one_shot.infer_once",
        "slosched.cli.ask._ask",
        "slosched.cli.functions._answer",
        "slosched.cli.functions._list_served",
        "slosched.functions.registry.find",
        "slosched.analysis.fig7.plot_fig7",
        "slosched.analysis.trace.write_trace",
        "slosched.daemon.profiler.profile_model",
        "slosched.cli.demo._run_phases",
        "slosched.experiment.hosts.load_hosts",
        "slosched.cli.experiment._run_live",
        "slosched.experiment.simulated.simulate_parts",
    ):
        monkeypatch.setattr(target, _reached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker.toml").write_text(blocks(REFERENCE, "toml")[0])
    (tmp_path / "models").mkdir()
    for folder in _FOLDERS:
        (tmp_path / folder).symlink_to(ROOT / folder)
    words = shlex.split(command)[1:]
    if words[:2] == ["plot", "fig7"] or words[0] == "trace":
        for word in words[1:]:
            if not word.startswith("-") and word != "fig7":
                (tmp_path / word).mkdir()
    with pytest.raises(_Reached):
        outcome = CliRunner().invoke(app, words, prog_name="slosched")
        pytest.fail(f"{command!r} ended with {outcome.exit_code}: {outcome.output}")


def test_the_readme_shows_the_seeds_commands() -> None:
    assert len(README_COMMANDS) >= 9
    workers = ",".join(f"cluster{i:02}:12345" for i in range(3, 9))
    assert f"slosched controller INFER5 {workers} 0 6 5000000" in README_COMMANDS
    sweep = "slo-exp-1 resnet50_v2 12 poisson 600 1 100 1.5 mul 30"
    assert f"slosched client cluster02:12346 {sweep}" in README_COMMANDS


def table_of(text: str, first_heading: str) -> list[list[str]]:
    """The cells of the rows of the table whose first heading that is."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def command_names() -> set[str]:
    """Every command there is, "client infer" as well as "demo"."""
    root: Any = typer.main.get_command(app)
    names = set()
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        names |= {f"{name} {each}" for each in inner} if inner else {name}
    return names


def test_the_table_of_commands_is_complete() -> None:
    listed = {
        " ".join(w for w in row[0].strip("`").split()[1:] if w.islower())
        for row in table_of(REFERENCE, "command")
    }
    # `client models`, `client status` and `client unload` are other names of commands that are listed; a row
    # stands for all figures, and one for all workloads.
    there = {name.partition(" fig")[0] for name in command_names()} | {"client"}
    assert listed == there - {"client drain", "client models", "client status", "client unload"}


def test_the_table_of_codes_is_complete() -> None:
    listed = {row[0] for row in table_of(REFERENCE, "code")}
    ours = {str(int(code)) for code in Code if code >= 100}
    assert listed == {"0", "1", "3", "4", "6", "7", "8", "2, 10 and up", *ours}
    below_ten = {int(code) for code in Code if code < 10}
    assert below_ten == {0, 1, 2, 3, 4, 5, 6, 7, 8}  # 5 answers a load, never an inference


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("clockwork_request_log.tsv", request_log.COLUMNS),
        ("clockwork_action_log.tsv", action_log.COLUMNS),
        ("client_log.tsv", client_log.COLUMNS),
    ],
)
def test_the_telemetry_page_has_every_column(heading: str, columns: dict[str, type]) -> None:
    page = (ROOT / "docs" / "telemetry.md").read_text()
    section = page.partition(f"## {heading}\n")[2]
    assert [row[0] for row in table_of(section, "column")] == list(columns)


def anchors(document: Path) -> set[str]:
    """What a link to a heading of `document` may end in: the heading as GitHub spells it there."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith("https:"):
            continue
        path = document.parent / target if target else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{document.name} links to {link}"
    for name in re.findall(r"`((?:src|tests|docs|clients|daemon)/[\w./]+)`", text):
        inside = (ROOT / name, ROOT / "src" / "slosched" / name)
        assert any(path.exists() for path in inside), f"{document.name} names {name}"


def test_the_rooms_of_the_architecture_are_those_of_the_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    package = ROOT / "src" / "slosched"
    listed = {row[0].strip("`"): row[1] for row in table_of(text, "room")}
    for room, words in listed.items():
        for name in re.findall(r"`([\w/]+\.py)`", words):
            assert (package / room / name).is_file(), f"{room}/{name}"
    top = {p.name for p in package.iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert {room.partition("/")[0] for room in listed} == top


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    targets |= set(re.findall(r"^CHECKS := (.*)$", makefile, re.MULTILINE)[0].split())
    for document in DOCUMENTS:
        for name in re.findall(r"(?:^    |`)make ([a-z]+)", document.read_text(), re.MULTILINE):
            assert name in targets, f"{document.name}: make {name}"


def test_worker_files_load(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text(blocks(REFERENCE, "toml")[0])
    mine, exported = load_worker_config(tmp_path / "worker.toml").models
    assert mine.factory == "my_package.models:make_resnet"
    assert exported.pt2 == str(tmp_path / "models" / "exported.pt2")
    commented = (ROOT / "daemon" / "worker.toml").read_text()
    assert load_worker_config(ROOT / "daemon" / "worker.toml").models == ()
    examples = re.sub(r"^# ?(?=\[models|\w+ = |$)", "", commented, flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(examples)
    assert len(load_worker_config(tmp_path / "all.toml").models) == 9


# ------------------------------------------------------------------------------ the experiment


#: The README's blocks in their order: one's own model, the experiment here, the experiment on machines.
MINE, EXPERIMENT, _ = blocks(README, "sh")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A page's daemons, on ports of their own; `adapt` puts those into a text of the page."""

    directory: Path
    worker_port: int
    controller_port: int
    env: dict[str, str]

    def adapt(self, text: str) -> str:
        text = text.replace("12345", str(self.worker_port))
        return text.replace("127.0.0.1:12346", f"127.0.0.1:{self.controller_port}")

    def run(self, arguments: list[str], *, within_s: float = 60) -> str:
        done = subprocess.run(
            arguments,
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=within_s,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout


def slosched(command: str) -> list[str]:
    return [sys.executable, "-m", *shlex.split(command)]


def wait_ready(log: Path, process: subprocess.Popen[bytes], words: str) -> None:
    gives_up = time.monotonic() + 30
    while words not in log.read_text():
        assert process.poll() is None and time.monotonic() < gives_up, log.read_text()
        time.sleep(0.05)


@contextmanager
def served(
    directory: Path, worker: str, controller: str, worker_ready: str, joined: str
) -> Iterator[Cluster]:
    """The two daemons of a page, as it starts them but for their ports; both end with 0."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("CLOCKWORK_")}
    here = Cluster(directory, free_port(), free_port(), env)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, command, ready in (
            ("worker", f"{worker} --port {here.worker_port} --bind 127.0.0.1", worker_ready),
            (
                "controller",
                f"{here.adapt(controller)} --port {here.controller_port} --bind 127.0.0.1",
                joined,
            ),
        ):
            log = directory / f"{name}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    slosched(command), cwd=directory, env=env, stdout=file, stderr=file
                )
            started.append(process)
            wait_ready(log, process, ready)
        yield here
    finally:
        for process in reversed(started):
            process.terminate()
        codes = []
        for process in reversed(started):
            try:
                codes.append(process.wait(15))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait(15))
    assert codes == [0, 0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    worker, controller, *_ = EXPERIMENT.splitlines()
    directory = tmp_path_factory.mktemp("readme")
    with served(directory, worker, controller, "worker ready", "joined: 6 GPU(s)") as here:
        yield here


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.processes
@pytest.mark.torch
def test_ones_own_model_is_served_and_refused_as_the_readme_says(tmp_path: Path) -> None:
    """The first screen, unchanged: its files, its commands, its program, its answers."""
    pytest.importorskip("sklearn")
    training, program = blocks(README, "python")
    (tmp_path / "train.py").write_text(training)
    trained = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert trained.returncode == 0, trained.stderr
    right = re.fullmatch(r"(\d+)% of the last 297 images are right\n", trained.stdout)
    assert right is not None and int(right[1]) > 80  # another version of torch draws other weights
    # The device of the README is whatever is there; here it is the CPU, and the first answer has time.
    worker, controller = MINE.replace("--device auto", "--device cpu").splitlines()
    with served(tmp_path, worker, controller, "worker ready", "joined: 1 GPU(s)") as here:
        said = here.run([sys.executable, "-c", here.adapt(program).replace('"50ms"', '"10s"')])
    answer, refusal = said.splitlines()
    assert answer.startswith("a 5; the answer is 5: ok after ")
    assert "batch of 1 on worker 0 GPU 0" in answer
    shown = " ".join(README.split())
    for words in (
        "left until the deadline",
        "started at",
        "model 'digits:1': could start in",
        "at the earliest and takes",
        "the deadline is in 100us",
        "(code 8, could not start in time)",
        "deadline 100us after the send",
    ):
        assert words in said and words in shown, words
    assert refusal.startswith("model 'digits:1': could start in ")


@pytest.mark.processes
def test_the_experiment_by_hand(cluster: Cluster) -> None:
    _, _, client, plot = EXPERIMENT.splitlines()
    assert client.split()[:2] == ["slosched", "client"] and "mul 30" in client
    short = client.replace("client ", f"client 127.0.0.1:{cluster.controller_port} ", 1)
    short = short.replace("mul 30", "mul 0.1").replace(" 600 ", " 100 ")
    said = cluster.run(slosched(short))
    assert "12 x resnet50_v2" in said and "86.5x" in said and "written to run-n12-r600" in said
    assert "wrote run-n12-r600/figures/fig7.png" in cluster.run(slosched(plot))
    kept = {path.name for path in (cluster.directory / "run-n12-r600").iterdir()}
    files = {row[0].strip("`") for row in table_of(REFERENCE, "file")}
    assert kept == files | {"figures"}


@pytest.mark.processes
@pytest.mark.parametrize(
    "program", [each for each in blocks(REFERENCE, "python") if "slo=" in each]
)
def test_the_library_examples_run(cluster: Cluster, program: str) -> None:
    # How fast the machine is must not decide: with ample time the request is served, and with less than an
    # inference takes it is refused on arrival.
    program = cluster.adapt(program)
    slos = re.findall(r'slo="(\w+)"', program)
    assert slos in (["100ms"], ["5ms"])
    said = cluster.run([sys.executable, "-c", program.replace(f'slo="{slos[0]}"', 'slo="10s"')])
    assert "ok after" in said
    if "except slosched.RequestFailed" in program:
        said = cluster.run([sys.executable, "-c", program.replace('slo="5ms"', 'slo="1ms"')])
        assert "could not start in time" in said and "(code 8" in said


@pytest.mark.processes
def test_questions_to_the_controller(cluster: Cluster) -> None:
    address = f"127.0.0.1:{cluster.controller_port}"
    assert "1 of 1 workers joined" in cluster.run(slosched(f"slosched status {address}"))
    assert "loadable: resnet50" in cluster.run(slosched(f"slosched models {address}"))
    cluster.run(slosched(f"slosched client {address} infer resnet50_v2 --slo 10s"))
    said = cluster.run(slosched(f"slosched unload resnet50_v2 {address}"))
    assert re.fullmatch(r"resnet50_v2: [1-9]\d* instances? unloaded\n", said)


def test_commands_that_are_said_to_take_json_do() -> None:
    one_line = " ".join(REFERENCE.split())
    sentence = re.search(r"((?:`[a-z0-9 -]+`(?:, | and | ))+)take `--json`", one_line)
    assert sentence is not None
    names = re.findall(r"`([a-z0-9 -]+)`", sentence.group(1))
    assert len(names) == 8
    for name in names:
        outcome = CliRunner().invoke(app, [*name.split(), "--help"])
        assert "--json" in outcome.output, name
