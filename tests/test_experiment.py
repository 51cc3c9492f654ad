"""The parts of `slosched experiment`: hosts.toml, shares of GPUs, ssh's command and errors, files, resuming."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.analysis.tables import CONTROLLER_VIEW, StepSummary
from slosched.cli.app import app
from slosched.config import SchedulerConfig
from slosched.errors import (
    InvalidConfig,
    MalformedMessage,
    PeerUnreachable,
    RunDirectoryInUse,
    UnknownName,
)
from slosched.experiment import preflight
from slosched.experiment.campaign import Experiment, alone_in, claim, finished
from slosched.experiment.fetch import _unpack
from slosched.experiment.figures import FIGURES, Part, _fig7_table, chosen_parts, figure_named
from slosched.experiment.hosts import Host, Hosts, load_hosts, this_host
from slosched.experiment.preflight import Answer, NotFit, ports_of
from slosched.experiment.run import controller_words, session_folder, worker_shares
from slosched.experiment.ssh import failure, far_end
from slosched.options import rows
from slosched.telemetry.manifest import finish_manifest, write_manifest
from slosched.units import NS_PER_S
from slosched.version import __version__
from test_readme import blocks, table_of

GOOD = """
client = "a"
controller = "b"
workers = ["c", "d"]
[defaults]
user = "alice"
device = "emulated"
[hosts.d]
address = "10.0.0.4"
worker_port = 5
environment = { CUDA_VISIBLE_DEVICES = "1" }
"""


def hosts_of(text: str, folder: Path) -> Hosts:
    path = folder / "hosts.toml"
    path.write_text(text)
    return load_hosts(path)


def test_defaults_hold_for_every_host_and_a_hosts_own_table_comes_first(tmp_path: Path) -> None:
    hosts = hosts_of(GOOD, tmp_path)
    assert [host.name for host in hosts.all()] == ["a", "b", "c", "d"]
    c, d = hosts.workers
    assert (c.user, c.destination, c.reached_at, c.worker_port) == ("alice", "c", "c", 12345)
    assert (d.user, d.destination, d.reached_at, d.worker_port) == (
        "alice",
        "10.0.0.4",
        "10.0.0.4",
        5,
    )
    assert d.environment == {"CUDA_VISIBLE_DEVICES": "1"} and c.environment is None
    assert hosts.roles(d) == "worker" and hosts.roles(hosts.client) == "client"
    both = hosts_of('client = "a"\ncontroller = "a"\nworkers = ["a"]', tmp_path)
    assert [host.name for host in both.all()] == ["a"]
    assert both.roles(both.client) == "client, controller, worker"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            ("client =", "clients ="),
            r"hosts\.toml: unknown key 'clients' \(did you mean client\?\)",
        ),
        (('client = "a"', ""), "client must name one host, as client = "),
        (('["c", "d"]', '"c"'), r"workers must be a list of hosts, as workers = \[\"cluster03\""),
        (('["c", "d"]', '["d", "d"]'), "workers names 'd' twice; a host runs one worker"),
        (
            ('["c", "d"]', '["c"]'),
            r"\[hosts\.d\] has no role; name it in client, controller, workers",
        ),
        (("user", "usr"), r"\[defaults\]: unknown key 'usr' \(did you mean user\?\)"),
        (("worker_port = 5", "worker_port = 70000"), r"\[hosts\.d\]: worker_port must be within"),
        (
            ("worker_port = 5", 'worker_port = "5"'),
            r"\[hosts\.d\]: worker_port must be a whole number",
        ),
        (('"10.0.0.4"', '"10.0.0.4:22"'), r"address '10.0.0.4:22' is not a host's name or address"),
        (('"10.0.0.4"', '"-oProxyCommand=x"'), "address '-oProxyCommand=x' is not a host's name"),
        (('"alice"', '"-l"'), "user '-l' is not a user's name"),
        (('CUDA_VISIBLE_DEVICES = "1"', '"A B" = "1"'), "environment: 'A B' is not the name of a"),
        (
            ('CUDA_VISIBLE_DEVICES = "1"', "A = 1"),
            r"\[hosts\.d\]: environment must be a table of texts",
        ),
        (
            ("worker_port = 5", 'identity = "none"'),
            "identity .*none' is not a file of this machine",
        ),
        (
            ("worker_port = 5", "worker_port = 0\ndevice = 'cuda'\ngpus = 2"),
            "worker_port must be given",
        ),
        (
            ('address = "10.0.0.4"\nworker_port = 5', 'reach = "c"'),
            "c and d are both reached at c:12345",
        ),
        (('workers = ["c", "d"]', 'workers = ["c", "d", "x/y"]'), "'x/y' is not a host's name"),
        (("[defaults]", "defaults = 1\n[x]"), "unknown key 'x'"),
        (("[hosts.d]", "[hosts]\nd = 1\n[hosts.c]"), r"d must be a table, headed \[hosts\.d\]"),
        (("client", "client = = 1"), "is not a TOML file"),
    ],
)
def test_each_mistake_is_named_with_its_place(
    change: tuple[str, str], error: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfig, match=error):
        hosts_of(GOOD.replace(*change, 1), tmp_path)


ROOT = Path(__file__).parent.parent


def test_the_example_and_the_page_have_every_key() -> None:
    hosts = load_hosts(ROOT / "analysis" / "hosts.toml")
    assert len(hosts.workers) == 6 and hosts.client.name == "cluster01"
    keys = {each.name for each in rows(Host) if each.option.in_file}
    text = (ROOT / "analysis" / "hosts.toml").read_text()
    assert keys <= set(re.findall(r"^#? ?(\w+) = ", text, re.MULTILINE))
    page = (ROOT / "docs" / "experiment.md").read_text()
    listed = [re.findall(r"`(\w+)`", row[0]) for row in table_of(page, "key")]
    assert {key for keys_ in listed for key in keys_} == keys
    assert load_hosts(ROOT / "analysis" / "hosts.toml").controller.worker_port == 12345
    defaults = {each.name: each.default for each in rows(Host) if each.option.in_file}
    given = tomllib.loads(text)["defaults"]
    assert given == {key: defaults[key] for key in given}


def test_the_file_on_the_page_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "experiment.md").read_text()
    hosts = hosts_of(blocks(page, "toml")[0], tmp_path)
    assert hosts.workers[-1].device == "cuda:1" and hosts.client.user == "alice"


def test_a_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidConfig, match=r"cannot read none\.toml"):
        load_hosts(Path("none.toml"))


# ---------------------------------------------------------------------------- who serves with what


def part(gpus: int, **more: object) -> Part:
    made = Part(
        name="p", workload="simple", scheduler=SchedulerConfig(), duration_ns=NS_PER_S, gpus=gpus
    )
    return replace(made, **more)  # type: ignore[arg-type]


def workers(*gpus: int, device: str = "emulated") -> Hosts:
    made = tuple(Host(name=f"w{i}", device=device, gpus=number) for i, number in enumerate(gpus))
    return Hosts(made[0], made[0], made)


@pytest.mark.parametrize(
    ("gpus", "wanted", "device", "shares"),
    [
        ((0,) * 6, 6, "emulated", [1] * 6),
        ((0, 0), 6, "emulated", [3, 3]),
        ((0, 0, 0), 8, "emulated", [3, 3, 2]),
        ((0,) * 6, 1, "emulated", [1]),
        ((4, 0, 0), 6, "emulated", [4, 1, 1]),
        ((8, 8), 6, "emulated", [8]),
        ((0,) * 8, 6, "auto", [1] * 6),
        ((4, 4), 6, "cuda", [4, 4]),
    ],
)
def test_gpus_are_shared_out_over_the_workers(
    gpus: Sequence[int], wanted: int, device: str, shares: list[int]
) -> None:
    found = worker_shares(part(wanted), workers(*gpus, device=device))
    assert [share.gpus for share in found] == shares


def test_fewer_gpus_than_a_figure_takes_need_an_option() -> None:
    hosts = workers(0, 0, device="auto")
    with pytest.raises(
        InvalidConfig, match=r"p takes 6 GPUs, and the workers have 2; .*--fewer-gpus"
    ):
        worker_shares(part(6), hosts)
    assert len(worker_shares(part(6), hosts, fewer=True)) == 2


def test_a_controller_uses_no_more_gpus_than_the_run_has() -> None:
    words = controller_words(FIGURES[7].parts("smoke")[0].scheduler, ["a:1", "b:2"], gpus=6)
    assert words[:4] == ["controller", "INFER5", "--workers", "a:1,b:2"]
    assert words[words.index("--max-gpus") + 1] == "6"


def test_ports_are_those_of_the_hosts_roles() -> None:
    host = Host(name="w", device="cuda", gpus=3, worker_port=100)
    hosts = Hosts(Host(name="c"), Host(name="m"), (host,))
    assert ports_of(hosts, host) == [("0.0.0.0", 100), ("0.0.0.0", 101), ("0.0.0.0", 102)]
    assert ports_of(hosts, hosts.controller) == [("0.0.0.0", 12346)]
    assert ports_of(hosts, hosts.client) == []


def test_configurations_are_chosen_in_any_case_and_stay_in_order() -> None:
    chosen = chosen_parts(FIGURES[7], "published", ["N48-R600", "n12-r600"])
    assert [each.name for each in chosen] == ["n12-r600", "n48-r600"]
    assert chosen[0].workload == "slo-exp-1 resnet50_v2 12 poisson 600 1 100 1.5 mul 30"
    assert chosen[0].duration_ns == 360 * NS_PER_S
    assert len(chosen_parts(FIGURES[7], "published")) == 6
    with pytest.raises(
        UnknownName, match=r"configuration of fig7 'n12-r60' .did you mean n12-r600"
    ):
        chosen_parts(FIGURES[7], "published", ["N12-R60"])
    with pytest.raises(InvalidConfig, match="named twice"):
        chosen_parts(FIGURES[7], "published", ["n12-r600", "N12-R600"])
    with pytest.raises(UnknownName, match="unknown experiment 'fig4'"):
        figure_named("fig4")


# ---------------------------------------------------------------------------------------- ssh


def test_sshs_command_asks_nothing_forwards_nothing_and_quotes() -> None:
    host = Host(
        name="gpu1",
        address="10.0.0.4",
        user="al",
        ssh_port=2222,
        identity="/k e y",
        python="~/my env/bin/python",
        environment={"A": "it's; rm"},
    )
    command = far_end(host)
    options = " ".join(command)
    for wanted in ("BatchMode=yes", "ForwardAgent=no", "ControlMaster=no", "ServerAliveInterval=5"):
        assert f"-o {wanted}" in options
    assert (
        command[command.index("-p") + 1] == "2222" and command[command.index("-i") + 1] == "/k e y"
    )
    assert command[-3:-1] == ["--", "10.0.0.4"]
    assert command[-1] == (
        "exec env 'A=it'\"'\"'s; rm' \"$HOME\"/'my env/bin/python' -m slosched.experiment.remote"
    )
    assert "ssh" not in far_end(this_host().client)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "Host key verification failed.",
            "its host key is unknown or has changed: connect once by hand",
        ),
        ("al@x: Permission denied (publickey).", "it accepts none of your keys"),
        (
            "ssh: Could not resolve hostname x: Name or service not known",
            "its name is not known here",
        ),
        ("ssh: connect to host x port 22: Connection refused", "no ssh server answers there"),
        ("ssh: connect to host x port 22: Connection timed out", "it cannot be reached"),
        ("kex_exchange_identification: closed", "ssh failed: kex_exchange_identification: closed"),
        ("", "ssh failed: ssh gave no reason"),
    ],
)
def test_sshs_reasons_come_with_what_to_do(text: str, advice: str) -> None:
    error = failure(Host(name="x"), text, running=False)
    assert isinstance(error, PeerUnreachable) and advice in str(error)
    lost = failure(Host(name="x"), "Connection to x closed by remote host.", running=True)
    assert "the connection was lost (Connection to x closed by remote host.)" in str(lost)


def answer(**more: object) -> Answer:
    values: dict[str, object] = {
        "python": "3.11.2",
        "executable": "/p",
        "slosched": __version__,
        "missing": "",
        "folder": "",
        "free_bytes": 10**12,
        "ports": {"1": ""},
        "cores": 2,
        "hostname": "h",
    }
    return Answer(**(values | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (
            {"slosched": "9.9.9"},
            f"it has slosched 9.9.9 and this machine {__version__}; install the same",
        ),
        (
            {"missing": "ModuleNotFoundError: x"},
            "slosched cannot be imported by /p .*by the key python",
        ),
        ({"folder": "Permission denied"}, "cannot be written .*by the key folder"),
        ({"free_bytes": 1}, "has only 0 MiB free"),
        ({"ports": {"12345": "Address already in use"}}, "port 12345 on 0.0.0.0 cannot be used"),
    ],
)
def test_a_host_that_is_not_fit_is_told_apart(more: dict[str, object], error: str) -> None:
    preflight._check(Host(name="h"), answer())
    with pytest.raises(NotFit, match=f"host h: .*{error}"):
        preflight._check(Host(name="h"), answer(**more))


# ------------------------------------------------------------------------------------------ files


def packed(name: str, *, link: bool = False) -> tarfile.TarFile:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 0 if link else 3
        if link:
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO(b"abc"))
    raw.seek(0)
    return tarfile.open(fileobj=raw, mode="r")


def test_fetched_files_stay_in_their_folder(tmp_path: Path) -> None:
    place = tmp_path / "run"
    assert _unpack(Host(name="h"), packed("run/client/log.tsv"), place) == 1
    assert (place / "run" / "client" / "log.tsv").read_bytes() == b"abc"
    for name in ("../out", "/etc/x", "a/../../b"):
        with pytest.raises(MalformedMessage, match="which is not a run's file"):
            _unpack(Host(name="h"), packed(name), place)
    with pytest.raises(MalformedMessage):
        _unpack(Host(name="h"), packed("link", link=True), place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def experiment(out: Path, *, resume: bool = False, hosts: Hosts | None = None) -> Experiment:
    return Experiment(
        figure=FIGURES[7],
        scale="smoke",
        parts=tuple(FIGURES[7].parts("smoke")),
        hosts=hosts or this_host(),
        out=out,
        session="s",
        resume=resume,
    )


def test_an_experiment_is_never_overwritten_and_only_complete_runs_are_kept(tmp_path: Path) -> None:
    made = experiment(tmp_path / "out")
    claim(made)
    write_manifest(made.out, "experiment", made.described())
    with pytest.raises(RunDirectoryInUse, match="--resume continues it, or choose another --out"):
        claim(made)
    claim(experiment(made.out, resume=True))
    one = made.parts[0]
    assert finished(made, one) is None
    first = made.out / one.name
    first.mkdir()
    write_manifest(first, "experiment-run", made.spec(one))
    assert finished(made, one) is None  # it did not end
    second = first / "run-002"
    second.mkdir()
    write_manifest(second, "experiment-run", made.spec(one))
    finish_manifest(second, {"complete": True})
    assert finished(made, one) == second
    with pytest.raises(
        InvalidConfig, match=r"finished run with another duration_ns; choose another"
    ):
        finished(made, replace(one, duration_ns=1))
    other = experiment(made.out, hosts=workers(0, 0))
    with pytest.raises(InvalidConfig, match="finished run with another hosts"):
        finished(other, one)


def test_one_directory_has_one_experiment_at_a_time(tmp_path: Path) -> None:
    busy = pytest.raises(RunDirectoryInUse, match="another process runs an experiment in")
    with alone_in(tmp_path), busy, alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_a_folder_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidConfig, match="holds no experiment to resume"):
        claim(experiment(tmp_path, resume=True))


def test_a_hosts_folder_is_named_for_session_and_host() -> None:
    host = Host(name="h", folder="~/runs/")
    assert session_folder(host, "1") == "~/runs/slosched-experiment-1-h"


# ---------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("fig7", "give --hosts FILE, or --engine local (this host) or sim (virtual time)"),
        ("fig7 --engine ssh", "--engine ssh needs --hosts FILE"),
        ("fig7 --engine sim --hosts h.toml", "--hosts is not used by --engine sim"),
        ("fig7 --engine cloud", "unknown engine 'cloud'"),
        ("fig12 --engine sim", "unknown experiment 'fig12'"),
        ("fig7 --engine sim --scale tiny", "unknown scale 'tiny'"),
        ("fig11 --engine sim", "fig11 asks for CPU time, which virtual time does not have"),
        ("fig7 --engine local --resume", "--resume needs the --out"),
        ("fig7 --engine sim --background", "--background is for live runs"),
        ("fig7 --hosts none.toml", "cannot read none.toml"),
        ("fig7 --engine sim --configs n1-r1", "unknown configuration of fig7 'n1-r1'"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(words: str, error: str) -> None:
    outcome = CliRunner().invoke(app, ["experiment", *words.split()], prog_name="slosched")
    assert outcome.exit_code == 2 and error in outcome.stderr


def test_the_help_lists_every_figure_as_the_table_has_it() -> None:
    shown = CliRunner().invoke(app, ["experiment", "--help"], prog_name="slosched").stdout
    for figure in FIGURES.values():
        assert re.search(rf"^ +{figure.name} +{re.escape(figure.text)}$", shown, re.MULTILINE)
    with_inputs = [f.name for f in FIGURES.values() if f.inputs_on_hosts]
    assert with_inputs == ["fig5", "fig7"]
    assert [f.name for f in FIGURES.values() if f.parts("quick")[0].inputs] == ["fig5"]


def test_an_experiment_in_virtual_time_leaves_runs_figure_and_numbers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["experiment", "fig7", "--engine", "sim", "--scale", "smoke"]
    words += ["--configs", "N12-R600", "--out", str(out)]
    for kept in (0, 1):  # the second time the run is there
        outcome = CliRunner().invoke(app, words, prog_name="slosched")
        assert outcome.exit_code == 0, outcome.output
        assert outcome.stdout.rstrip().endswith("Exiting") and "% in time" in outcome.stdout
        document = json.loads((out / "figures" / "figure7.json").read_text())
        assert (document["kind"], document["runs_reused"]) == ("simulated", kept)
        assert [run["name"] for run in document["runs"]] == ["n12-r600"]
    assert (out / "figures" / "fig7.png").stat().st_size > 10_000


def test_a_step_without_requests_leaves_a_gap_in_figure_7s_table() -> None:
    """A client that stalled for seconds sent nothing in a step; the table ended the command."""

    def step(number: int) -> StepSummary:
        return StepSummary(
            view=CONTROLLER_VIEW,
            step=number,
            sweep=0,
            slo_factor=3.0**number,
            slo_ns=10**6 * 3**number,
            start_ns=number * 10**9,
            duration_ns=10**9,
            requests=8,
            offered_rps=8.0,
            satisfied=number,
            satisfaction=number / 8,
            goodput_rps=float(number),
            p50_ns=1e6,
            p99_ns=1e6,
            by_code={},
        )

    table = _fig7_table({"stalled": [step(0), step(2)], "whole": [step(0), step(1), step(2)]})
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][-3:] == ["1x", "3x", "9x"]
    assert lines[1] == ["stalled", "0.0", "-", "25.0"]
    assert lines[2] == ["whole", "0.0", "12.5", "25.0"]
