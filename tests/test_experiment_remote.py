"""The far end on each host: what it starts ends with its lifeline, also what left its process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slosched.errors import PeerUnreachable
from slosched.experiment.children import ChildFailed, Children
from slosched.experiment.fetch import fetch, remove
from slosched.experiment.figures import FIGURES
from slosched.experiment.hosts import this_host
from slosched.experiment.remote import Order
from slosched.experiment.run import run_part
from survivors import Marked, marked

pytestmark = pytest.mark.processes

FAR_END = [sys.executable, "-m", "slosched.experiment.remote"]
WORKER = ["worker", "--device", "emulated", "--bind", "127.0.0.1", "--port", "0"]


@pytest.fixture
def mark() -> Iterator[Marked]:
    with marked() as made:
        yield made


def start(mark: Marked, order: Order, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            FAR_END,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=os.environ | mark.variables,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(order.line())
    process.stdin.flush()
    return process


def await_ready(log: Path) -> None:
    for _ in range(300):
        if " ready on " in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_a_closed_lifeline_ends_the_command_in_order(mark: Marked, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(mark, Order(run=WORKER), log)
    await_ready(log)
    assert len(mark.running()) == 2
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0
    mark.assert_none(within_s=1)


def test_silence_is_a_lost_connection(mark: Marked, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(mark, Order(run=WORKER, silence_s=3), log)
    await_ready(log)
    assert process.wait(20) == 0
    assert "nothing came for 3 s: the connection is taken for lost" in log.read_text()
    mark.assert_none(within_s=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_too(mark: Marked, tmp_path: Path, number: int) -> None:
    log = tmp_path / "log"
    process = start(mark, Order(run=WORKER), log)
    await_ready(log)
    os.kill(process.pid, number)
    assert process.wait(20) == 0
    mark.assert_none(within_s=1)


def test_a_far_end_that_is_killed_takes_its_command_along(mark: Marked, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(mark, Order(run=WORKER), log)
    await_ready(log)
    process.kill()
    process.wait(10)
    mark.assert_none(within_s=10)


def test_what_the_command_left_in_other_sessions_is_killed(mark: Marked, tmp_path: Path) -> None:
    """The far end runs slosched; a stand-in by that name leaves a stubborn daemon behind."""
    stub = tmp_path / "stub" / "slosched"
    (stub / "cli").mkdir(parents=True)
    source = Path(__file__).parent.parent / "src" / "slosched"
    (stub / "__init__.py").write_text(f"__path__.append({str(source)!r})\n")
    (stub / "cli" / "__init__.py").write_text("")
    (stub / "cli" / "child.py").write_text(
        "import os, signal, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    open('daemon', 'w').close()\n"
        "    time.sleep(600)\n"
        "while not os.path.exists('daemon'): time.sleep(0.05)\n"
        "print('slosched worker ready on x:1: it', flush=True)\n"
        "time.sleep(600)\n"
    )
    mark.variables["PYTHONPATH"] = str(stub.parent)
    log = tmp_path / "log"
    process = start(mark, Order(run=["x"], folder=str(tmp_path / "there")), log)
    await_ready(log)
    assert len(mark.running()) == 3
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGTERM
    mark.assert_none(within_s=1)


def test_a_command_that_ends_by_itself_gives_its_exit_code(mark: Marked, tmp_path: Path) -> None:
    process = start(mark, Order(run=["worker", "--device", "nonesuch"]), tmp_path / "log")
    assert process.wait(20) == 2
    assert "unknown device 'nonesuch'" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"", "standard input closed before an order came"),
        (b"{}x\n", "JSON is malformed"),
        (b'{"run": "worker"}\n', "Expected `array`"),
        (b'{"remove": "/etc"}\n', "/etc is not a folder that an experiment made"),
    ],
)
def test_a_wrong_order_is_an_error_in_one_line(line: bytes, error: str) -> None:
    done = subprocess.run(FAR_END, input=line, capture_output=True, timeout=30)
    assert done.returncode == 1 and done.stderr.startswith(b"slosched: error: ")
    assert error in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_a_folder_is_fetched_and_removed(tmp_path: Path) -> None:
    host = this_host().client
    there = tmp_path / "slosched-experiment-s-h"
    (there / "run" / "client").mkdir(parents=True)
    (there / "run" / "log.tsv").write_bytes(b"x" * 3_000_000)
    (there / "run" / "client" / "manifest.json").write_text("{}")
    (there / "run" / "link").symlink_to("/etc/passwd")
    assert fetch(host, str(there), tmp_path / "fetched") == 2
    assert (tmp_path / "fetched" / "run" / "log.tsv").stat().st_size == 3_000_000
    assert fetch(host, str(tmp_path / "none"), tmp_path / "fetched") == 0
    remove(host, str(there))
    assert not there.exists()
    remove(host, str(there))  # it is gone already
    with pytest.raises(PeerUnreachable, match="could not be removed"):
        remove(host, str(tmp_path))


def test_children_with_lifelines_end_together_and_say_why_they_failed(tmp_path: Path) -> None:
    with Children() as children:
        names = ("one", "two")
        made = [
            children.start_with_lifeline(name, FAR_END, Order(run=WORKER).line(), tmp_path / name)
            for name in names
        ]
        for child in made:
            assert children.wait_ready(child, within_s=60) > 0
        children.check()
        made[0].process.terminate()
        made[0].process.wait(20)
        with pytest.raises(ChildFailed, match="the one ended with exit code 0") as failed:
            children.check()
        assert failed.value.child is made[0]
    assert [child.process.returncode for child in made] == [0, 0]


def test_a_worker_that_its_controller_does_not_reach_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.experiment.run._JOINED_S", 2.0)
    here = this_host()
    hosts = replace(here, workers=(replace(here.client, reach="127.0.0.9"),))
    with pytest.raises(PeerUnreachable, match=r"only 0 of 1 worker processes joined .*check reach"):
        run_part(FIGURES[7].parts("smoke")[0], hosts, tmp_path)


def test_a_client_that_fails_ends_the_run(tmp_path: Path) -> None:
    part = replace(
        FIGURES[7].parts("smoke")[0], workload="slo-exp-1 nonesuch 1 poisson 1 1 1 2 mul 1"
    )
    with marked() as mark:
        os.environ.update(mark.variables)
        try:
            with pytest.raises(
                ChildFailed, match=r"client on localhost ended with exit code 2: .*nonesuch"
            ):
                run_part(part, this_host(), tmp_path)
        finally:
            for name in mark.variables:
                del os.environ[name]
        assert set(mark.running()) <= {os.getpid()}
