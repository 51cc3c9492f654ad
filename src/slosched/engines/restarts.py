"""Starts the workers of an engine again when they end, as a service manager would.

A worker is started at the address that it had, so that the controller finds it there by itself. What it ran
when it ended is answered with a code, and while no worker is there calls are refused. A controller that ends
takes what it knew of calls and clients with it: that is the end of the engine.
"""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slosched.clock import now_ns
from slosched.experiment.children import Child, ChildFailed, Children
from slosched.units import NS_PER_S

#: A worker that ends more often than that in that time will not do better the next time.
_MOST_STARTS = 5
_WITHIN_NS = 60 * NS_PER_S
_LOOK_S = 0.1
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Start:
    """How a worker is started: its name, the words of its command, the folder of its logs, its environment."""

    name: str
    words: Sequence[str]
    folder: Path
    env: Mapping[str, str] | None


class Restarts:
    """Looks after the `workers`, started by `starts` in the same order, and the `controller`, in a thread.

    `broken` is set, and then called for, when the engine cannot go on: its words say why. `ended` has a
    ChildFailed for each process that ended so far. `close` must come before `children` are ended.
    """

    def __init__(
        self,
        children: Children,
        starts: Sequence[Start],
        workers: Sequence[Child],
        controller: Child,
        *,
        when_broken: Callable[[], None],
    ) -> None:
        self._children, self._starts = children, starts
        self.workers, self.controller = [*workers], controller
        self._when_broken = when_broken
        self._ends: list[deque[int]] = [deque() for _ in workers]
        self._counts = [0] * len(workers)
        self.ended: list[ChildFailed] = []
        self.broken: ChildFailed | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slosched engine", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ChildFailed if a process has ended, also if another was started in its place."""
        if self.ended:
            raise self.ended[0]
        for child in (*self.workers, self.controller):
            if child.process.poll() is not None:
                raise _ended(child)

    def check_unbroken(self, within_s: float = 0.0) -> None:
        """Raise ChildFailed if the engine cannot go on, or its controller ends `within_s`."""
        if self.broken is None:
            with suppress(subprocess.TimeoutExpired):
                self.controller.process.wait(within_s)
                self._break(_ended(self.controller))
        if self.broken is not None:
            raise self.broken

    def close(self) -> None:
        """Start nothing any more."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            for place, worker in enumerate(self.workers):
                if worker.process.poll() is not None:
                    self._again(place, worker)
            if self.controller.process.poll() is not None:
                self.ended.append(_ended(self.controller))
                self._break(self.ended[-1])
            if self.broken is not None:
                self._when_broken()
                return

    def _again(self, place: int, worker: Child) -> None:
        """The worker has ended: start another one in its place."""
        error, now = _ended(worker), now_ns()
        self.ended.append(error)
        ends, start = self._ends[place], self._starts[place]
        ends.append(now)
        while ends[0] < now - _WITHIN_NS:
            ends.popleft()
        if len(ends) > _MOST_STARTS:
            self._break(
                ChildFailed(
                    f"{error}; it ended {len(ends)} times within a minute", worker, error.code
                )
            )
            return
        self._counts[place] += 1
        log = start.folder / f"{start.name.replace(' ', '-')}-again-{self._counts[place]}.log"
        try:
            again = self._children.start(start.name, start.words, log, env=start.env)
        except OSError as problem:
            self._break(ChildFailed(f"{error}; another cannot be started: {problem}", worker))
            return
        self.workers[place] = again
        self._children.forget(worker)

    def _break(self, error: ChildFailed) -> None:
        if self.broken is None:
            self.broken = error


def _ended(child: Child) -> ChildFailed:
    code = child.process.returncode
    return ChildFailed(
        f"the {child.name} of the engine ended with exit code {code}: {child.last_line()}",
        child,
        code,
    )
