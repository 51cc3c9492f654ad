"""Calls of functions from a client to a process and back: real controller, worker and kills."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import live_functions
from function_rig import alive, children_of
from slosched import CallFailed, Client
from slosched.codes import Code
from slosched.experiment.children import Child, Children
from survivors import marked

pytestmark = [pytest.mark.processes, pytest.mark.quiet]

TESTS = Path(__file__).parent
FUNCTIONS = live_functions.__all__
LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
DIED = (Code.PROCESS_ENDED, Code.MODEL_PROCESS_ENDED)


class Cluster:
    """A controller and workers that offer tests/live_functions.py, on loopback."""

    def __init__(self, children: Children, folder: Path, slots: Sequence[int]) -> None:
        self.children, self.folder = children, folder
        self.workers = [self.start_worker(place, each) for place, each in enumerate(slots)]
        ports = [children.wait_ready(each, within_s=60) for each in self.workers]
        self.controller = children.start(
            "controller",
            [
                "controller",
                "INFER5",
                "--workers",
                ",".join(f"127.0.0.1:{port}" for port in ports),
                "--log-dir",
                str(folder / "run"),
                *LOOPBACK,
            ],
            folder / "controller.log",
        )
        self.address = f"127.0.0.1:{children.wait_ready(self.controller, within_s=30)}"
        with Client(self.address) as client:
            for name in FUNCTIONS:
                client.load(name)

    def start_worker(self, place: int, slots: int, port: str = "0") -> Child:
        words = [
            "worker",
            "--device",
            "none",
            "--functions",
            "live_functions",
            "--slots",
            str(slots),
        ]
        arguments = [*words, "--bind", "127.0.0.1", "--port", port]
        return self.children.start(f"w{place}", arguments, self.folder / f"w{place}.log")

    def call_processes(self, worker: Child) -> list[int]:
        """The processes of calls: those forked from templates, which the root is the parent of."""
        found = []
        for root in direct_children(worker.process.pid):
            for template in direct_children(root):
                found += direct_children(template)
        return found


def direct_children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@contextmanager
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch, *slots: int) -> Iterator[Cluster]:
    with marked() as mark, Children() as children:
        for name, value in {**mark.variables, "PYTHONPATH": str(TESTS)}.items():
            monkeypatch.setenv(name, value)
        yield Cluster(children, folder, slots)
        children.stop()
        mark.assert_none(within_s=10)


def settled(futures: Sequence[Future[Any]], within_s: float = 60) -> list[object]:
    """What became of each: its value, or the error."""
    _, late = wait(futures, within_s)
    assert not late, f"{len(late)} of {len(futures)} calls are unanswered"
    return [each.exception() or each.result() for each in futures]


@pytest.mark.parametrize("slots", [1, 2])
def test_1_8_64_nested_calls_end_with_few_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    with cluster(tmp_path, monkeypatch, slots) as it, Client(it.address) as client:
        assert client.call("tree", 2, 8, slo="60s", timeout_s=60) == 64
        futures = [client.start_call("tree", 2, 3, slo="60s", timeout_s=60) for _ in range(8)]
        assert settled(futures) == [9] * 8


def test_a_tree_of_4000_calls_ends_on_a_worker_with_256_unfinished_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(tmp_path, monkeypatch, 2) as it, Client(it.address) as client:
        assert client.call("tree", 2, 63, slo="300s", timeout_s=120) == 63 * 63


def test_what_a_child_does_costs_its_parent_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(tmp_path, monkeypatch, 1) as it, Client(it.address) as client:

        def call(name: str, *args: Any) -> Any:
            return client.call(name, *args, slo="20s", timeout_s=20)

        assert call("echo", {"a": (1, b"2")}) == {"a": (1, b"2")}
        code, reason = call("catches", "raises", "boo")
        assert code == Code.CALL_RAISED
        assert "ValueError: boo" in reason
        code, reason = call("catches", "leaves")
        assert code in DIED
        assert "exit code 7" in reason
        code, reason = call("catches", "no_such_function")
        assert code
        assert "no_such_function" in reason
        with pytest.raises(CallFailed, match="ValueError: boo") as caught:
            call("passes_on", "raises", "boo")
        assert caught.value.code == Code.CALL_RAISED
        with pytest.raises(CallFailed) as caught:
            call("sleeps", 60)
        assert caught.value.code == Code.CALL_OVER_LIMIT
        assert call("takes_back") == "cancelled"
        assert call("echo", 1) == 1


def test_slots_that_are_killed_at_random_leave_no_call_unanswered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of calls end by kill -9 all the time: each call has one answer, a value or an error."""
    with cluster(tmp_path, monkeypatch, 2, 1) as it, Client(it.address) as client:
        assert client.call("tree", 1, 2, slo="60s", timeout_s=60) == 2
        over = threading.Event()
        killed = []

        def kill() -> None:
            draw = random.Random(5)
            while not over.wait(draw.uniform(0.005, 0.05)):
                pids = it.call_processes(draw.choice(it.workers))
                if pids:
                    pid = draw.choice(pids)
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    killed.append(pid)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            futures = []
            for place in range(60):
                futures.append(client.start_call("tree", 2, 3, slo="60s", timeout_s=60))
                futures.append(client.start_call("echo", place, slo="60s", timeout_s=60))
            outcomes = settled(futures, within_s=90)
        finally:
            over.set()
            thread.join()
        assert killed
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, CallFailed):
                assert outcome.code in (*DIED, Code.CALL_RAISED), outcome
            else:
                assert outcome == (place // 2 if place % 2 else 9)
        # It serves as before: functions whose template was hit are loaded again.
        give_up = time.monotonic() + 30
        while True:
            try:
                assert client.call("tree", 2, 4, slo="30s", timeout_s=30) == 16
                break
            except CallFailed:
                assert time.monotonic() < give_up


def test_a_worker_that_is_killed_takes_its_processes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(tmp_path, monkeypatch, 1, 1) as it, Client(it.address) as client:
        assert client.call("tree", 1, 4, slo="60s", timeout_s=60) == 4
        futures = [client.start_call("tree", 2, 3, slo="60s", timeout_s=60) for _ in range(6)]
        victim = it.workers[0].process
        below = children_of(victim.pid)
        assert below
        os.kill(victim.pid, signal.SIGKILL)
        for outcome in settled(futures, within_s=90):
            assert outcome == 9 or (isinstance(outcome, CallFailed) and outcome.code)
        give_up = time.monotonic() + 10
        while any(map(alive, below)):
            assert time.monotonic() < give_up, [pid for pid in below if alive(pid)]
            time.sleep(0.02)
        assert client.call("echo", 1, slo="30s", timeout_s=30) == 1


def test_a_worker_keeps_no_descriptor_of_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(tmp_path, monkeypatch, 2) as it, Client(it.address) as client:
        pids = [it.workers[0].process.pid, *direct_children(it.workers[0].process.pid)]

        def calls(number: int) -> None:
            for place in range(number):
                data = bytes(100_000 * (place % 3))
                assert client.call("echo", data, slo="30s", timeout_s=30) == data
                with pytest.raises(CallFailed):
                    client.call("leaves", slo="30s", timeout_s=30)
            assert client.call("tree", 1, 2, slo="30s", timeout_s=30) == 2

        def settle() -> list[int]:
            """The number of files of the worker and its root, once it is the same twice."""
            give_up, last = time.monotonic() + 10, [-1]
            while True:
                files = [len([*Path(f"/proc/{pid}/fd").iterdir()]) for pid in pids]
                if files == last:
                    return files
                assert time.monotonic() < give_up
                last = files
                time.sleep(0.3)

        calls(20)
        before = settle()
        calls(60)
        after = settle()
        assert all(now <= then + 4 for now, then in zip(after, before, strict=True)), (
            before,
            after,
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_is_told_to_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with cluster(tmp_path, monkeypatch, 2) as it, Client(it.address) as client:
        assert client.call("tree", 1, 4, slo="60s", timeout_s=60) == 4
        future = client.start_call("naps", 30, slo="60s", timeout_s=60)
        worker = it.workers[0].process
        time.sleep(0.1)  # it may run by now: it is ended either way
        below = children_of(worker.pid)
        worker.send_signal(number)
        assert worker.wait(15) == 0
        assert not [pid for pid in below if alive(pid)]
        [outcome] = settled([future])
        assert isinstance(outcome, CallFailed)
        assert "shutting down" in outcome.reason
