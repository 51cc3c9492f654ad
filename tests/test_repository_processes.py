"""A worker with a repository, its controller and a client, as processes: versions come, go and are refused."""

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

import numpy as np
import pytest

from repository_rig import Repository
from slosched import Client
from slosched.clients.inference import Model
from slosched.daemon.repository.listing import Listing
from slosched.daemon.repository.watch import RepositoryWatch
from slosched.errors import InvalidConfig, RequestFailed
from slosched.experiment.children import Children
from slosched.units import NS_PER_S

pytestmark = [pytest.mark.processes, pytest.mark.torch]

SLOSCHED = (sys.executable, "-m", "slosched")
ROW = np.arange(4, dtype=np.float32)


def soon(is_so: Callable[[], bool], what: str, *, within_s: float = 30.0) -> None:
    ends = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


def times(client: Client, model: Model, factor: float) -> bool:
    """Whether the model multiplies by `factor`."""
    output = client.infer(model, ROW, slo="10s").output
    return output is not None and np.array_equal(output, ROW * factor)


class Cluster:
    """A controller, and a worker on the CPU that offers a repository."""

    def __init__(self, children: Children, directory: Path) -> None:
        self._directory = directory
        self.repository = Repository(directory)
        self.repository.scaled("double/1", 2.0)
        self.repository.scaled("triple/1", 3.0)
        self.repository.add("broken/1", {"model.toml": "nonsense"})
        self.repository.add("out/1", {"model.toml": "[model]"})
        (self.repository.path / "out" / "1" / "model.pt2").symlink_to("/etc/passwd")
        arguments = ["--http-port", "-1", "--log-dir", str(directory / "run")]
        common = ["--bind", "127.0.0.1", "--port", "0"]
        log = directory / "controller.log"
        controller = children.start(
            "controller", ["controller", "INFER5", *arguments, *common], log
        )
        self.address = f"127.0.0.1:{children.wait_ready(controller, within_s=30)}"
        self.log = directory / "worker.log"
        # In the file, relative to it.
        (directory / "worker.toml").write_text('device = "cpu"\nrepository = "models"\n')
        arguments = [
            "worker",
            "--config",
            str(directory / "worker.toml"),
            "--controller",
            self.address,
        ]
        worker = children.start("worker", [*arguments, *common], self.log)
        children.wait_ready(worker, within_s=60)
        soon(lambda: "double:1" in self.loadable(), "the worker did not register")

    def ask(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [*SLOSCHED, "client", self.address, *arguments, "--json"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def loadable(self) -> list[str]:
        names: list[str] = self.ask("models")["loadable"]
        return names

    def watcher(self) -> int:
        """The pid of the process that looks at the repository."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            words = path.read_bytes().split(b"\0") if path.exists() else []
            if (
                b"slosched.daemon.repository.watcher" in words
                and str(self.repository.path).encode() in words
            ):
                return int(path.parent.name)
        return 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Children(stop_within_s=5.0) as children:
        made = Cluster(children, tmp_path_factory.mktemp("repository"))
        yield made
    soon(lambda: not made.watcher(), "the worker's process that looks did not end with it")


def test_versions_are_served_come_and_go(cluster: Cluster) -> None:
    with Client(cluster.address) as client:
        [double], [triple] = client.load("double"), client.load("triple:1")
        assert (double.name, triple.name) == ("double:1", "triple:1")
        for model, factor in ((double, 2), (triple, 3)):
            assert times(client, model, factor)
        pid = cluster.watcher()
        os.kill(pid, signal.SIGKILL)  # another one is started
        cluster.repository.scaled("double/2", 20.0)
        soon(lambda: "double:2" in cluster.loadable(), "the new version was not noticed")
        assert cluster.watcher() not in (0, pid)
        [newer] = client.load("double")
        assert newer.name == "double:2"
        assert times(client, newer, 20)
        assert times(client, double, 2)
        cluster.repository.remove("double/2")
        soon(lambda: "double:2" not in cluster.loadable(), "its end was not noticed")
        assert times(client, newer, 20)
        assert client.load("double")[0].name == "double:1"


def test_what_is_left_out_is_shown_and_said(cluster: Cluster) -> None:
    [worker] = cluster.ask("status")["workers"]
    assert "not a TOML file" in worker["left_out"]["broken:1"]
    assert "absolute path" in worker["left_out"]["out/1"]
    assert "repository: broken:1 is left out: model.toml is not" in cluster.log.read_text()
    with Client(cluster.address) as client, pytest.raises(RequestFailed, match="not a TOML file"):
        client.load("broken")


def test_a_worker_without_such_a_folder_does_not_start(tmp_path: Path) -> None:
    arguments = ["worker", "--device", "cpu", "--port", "0", "--repository", str(tmp_path / "x")]
    done = subprocess.run([*SLOSCHED, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == InvalidConfig.exit_code and "no such folder" in done.stderr


def test_a_watch_ends_its_process_and_is_bounded(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.scaled("net/1", 1.0)
    said: list[str] = []
    watch = RepositoryWatch(str(repository.path), said.append)
    try:
        first = watch.first(30 * NS_PER_S)
        assert isinstance(first, Listing)
        pid = watch.pid
        assert pid and not said
    finally:
        watch.close()
        watch.close()
    assert not Path(f"/proc/{pid}").exists() and watch.pid == 0
