"""kill -9 of processes that run calls, at random, while everything is called: what is answered, and how often.

Each call that can be told apart notes its begin in a file, with its process. That says which processes to kill,
and whether a body began twice.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_functions as called
import numpy as np
from bench_systems import OnEngine

from slosched.clock import monotonic_ns, sleep_ns
from slosched.codes import code_name
from slosched.engines import Handle
from slosched.functions.errors import CallFailed

Record = dict[str, Any]

#: An environment variable that all processes of one benchmark have.
MARK = "SLOSCHED_BENCHMARK"
_IN_FLIGHT = 48
#: After the last call was sent.
_ANSWERED_WITHIN_S = 30.0
_TAIL_BYTES = 4096
_KILL_EVERY_NS = (100_000_000, 400_000_000)
_NS_PER_S = 1_000_000_000


@dataclass
class Counts:
    """What became of the calls of a client."""

    sent: collections.Counter[str] = field(default_factory=collections.Counter)
    returned: int = 0
    wrong: int = 0
    failed: collections.Counter[str] = field(default_factory=collections.Counter)
    unanswered: int = 0

    def record(self) -> Record:
        return {
            "sent": dict(self.sent),
            "calls": sum(self.sent.values()),
            "returned": self.returned,
            "wrong": self.wrong,
            "failed": dict(self.failed),
            "unanswered": self.unanswered,
        }


class Killer(threading.Thread):
    """Ends processes that lately began a call, one at a time, until it is stopped."""

    def __init__(self, notes: Path, seed: int) -> None:
        super().__init__(name="killer", daemon=True)
        self._notes, self._random = notes, random.Random(seed)
        self._over = threading.Event()
        self.killed = 0

    def run(self) -> None:
        while not self._over.wait(self._random.randint(*_KILL_EVERY_NS) / _NS_PER_S):
            processes = [each for each in latest_processes(self._notes) if is_ours(each)]
            if processes:
                with suppress(ProcessLookupError):
                    os.kill(self._random.choice(processes), signal.SIGKILL)
                    self.killed += 1

    def stop(self) -> None:
        self._over.set()
        self.join(10.0)


def latest_processes(notes: Path) -> list[int]:
    """The processes of the last lines of the notes."""
    try:
        with notes.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[1:-1]
    except FileNotFoundError:
        return []
    return sorted({int(line.split()[1]) for line in lines[-40:]})


def is_ours(process: int) -> bool:
    """Whether it is another process with this benchmark's mark: process ids are used again."""
    if process == os.getpid():
        return False
    try:
        environ = Path(f"/proc/{process}/environ").read_bytes()
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    if b"multiprocessing.resource_tracker" in command:  # Python's own, which ends with its program
        return False
    return f"{MARK}={os.environ[MARK]}".encode() in environ.split(b"\0")


def left_over(within_ns: int = 5 * _NS_PER_S) -> int:
    """The number of other processes with the mark that are still there after that time."""
    until_ns = monotonic_ns() + within_ns
    while True:
        found = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
        left = sum(map(is_ours, found))
        if not left or monotonic_ns() > until_ns:
            return left
        sleep_ns(50_000_000)


@contextmanager
def marked() -> Iterator[None]:
    """Every process that is started inside has a mark of its own."""
    os.environ[MARK] = os.urandom(8).hex()
    try:
        yield
    finally:
        del os.environ[MARK]


class Load:
    """Calls of all kinds, a number of them in flight at a time."""

    def __init__(self, system: OnEngine, notes: Path, seed: int) -> None:
        self._system, self._notes = system, str(notes)
        self._random = random.Random(seed)
        self.counts = Counts()
        self._open: collections.deque[tuple[Handle, Callable[[Any], bool]]] = collections.deque()
        self._number = 0
        a, b = np.random.default_rng(seed).random((2, 64, 64))
        self._a, self._b, self._right = a, b, a @ b

    def run(self, duration_ns: int) -> None:
        """Send for that long, then wait for all answers."""
        end_ns = monotonic_ns() + duration_ns
        while monotonic_ns() < end_ns:
            while len(self._open) < _IN_FLIGHT:
                self._send()
            self._take(*self._open.popleft(), end_ns + round(_ANSWERED_WITHIN_S * _NS_PER_S))
        while self._open:
            self._take(*self._open.popleft(), end_ns + round(_ANSWERED_WITHIN_S * _NS_PER_S))

    def _send(self) -> None:
        self._number += 1
        token, call = f"t{self._number}", self._system.engine.call
        kind = self._random.choices(
            ["no-op", "leaf", "failing leaf", "parent", "chain", "tree", "graph"],
            [30, 30, 6, 20, 8, 5, 1],
        )[0]
        self.counts.sent[kind] += 1
        duration_ns = self._random.randint(100_000, 3_000_000)
        if kind == "no-op":
            asked = call(called.noop, 3), lambda value: value == 3
        elif kind in ("leaf", "failing leaf"):
            handle = call(called.noted, self._notes, token, duration_ns, kind != "leaf")
            asked = handle, lambda value: value == token
        elif kind == "parent":
            handle = call(called.noted_parent, self._notes, token, 10, duration_ns // 4)
            asked = handle, lambda value: sum(value) == 10 and value[1] >= 2
        elif kind == "chain":
            asked = call(called.in_turn, 5), lambda value: value == 5
        elif kind == "tree":
            asked = call(called.tree, 2, 8), lambda value: value == 73
        else:
            asked = call(called.product, self._a, self._b, 3), self._is_product
        self._open.append(asked)

    def _is_product(self, value: Any) -> bool:
        return bool(np.allclose(value, self._right))

    def _take(self, handle: Handle, right: Callable[[Any], bool], until_ns: int) -> None:
        left_s = (until_ns - monotonic_ns()) / _NS_PER_S
        try:
            value = handle.result(max(0.1, left_s))
        except CallFailed as error:
            self.counts.failed[code_name(error.code)] += 1
        except TimeoutError:
            self.counts.unanswered += 1
        else:
            self.counts.returned += 1
            self.counts.wrong += not right(value)


def begun_twice(notes: Path) -> tuple[int, int]:
    """The number of bodies that began, and of those that began more than once."""
    try:
        lines = notes.read_text().splitlines()
    except FileNotFoundError:
        return 0, 0
    begun = collections.Counter(line.split()[0] for line in lines)
    return len(begun), sum(times > 1 for times in begun.values())


def kills(system: OnEngine, duration_ns: int, seed: int) -> Record:
    """Load and kills together. The system was opened inside `marked`."""
    with tempfile.TemporaryDirectory(prefix="slosched-kills-") as folder:
        notes = Path(folder) / "begun"
        load, killer = Load(system, notes, seed), Killer(notes, seed)
        killer.start()
        begun_ns = monotonic_ns()
        try:
            load.run(duration_ns)
        finally:
            killer.stop()
        took_ns = monotonic_ns() - begun_ns
        bodies, twice = begun_twice(notes)
        after = system.engine.call(called.noop, 5)
        try:
            serves = after.result(_ANSWERED_WITHIN_S) == 5
        except (CallFailed, TimeoutError):
            serves = False
    return load.counts.record() | {
        "kills": killer.killed,
        "seconds": took_ns / _NS_PER_S,
        "bodies": bodies,
        "bodies_twice": twice,
        "serves_after": serves,
    }
