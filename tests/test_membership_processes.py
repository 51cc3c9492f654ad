"""Real processes: workers register without a list, prove themselves, return and are drained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slosched.codes import ActionType
from slosched.experiment.children import Child, Children
from slosched.join_key import write_join_key
from slosched.telemetry.action_log import FILE_NAME, read_action_log

pytestmark = pytest.mark.processes

SLOSCHED = (sys.executable, "-m", "slosched")


class Members:
    """A controller on loopback that knows no worker, and workers that register."""

    def __init__(self, children: Children, directory: Path) -> None:
        self.children, self.directory = children, directory
        self.key = directory / "cluster.key"
        write_join_key(self.key)
        self.controller = self.start(
            "controller", "INFER5", "--join-key", self.key, "--operators", "ops", "--http-port", -1
        )
        self.address = f"127.0.0.1:{children.wait_ready(self.controller, within_s=30)}"

    def start(self, command: str, *arguments: Any) -> Child:
        log = self.directory / f"{command}-{time.monotonic_ns()}.log"
        text = [command, *map(str, arguments), "--bind", "127.0.0.1", "--port", "0"]
        if command == "controller":
            text += ["--log-dir", str(self.directory / "run")]
        return self.children.start(command, text, log)

    def worker(self, name: str, *more: Any) -> Child:
        arguments = ["--device", "emulated", "--controller", self.address, "--name", name]
        return self.start("worker", *arguments, *more)

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SLOSCHED, "client", self.address, *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def workers(self) -> dict[str, dict[str, Any]]:
        report = json.loads(self.ask("status", "--json").stdout)
        return {worker["name"]: worker for worker in report["workers"]}

    def state(self, name: str) -> str:
        return str(self.workers().get(name, {}).get("state", ""))


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Members]:
    with Children(stop_within_s=5.0) as children:
        yield Members(children, tmp_path)


def soon(is_so: Callable[[], bool], what: str, *, within_s: float = 20.0) -> None:
    ends = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


def test_workers_register_return_on_another_port_are_drained_and_leave(members: Members) -> None:
    worker = members.worker("alpha", "--join-key", members.key)
    soon(lambda: members.state("alpha") == "joined", "it does not register")
    served = members.ask("infer", "resnet50_v2", "--json")
    assert served.returncode == 0, served.stderr

    refused = members.ask("drain", "alpha")
    assert refused.returncode == 2 and "--operators names ops" in refused.stderr
    drained = members.ask("drain", "alpha", "--name", "ops")
    assert drained.returncode == 0 and "drain" in drained.stdout
    soon(lambda: members.state("alpha") == "drained", "it does not end its session")
    soon(lambda: "drained by an operator" in worker.log.read_text(), "the worker is not told")
    assert members.ask("drain", "alpha", "--undo", "--name", "ops").returncode == 0
    soon(lambda: members.state("alpha") == "joined", "it does not come back")

    before = members.workers()["alpha"]
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait(10)
    members.children.forget(worker)
    again = members.worker("alpha", "--join-key", members.key)
    soon(lambda: members.workers()["alpha"]["pid"] == again.process.pid, "its place is not taken")
    after = members.workers()
    assert list(after) == ["alpha"] and after["alpha"]["worker_id"] == before["worker_id"]
    assert after["alpha"]["address"] != before["address"]

    members.children.end(again)
    soon(lambda: members.state("alpha") == "left", "it does not leave")


def test_workers_without_the_key_or_with_another_are_refused(members: Members) -> None:
    other = members.directory / "other.key"
    write_join_key(other)
    without = members.worker("without")
    wrong = members.worker("wrong", "--join-key", other)
    soon(lambda: "wants a join key" in without.log.read_text(), "it is not told that a key lacks")
    soon(lambda: "is not this controller's" in wrong.log.read_text(), "it is not told of its key")
    time.sleep(3)
    assert not members.workers()
    for worker in (without, wrong):
        assert worker.log.read_text().count("refuses this worker") == 1
    assert members.controller.log.read_text().count("is refused") == 1
    right = members.worker("right", "--join-key", members.key)
    soon(lambda: members.state("right") == "joined", "the key does not help")
    assert right.process.poll() is None


def test_a_controller_that_was_killed_is_followed_by_one_that_takes_over(
    members: Members,
) -> None:
    """The workers prepare nothing again, and the new controller loads nothing again."""
    port = members.address.rpartition(":")[2]

    def life(number: int, cluster: str) -> Child:
        members.children.end(members.controller)
        log = members.directory / f"life{number}.log"
        run = str(members.directory / f"life{number}")
        text = ["controller", "INFER5", "--join-key", str(members.key), "--cluster-id", cluster]
        text += ["--bind", "127.0.0.1", "--port", port, "--http-port", "-1", "--log-dir", run]
        members.controller = members.children.start("controller", text, log)
        members.children.wait_ready(members.controller, within_s=30)
        return members.controller

    life(1, "42")
    for name in ("alpha", "beta"):
        members.worker(name, "--join-key", members.key, "--gpus", "2")
    soon(lambda: "joined" == members.state("alpha") == members.state("beta"), "they do not join")
    assert members.ask("infer", "resnet50_v2").returncode == 0
    before = json.loads(members.ask("models", "--json").stdout)["models"]
    assert before[0]["gpus_resident"] == 4

    os.kill(members.controller.process.pid, signal.SIGKILL)
    members.controller.process.wait(10)
    second = life(2, "42")
    soon(
        lambda: second.log.read_text().count("weights of 2 along") == 2, "nothing is brought along"
    )
    after = json.loads(members.ask("models", "--json").stdout)["models"]
    assert [model | {"clients": 0} for model in after] == [
        model | {"clients": 0} for model in before
    ]
    assert members.ask("infer", "resnet50_v2").returncode == 0

    third = life(3, "43")  # another cluster
    soon(lambda: "joined" == members.state("alpha") == members.state("beta"), "they do not join")
    assert not json.loads(members.ask("models", "--json").stdout)["models"]
    assert members.ask("infer", "resnet50_v2").returncode == 0
    assert "along" not in third.log.read_text()
    table = read_action_log(members.directory / "life2" / FILE_NAME)
    assert ActionType.INFER in table["action_type"]
    assert ActionType.LOAD_WEIGHTS not in table["action_type"]
