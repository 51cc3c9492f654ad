"""`slosched experiment` against a real sshd: a figure from three hosts, and the end of all that it started.

Each process that a test starts, here or on a host, has the test's mark in its environment; none may be left.
Without an sshd these tests are skipped, except where SLOSCHED_SSH_TESTS=required says that they must run
(.ci/run).
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

import ssh_rig
from slosched.analysis.runs import read_requests
from slosched.experiment.remote import children_of
from slosched.telemetry.client_log import read_client_log
from survivors import Marked, marked

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(240),
]

SMOKE = ("experiment", "fig7", "--scale", "smoke", "--no-inputs")
ONE = ("--configs", "n12-r600")
#: A far end needs a moment to end what it runs; a lost one learns of it when its connection closes.
ENDED_WITHIN_S = 25.0


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ssh_rig.Server]:
    if (reason := ssh_rig.missing()) and os.environ.get("SLOSCHED_SSH_TESTS") == "required":
        pytest.fail(f"{reason}; SLOSCHED_SSH_TESTS says that it is needed")
    elif reason:
        pytest.skip(reason)
    with ssh_rig.server(tmp_path_factory.mktemp("sshd")) as made:
        yield made


@pytest.fixture
def mark() -> Iterator[Marked]:
    with marked() as made:
        yield made


@pytest.fixture
def server(sshd: ssh_rig.Server, mark: Marked, tmp_path: Path) -> Iterator[ssh_rig.Server]:
    """The server, whose hosts' processes carry the mark and keep their files in the test's folder."""
    sshd.environment.update(mark.variables)
    sshd.there = tmp_path / "there"
    yield sshd


def start(mark: Marked, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slosched", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | mark.variables,
        start_new_session=True,
    )


def run(mark: Marked, *words: str) -> subprocess.CompletedProcess[str]:
    process = start(mark, *words)
    out, errors = process.communicate(timeout=180)
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


def log_of(out: Path) -> list[str]:
    return (out / "run.log").read_text().splitlines()


def await_line(out: Path, text: str, *, within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if any(text in line for line in log_of(out)):
                return
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not come: {log_of(out)}")


# --------------------------------------------------------------------------------- the whole figure


def noisy_python(folder: Path) -> str:
    path = folder / "noisy-python"
    path.write_text(f'#!/bin/sh\necho "Welcome {{you}}"\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return f'python = "{path}"'


def test_two_configurations_of_figure_7_from_three_hosts(
    server: ssh_rig.Server, mark: Marked, tmp_path: Path
) -> None:
    noisy = noisy_python(server.folder)  # as start-up files of a shell that print
    out, hosts = tmp_path / "out", server.hosts_toml(own={"one": noisy, "two": noisy})
    words = (*SMOKE, "--hosts", str(hosts), "--configs", "N12-R600,n48-r600", "--out", str(out))
    done = run(mark, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    mark.assert_none(within_s=5)
    assert server.left_there() == []
    for host, roles in (("one", "client"), ("two", "controller, worker"), ("three", "worker")):
        assert f"{host} ({roles}): slosched " in done.stderr
    assert log_of(out)[-1] == "Exiting" == done.stdout.splitlines()[-1]
    assert log_of(out) == done.stdout.splitlines()
    assert "in time so far" in done.stdout and " left" in done.stdout
    for name, copies in (("n12-r600", 12), ("n48-r600", 48)):
        place = out / name
        logs = ("controller.log", "client.log", "worker-two.log", "worker-three.log", "client.json")
        for file in (*logs, "run/client/client_log.tsv", "run/manifest.json"):
            assert (place / file).stat().st_size > 0, file
        requests = read_requests(place / "run", only=("user_id", "deadline_met"))
        assert len(set(requests["user_id"].tolist())) == copies
        greeting, _, result = (place / "client.json").read_text().partition("\n")
        assert (
            greeting == "Welcome {you}"
            and "Welcome {you}" in (place / "controller.log").read_text()
        )
        sent = json.loads(result)["sent"]
        assert (
            len(read_client_log(place / "run" / "client" / "client_log.tsv")["scheduled_ns"])
            == sent
        )
        # A controller on a machine that is busy with other things may refuse some at the door, unread.
        assert 0.9 * sent < len(requests["user_id"]) <= sent
        assert "3 emulated GPU(s)" in (place / "worker-three.log").read_text()
        manifest = json.loads((place / "manifest.json").read_text())
        assert manifest["complete"] and manifest["config"]["hosts"]["client"] == "one"
    figures = out / "figures"
    assert (figures / "fig7.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((figures / "figure7.json").read_text())
    assert list(document["numbers"]["runs"]) == ["n12-r600", "n48-r600"]

    refused = run(mark, *words)
    assert refused.returncode == 7 and "--resume continues it" in refused.stderr
    (figures / "fig7.png").unlink()
    again = run(mark, *words, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (
        again.stdout.count("is there already and is kept") == 2 and (figures / "fig7.png").exists()
    )


# --------------------------------------------------------------------------- ended in the middle


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL],
    ids=["int", "term", "hup", "kill"],
)
def test_a_signal_in_the_middle_leaves_no_process(
    server: ssh_rig.Server, mark: Marked, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(mark, *SMOKE, *ONE, "--hosts", str(server.hosts_toml()), "--out", str(out))
    await_line(out, "in time so far")
    assert (
        len(mark.running()) > 8
    )  # ours, four ssh, and on the hosts a far end and a command for each
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    code = 130 if number == signal.SIGINT else -number if number == signal.SIGKILL else 128 + number
    assert process.returncode == code, printed + errors
    mark.assert_none(within_s=ENDED_WITHIN_S)
    if number != signal.SIGKILL:
        assert log_of(out)[-1] == "Exiting" and "--resume continues" in log_of(out)[-2]
        assert server.left_there() == []
        assert not json.loads((out / "n12-r600" / "manifest.json").read_text())["complete"]


def connection_of(server: ssh_rig.Server, pid: int) -> int:
    """The server's process whose session `pid` runs in."""
    sessions = server.sessions()
    while pid not in sessions:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = int(stat[1])
        assert pid > 1, "not a process of the server"
    return pid


def cut(server: ssh_rig.Server, pid: int) -> None:
    session = connection_of(server, pid)
    for each in (
        session,
        *children_of(session),
    ):  # a session has a second process unless it is root's
        if each == session or b"sshd" in Path(f"/proc/{each}/cmdline").read_bytes():
            os.kill(each, signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        (("slosched.cli.child", "worker", "127.0.0.3"), "worker on three"),
        (("slosched.cli.child", "controller", "127.0.0.2"), "controller on two"),
        (("slosched.cli.child", "slo-exp-1"), "client on one"),
    ],
    ids=["worker", "controller", "client"],
)
def test_a_connection_that_breaks_ends_everything(
    server: ssh_rig.Server, mark: Marked, tmp_path: Path, words: Sequence[str], lost: str
) -> None:
    out = tmp_path / "out"
    process = start(mark, *SMOKE, *ONE, "--hosts", str(server.hosts_toml()), "--out", str(out))
    await_line(out, "in time so far")
    cut(server, mark.find(*words))
    printed, errors = process.communicate(timeout=90)
    host = lost.rpartition(" ")[2]
    assert process.returncode == 5, printed + errors
    assert f"error: the {lost} is lost: host {host}: the connection was lost (" in errors
    assert len(errors.strip().splitlines()[-1]) < 400 and "Traceback" not in errors
    mark.assert_none(within_s=ENDED_WITHIN_S)
    assert log_of(out)[-1] == "Exiting"
    # What is left there is where the lines say, and nowhere else.
    [left] = server.left_there()
    assert f"host {host}: the run's files stay in {left}/n12-r600 there" in printed
    assert (out / "n12-r600" / "controller.log").stat().st_size > 0


def test_a_connection_that_falls_silent_ends_everything(
    server: ssh_rig.Server, mark: Marked, tmp_path: Path
) -> None:
    """As when a cable is pulled: no end of the connection is told that it is over."""
    out = tmp_path / "out"
    process = start(mark, *SMOKE, *ONE, "--hosts", str(server.hosts_toml()), "--out", str(out))
    await_line(out, "worker process(es) joined")
    session = connection_of(server, mark.find("slosched.cli.child", "worker", "127.0.0.3"))
    os.kill(session, signal.SIGSTOP)
    try:
        printed, errors = process.communicate(timeout=120)
        # The run ended before ssh noticed, or because it did.
        assert process.returncode in (0, 5), printed + errors
        mark.assert_none(within_s=60)
    finally:
        with suppress(ProcessLookupError):
            os.kill(session, signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("slosched.cli.child", "slo-exp-1"), "the client on one ended with exit code 137"),
        (
            ("slosched.cli.child", "worker", "127.0.0.3"),
            "the worker on three ended with exit code 137",
        ),
    ],
    ids=["client", "worker"],
)
def test_a_process_that_is_killed_on_its_host_ends_the_run(
    server: ssh_rig.Server, mark: Marked, tmp_path: Path, words: Sequence[str], error: str
) -> None:
    out = tmp_path / "out"
    process = start(mark, *SMOKE, *ONE, "--hosts", str(server.hosts_toml()), "--out", str(out))
    await_line(out, "in time so far")
    os.kill(mark.find(*words), signal.SIGKILL)
    printed, errors = process.communicate(timeout=90)
    assert process.returncode == 1 and error in errors, printed + errors
    mark.assert_none(within_s=ENDED_WITHIN_S)
    # What the others wrote until then is here, and nothing is left there.
    assert (out / "n12-r600" / "run" / "clockwork_request_log.tsv").stat().st_size > 0
    assert server.left_there() == []


# ------------------------------------------------------------------------------- hosts that are not fit


def without_slosched(folder: Path) -> str:
    path = folder / "bare-python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    path.chmod(0o755)
    return f'python = "{path}"'


def older_slosched(folder: Path) -> str:
    stub = folder / "older" / "slosched"
    (stub / "experiment").mkdir(parents=True)
    for file in ("__init__.py", "experiment/__init__.py", "experiment/remote.py"):
        (stub / file).write_text("")
    (stub / "version.py").write_text('__version__ = "0.0.1"\n')
    return f'environment = {{ PYTHONPATH = "{stub.parent}" }}'


def another_key(folder: Path) -> str:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "other_key")]
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
    config = (folder / "ssh_config").read_text().replace("user_key", "other_key")
    (folder / "other_config").write_text(config)
    return 'ssh_config = "other_config"'


def another_host_key(folder: Path) -> str:
    known = re.sub(
        r"(\[127\.0\.0\.3\]:\d+ ssh-ed25519 \S{20})\S{8}", r"\1AAAAAAAA", known_of(folder)
    )
    (folder / "changed_hosts").write_text(known)
    config = (folder / "ssh_config").read_text().replace("known_hosts", "changed_hosts")
    (folder / "changed_config").write_text(config)
    return 'ssh_config = "changed_config"'


def known_of(folder: Path) -> str:
    return (folder / "known_hosts").read_text()


def unknown_host_key(folder: Path) -> str:
    config = (folder / "ssh_config").read_text().replace("/known_hosts", "/no_hosts")
    (folder / "unknown_config").write_text(config)
    return 'ssh_config = "unknown_config"'


def server_port(folder: Path) -> str:
    port = re.search(r"Port (\d+)", (folder / "ssh_config").read_text())
    assert port is not None
    return f"worker_port = {port[1]}"


@pytest.mark.parametrize(
    ("own", "code", "error"),
    [
        (
            unknown_host_key,
            5,
            "host three: its host key is unknown or has changed: connect once by hand",
        ),
        (another_host_key, 5, "host three: its host key is unknown or has changed"),
        (another_key, 5, "host three: it accepts none of your keys: name one by identity"),
        (
            lambda _: "ssh_port = 1",
            5,
            "host three: no ssh server answers there: check address and ssh_port",
        ),
        (without_slosched, 2, "host three: slosched cannot be imported by .*by the key python"),
        (lambda _: 'python = "/none/python"', 2, "host three: /none/python does not run there"),
        (
            older_slosched,
            2,
            "host three: it has slosched 0.0.1 and this machine .*; install the same",
        ),
        (lambda _: 'folder = "/proc/none"', 2, "host three: folder /proc/none cannot be written"),
        (
            server_port,
            2,
            r"host three: port \d+ on 127.0.0.3 cannot be used \(Address already in use\)",
        ),
    ],
    ids=[
        "unknown-host-key",
        "changed-host-key",
        "another-key",
        "no-server",
        "no-slosched",
        "no-python",
        "older-slosched",
        "no-folder",
        "taken-port",
    ],
)
def test_a_host_that_is_not_fit_is_named_before_anything_starts(
    server: ssh_rig.Server,
    mark: Marked,
    tmp_path: Path,
    own: Callable[[Path], str],
    code: int,
    error: str,
) -> None:
    out = tmp_path / "out"
    hosts = server.hosts_toml(own={"three": own(server.folder)})
    done = run(mark, *SMOKE, *ONE, "--hosts", str(hosts), "--out", str(out))
    assert done.returncode == code, done.stderr
    assert re.search(f"slosched: error: {error}", done.stderr), done.stderr
    assert not out.exists() and done.stdout == ""
    mark.assert_none(within_s=5)


def test_every_host_that_is_not_fit_is_named(
    server: ssh_rig.Server, mark: Marked, tmp_path: Path
) -> None:
    own = {"one": "ssh_port = 1", "three": 'python = "/none/python"'}
    done = run(mark, *SMOKE, *ONE, "--hosts", str(server.hosts_toml(own=own)))
    assert done.returncode == 5
    assert (
        "host one: no ssh server" in done.stderr and "host three: /none/python does" in done.stderr
    )


# ------------------------------------------------------------------------------- on this host alone


def test_in_the_background_it_survives_its_terminal(mark: Marked, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*SMOKE, *ONE, "--engine", "local", "--background", "--out", str(out)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(mark.variables)
        os.execv(sys.executable, [sys.executable, "-m", "slosched", *words])
    shown = b""
    with suppress(OSError):  # the terminal's other end closes
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    text = shown.decode()
    assert f"follow it: tail -f {out / 'run.log'}" in text and "stop it:   kill " in text
    assert mark.running()
    await_line(out, "Exiting")
    assert (out / "figures" / "fig7.png").exists() and log_of(out)[-1] == "Exiting"
    mark.assert_none(within_s=5)


def test_in_the_background_it_stops_when_told(mark: Marked, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(mark, *SMOKE, *ONE, "--engine", "local", "--background", "--out", str(out))
    assert done.returncode == 0, done.stderr
    await_line(out, "in time so far")
    pid = re.search(r"kill (\d+)", done.stdout)
    assert pid is not None
    os.kill(int(pid[1]), signal.SIGTERM)
    mark.assert_none(within_s=ENDED_WITHIN_S)
    assert log_of(out)[-1] == "Exiting" and "stopped by a signal" in log_of(out)[-2]


def test_ctrl_c_on_this_host_leaves_no_process_and_resume_makes_what_is_missing(
    mark: Marked, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = (*SMOKE, *ONE, "--engine", "local", "--out", str(out))
    process = start(mark, *words)
    await_line(out, "in time so far")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    mark.assert_none(within_s=ENDED_WITHIN_S)
    done = run(mark, *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert (out / "n12-r600" / "run-002" / "run" / "client_log.tsv").exists()
    assert "kept in" in done.stdout and (out / "figures" / "fig7.png").exists()
