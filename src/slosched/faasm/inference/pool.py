"""A process per instance: the native baseline, whose instances share nothing and take one request at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from slosched.errors import SloschedError
from slosched.faasm.inference import wire
from slosched.faasm.inference.choices import WARM
from slosched.faasm.inference.plan import Plan
from slosched.faasm.inference.process import InstanceFailed, InstanceProcess
from slosched.faasm.inference.requests import Done, Request, ended, ok

_END_WITHIN_S = 90.0
_Waiting = tuple[Request, Done, threading.Event]


class Pool:
    """`instances` processes, which take requests from one queue. A request of rung L4 is answered by a process
    that is started for it, in the place of the one that takes it, which ends before.

    Raises InstanceFailed if they do not start.
    """

    def __init__(self, name: str, about: str, plan: Plan, instances: int) -> None:
        self.name, self.about, self._plan = name, about, plan
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closing = False
        self._lock = threading.Lock()
        self._processes: dict[int, InstanceProcess] = {}
        self._threads: list[threading.Thread] = []
        try:
            for place in range(instances):
                self._processes[place] = InstanceProcess(plan)
            for process in self._processes.values():
                process.ready()
        except BaseException:
            self.close()
            raise
        for place in range(instances):
            thread = threading.Thread(
                target=self._run, args=(place,), name=f"slosched instance {place}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    @property
    def pids(self) -> list[int]:
        """The processes that there are."""
        with self._lock:
            return [each.pid for each in self._processes.values()]

    def lacks(self, rung: str) -> str:
        return ""

    def submit(self, request: Request, done: Done) -> Callable[[], None]:
        given_up = threading.Event()
        self._waiting.put((request, done, given_up))
        return given_up.set

    # ------------------------------------------------------------------------------ one instance

    def _run(self, place: int) -> None:
        while (each := self._waiting.get()) is not None:
            request, done, given_up = each
            if given_up.is_set() or self._closing:
                done(ended("timeout", "it was given up before it began"))
                continue
            try:
                answer = self._answered(place, request)
            except (SloschedError, OSError) as error:
                done(ended("failed", str(error)))
                with suppress(SloschedError, OSError):
                    self._restart(place)
            else:
                done(ok(answer.answer))

    def _answered(self, place: int, request: Request) -> wire.Answered:
        rung = request.rung
        if rung == "L4":
            self._restart(place)
            rung = WARM
        rows, columns, channels = request.image.shape
        order = wire.Answering(
            request.image.tobytes(), (rows, columns, channels), rung, request.pause_ns
        )
        return self._processes[place].ask(order, wire.Answered)

    def _restart(self, place: int) -> None:
        """End the process of a place, and start another. Raises InstanceFailed when the pool is closed."""
        self._processes[place].close()
        with self._lock:
            if self._closing:
                raise InstanceFailed("the pool is closed")
            self._processes[place] = InstanceProcess(self._plan)
        self._processes[place].ready()

    # ------------------------------------------------------------------------------------- ends

    def close(self) -> None:
        """End all processes. What runs fails. Idempotent."""
        with self._lock:
            self._closing = True
            for process in self._processes.values():
                process.interrupt()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(_END_WITHIN_S)
        self._threads.clear()
        for process in self._processes.values():
            process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
