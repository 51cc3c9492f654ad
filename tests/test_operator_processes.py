"""The operator's view of real processes: /metrics beside the logs, `status --watch` in pipe and terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slosched.experiment.children import Child, Children
from slosched.telemetry.action_log import read_action_log
from slosched.telemetry.request_log import read_request_log

# Real processes, but nothing here depends on how fast they are: other tests beside these do no harm.

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

SLOSCHED = (sys.executable, "-m", "slosched")


class Operated:
    """A controller over two emulated workers of one GPU each, all on loopback."""

    def __init__(self, children: Children, directory: Path) -> None:
        self.children, self.directory = children, directory
        self.workers = [self._worker(place, 0) for place in range(2)]
        self.worker_ports = [children.wait_ready(w, within_s=30) for w in self.workers]
        self.lives = 0
        self.port = 0
        self.begin()

    def _worker(self, place: int, port: int) -> Child:
        arguments = ["worker", "--device", "emulated", "--gpus", "1", "--bind", "127.0.0.1"]
        log = self.directory / f"worker{place}-{time.monotonic_ns()}.log"
        return self.children.start(f"worker {place}", [*arguments, "--port", str(port)], log)

    def begin(self) -> None:
        """Start the controller; a second life listens where the first did."""
        self.lives += 1
        self.logs = self.directory / f"run{self.lives}"
        self.controller = self.children.start(
            "controller",
            [
                "controller",
                "INFER5",
                "--workers",
                ",".join(f"127.0.0.1:{p}" for p in self.worker_ports),
                "--bind",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--log-dir",
                str(self.logs),
            ],
            self.directory / f"controller{self.lives}.log",
        )
        self.port = self.children.wait_ready(self.controller, within_s=30)
        self.address = f"127.0.0.1:{self.port}"
        self.http = self.controller.log.read_text().split("http://")[1].split(";")[0].strip()

    def end(self, child: Child, number: int = signal.SIGTERM) -> None:
        os.kill(child.process.pid, number)
        child.process.wait(15)
        self.children.forget(child)

    def load(self, name: str, seconds: int) -> Child:
        """A client process that sends for `seconds`: some of it tight, so that some is refused."""
        return self.children.start(
            name,
            [
                "client",
                self.address,
                "slo-exp-1",
                "resnet50_v2",
                "2",
                "poisson",
                "150",
                "1.3",
                "25",
                "16",
                "mul",
                str(seconds),
                "--no-inputs",
                "--out",
                str(self.directory / name),
            ],
            self.directory / f"{name}.log",
        )

    def scrape(self) -> Samples:
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=5) as answer:
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            text = answer.read().decode()
        return {
            (s.name, frozenset(s.labels.items())): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }


@pytest.fixture
def operated(tmp_path: Path) -> Iterator[Operated]:
    with Children() as children:
        yield Operated(children, tmp_path)


def eventually(true: Callable[[], bool], *, within_s: float, what: str) -> None:
    ends = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < ends, f"{what}: not within {within_s} s"
        time.sleep(0.05)


def test_the_counters_are_those_of_the_logs_with_two_workers_and_two_clients(
    operated: Operated,
) -> None:
    loads = [operated.load(f"client{n}", 1) for n in range(2)]
    for load in loads:
        assert load.process.wait(60) in (0, 1), load.last_line()
        operated.children.forget(load)
    before = operated.scrape()
    # A worker dies and comes back; what it did stays counted, and it is used again.
    operated.end(operated.workers[1], signal.SIGKILL)
    eventually(
        lambda: operated.scrape()["slosched_worker_up", frozenset({("worker", "1")})] == 0,
        within_s=10,
        what="the loss is seen",
    )
    away = operated.scrape()
    operated.workers[1] = operated._worker(1, operated.worker_ports[1])
    operated.children.wait_ready(operated.workers[1], within_s=30)
    eventually(
        lambda: operated.scrape()["slosched_worker_up", frozenset({("worker", "1")})] == 1,
        within_s=10,
        what="it is back",
    )
    again = operated.load("client2", 1)
    assert again.process.wait(60) in (0, 1), again.last_line()
    operated.children.forget(again)
    eventually(
        lambda: operated.scrape()["slosched_requests_in_flight", frozenset()] == 0,
        within_s=10,
        what="everything is answered",
    )
    samples = operated.scrape()
    for earlier, later in ((before, away), (away, samples)):
        for key, count in earlier.items():
            if key[0].endswith(("_total", "_count", "_bucket")) and "cpu" not in key[0]:
                assert later[key] >= count, key
    operated.end(operated.controller)
    _requests_are_those_of_the_log(samples, operated.logs)
    _actions_are_those_of_the_log(samples, operated.logs)


def _requests_are_those_of_the_log(samples: Samples, logs: Path) -> None:
    def one(name: str, **labels: str) -> float:
        return samples[f"slosched_{name}", frozenset(labels.items())]

    rows = read_request_log(logs / "clockwork_request_log.tsv")
    served = rows["result"] == 0
    assert len(served) > 300 and served.any() and not served.all()
    assert one("requests_offered_total") == len(served)
    answered = {
        key: n for key, n in samples.items() if key[0] == "slosched_requests_answered_total"
    }
    assert sum(answered.values()) == len(served)
    assert one("requests_answered_total", code="ok") == served.sum()
    refused = (rows["result"] == 8).sum()
    assert one("requests_rejected_total", reason="could_not_start_in_time") == refused
    assert one("requests_in_time_total") == rows["deadline_met"].sum() > 0
    assert one("request_latency_seconds_count", outcome="served") == served.sum()
    assert one("request_latency_seconds_sum", outcome="served") == pytest.approx(
        rows["latency"][served].sum() / 1e9
    )
    by_model = [
        n for key, n in samples.items() if key[0] == "slosched_model_requests_answered_total"
    ]
    assert by_model == [len(served)]  # two instances of one architecture


def _actions_are_those_of_the_log(samples: Samples, logs: Path) -> None:
    def one(name: str, **labels: str) -> float:
        return samples[f"slosched_{name}", frozenset(labels.items())]

    actions = read_action_log(logs / "clockwork_action_log.tsv")
    infers = (actions["action_type"] == 2) & (actions["status"] == 0)
    for worker in (0, 1):
        own = infers & (actions["worker_id"] == worker)
        gpu = {"worker": str(worker), "gpu": "0"}
        assert one("gpu_inferences_total", **gpu) == own.sum() > 0
        assert one("gpu_requests_total", **gpu) == actions["batch_size"][own].sum()
        busy_s = actions["worker_exec_duration"][own].sum() / 1e9
        assert one("gpu_busy_seconds_total", **gpu) == pytest.approx(busy_s)
    assert one("batch_size_requests_count") == infers.sum()
    loads_done = (actions["action_type"] == 1) & (actions["status"] == 0)
    counted = (n for key, n in samples.items() if key[0] == "slosched_gpu_loads_total")
    assert sum(counted) == loads_done.sum() > 0


def test_watch_in_a_pipe_outlives_the_controller_and_ends_with_0(operated: Operated) -> None:
    watch = subprocess.Popen(
        [*SLOSCHED, "status", operated.address, "--watch", "--interval", "0.25", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None

    def until(true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        assert watch.stdout is not None
        for _ in range(200):
            line: dict[str, Any] = json.loads(watch.stdout.readline())
            if true(line):
                return line
        raise AssertionError("200 lines without what is waited for")

    try:
        first = until(lambda line: True)
        assert first["rates"] is None and first["report"]["models"] == []
        load = operated.load("client0", 3)
        # A look may fall between an inference and its answers, so each is waited for by itself.
        until(lambda line: bool(line["rates"]) and (line["rates"]["in_time_per_s"] or 0) > 0)
        until(lambda line: max(g["utilisation"] for g in line["rates"]["gpus"]) > 0)
        until(lambda line: (line["rates"]["latency_p99_ns"] or 0) > 0)
        load.process.wait(60)
        operated.children.forget(load)
        operated.end(operated.controller)
        silent = until(lambda line: line["no_answer_since_ns"] is not None)
        assert silent["why"] and silent["report"] is None
        operated.begin()
        back = until(lambda line: line["report"] is not None)
        assert back["rates"] is None  # another life: there is nothing to compare with
        assert back["report"]["requests"]["arrived"] == 0
        watch.send_signal(signal.SIGINT)
        rest, errors = watch.communicate(timeout=10)
        assert watch.returncode == 0 and errors == ""
        assert all(json.loads(line) for line in rest.splitlines())
    finally:
        watch.kill()
        watch.communicate()


def test_watch_in_a_terminal_uses_its_other_screen_and_gives_it_back(operated: Operated) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    watch = subprocess.Popen(
        [*SLOSCHED, "status", operated.address, "--watch", "--interval", "200ms"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""

    def read_for(seconds: float, until: bytes) -> None:
        nonlocal shown
        ends = time.monotonic() + seconds
        while until not in shown and time.monotonic() < ends:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other end was closed
                    return

    try:
        read_for(20, b"GPUs busy")
        assert b"\x1b[?1049h" in shown and b"2 of 2 workers joined" in shown
        assert "░░░".encode() in shown
        watch.send_signal(signal.SIGINT)
        read_for(10, b"\x1b[?1049l")
        assert watch.wait(10) == 0
        assert b"\x1b[?1049l" in shown  # the shell's own lines are back
    finally:
        watch.kill()
        watch.wait()
        os.close(ours)


def test_watch_of_nobody_says_so_at_once() -> None:
    command = [*SLOSCHED, "status", "127.0.0.1:1", "--watch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5 and "no controller answered at 127.0.0.1:1" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("interval", ["50ms", "soon", "-1s"])
def test_an_interval_that_cannot_be_is_refused(interval: str) -> None:
    command = [*SLOSCHED, "status", "--watch", f"--interval={interval}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--interval" in done.stderr
