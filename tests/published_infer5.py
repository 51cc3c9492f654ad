"""INFER5 as published, written a second time: small, slow, and sharing no line with the product.

A discrete-event model of the reference code's queues, strategies and executor tracker (OSDI'20 §5.3) for
one setting: equal GPUs, one kind of model, all resident, one clock, execution times known exactly.
An Infer takes `before_ns` from its decision to the earliest start of its exec, and its end is known
`after_ns` later. Times are ns from the start of the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

MS = 1_000_000
OK, TIMED_OUT = 0, 4

Strategy = tuple[int, int, int]  # latest start of the queue's head, batch, model


@dataclass
class Setting:
    exec_ns: dict[int, int]  # batch -> time
    models: int
    gpus: int = 6
    ahead_ns: int = 5 * MS
    before_ns: int = 900_000
    after_ns: int = 250_000


@dataclass
class Executor:
    """A GPU: what it really does (`free_ns`), and what the controller thinks (the rest)."""

    free_ns: int = 0
    work_begin_ns: int = 0
    outstanding: deque[tuple[int, int]] = field(default_factory=deque)  # (action, duration)
    strategies: set[Strategy] = field(default_factory=set)
    active: dict[int, list[Strategy]] = field(default_factory=dict)  # model -> its strategies

    def available_ns(self, now_ns: int) -> int:
        begin_ns = self.work_begin_ns
        if self.outstanding and begin_ns + self.outstanding[0][1] + 10 * MS < now_ns:
            begin_ns = now_ns - 10 * MS - self.outstanding[0][1]
        return max(begin_ns + sum(ns for _, ns in self.outstanding), now_ns + MS)

    def finished(self, action: int, end_ns: int) -> None:
        head = self.outstanding[0]
        if head[0] == action:
            self.work_begin_ns = end_ns
            self.outstanding.popleft()
            return
        (other,) = (entry for entry in self.outstanding if entry[0] == action)
        self.outstanding.remove(other)
        self.work_begin_ns += other[1]


class PublishedInfer5:
    """`run` answers `arrivals` of (time, model, SLO), in time order."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._batches = sorted(setting.exec_ns)
        self._gpus = [Executor() for _ in range(setting.gpus)]
        # Every request stands in the queue of each batch size.
        self._queues: list[dict[int, deque[int]]] = [
            {batch: deque() for batch in self._batches} for _ in range(setting.models)
        ]
        self._internal_ns: list[int] = []
        self._locked: list[bool] = []
        self._events: list[tuple[int, int, str, int]] = []
        self._actions: list[tuple[Executor, int, list[int]]] = []
        self._visits = 0

    def run(self, arrivals: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Return (code, departure time) of each arrival."""
        answers: list[tuple[int, int]] = [(-1, -1)] * len(arrivals)
        floor_ns = self._setting.ahead_ns + 5 * MS
        for at_ns, _, slo_ns in arrivals:
            exec_slo_ns = slo_ns - 5 * MS if slo_ns >= 5 * MS else slo_ns
            self._internal_ns.append(at_ns + max(exec_slo_ns, floor_ns))
            self._locked.append(False)
        for number, (at_ns, _, _) in enumerate(arrivals):
            self._at(at_ns, "arrives", number)
        while self._events:
            now_ns = self._events[0][0]
            while self._events and self._events[0][0] == now_ns:
                _, _, what, number = heappop(self._events)
                if what == "arrives":
                    self._arrives(number, arrivals[number][1])
                elif what == "ends":
                    gpu, end_ns, requests = self._actions[number]
                    gpu.finished(number, end_ns)
                    for request in requests:
                        answers[request] = (OK, now_ns)
                elif what == "expires" and not self._locked[number]:
                    self._locked[number] = True
                    answers[number] = (TIMED_OUT, now_ns)
            idle_visits = 0
            while idle_visits < len(self._gpus):
                self._visits += 1
                sent = self._visit(self._gpus[self._visits % len(self._gpus)], now_ns)
                idle_visits = 0 if sent else idle_visits + 1
            self._wake_when_open(now_ns)
        return answers

    def _at(self, time_ns: int, what: str, number: int) -> None:
        heappush(self._events, (time_ns, len(self._events), what, number))

    def _wake_when_open(self, now_ns: int) -> None:
        """The published threads poll; here time alone opens a GPU at a time that can be computed."""
        for gpu in self._gpus:
            if gpu.strategies:
                opens_ns = gpu.available_ns(now_ns) - self._setting.ahead_ns + 1
                if opens_ns > now_ns:
                    self._at(opens_ns, "opens", 0)

    def _arrives(self, request: int, model: int) -> None:
        self._at(self._internal_ns[request], "expires", request)
        for queue in self._queues[model].values():
            queue.append(request)
        for gpu in self._gpus:
            if model not in gpu.active:
                self._add_strategies(gpu, model)

    def _add_strategies(self, gpu: Executor, model: int, below: int = 2**30) -> None:
        for old in gpu.active.pop(model, ()):
            gpu.strategies.discard(old)
        found = []
        for batch, queue in self._queues[model].items():
            while queue and self._locked[queue[0]]:
                queue.popleft()
            if queue and batch < below:
                latest_ns = self._internal_ns[queue[0]] - self._setting.exec_ns[batch]
                found.append((latest_ns, batch, model))
        if found:
            gpu.active[model] = found
            gpu.strategies.update(found)

    def _visit(self, gpu: Executor, now_ns: int) -> bool:
        while gpu.strategies:
            start_ns = gpu.available_ns(now_ns)
            if start_ns >= now_ns + self._setting.ahead_ns:
                return False
            _, batch, model = min(gpu.strategies)
            choice = self._dequeue(model, start_ns, batch)
            if choice is not None:
                self._send(gpu, choice, now_ns)
                self._add_strategies(gpu, model)
                return True
            self._add_strategies(gpu, model, below=batch)
        return False

    def _dequeue(self, model: int, start_ns: int, least: int) -> list[int] | None:
        queues, exec_ns = self._queues[model], self._setting.exec_ns
        for batch, queue in queues.items():
            while queue and (
                self._locked[queue[0]] or self._internal_ns[queue[0]] < start_ns + exec_ns[batch]
            ):
                queue.popleft()
        best = self._batches[0]
        for batch in self._batches[1:]:
            if len(queues[batch]) < batch:
                break
            best = batch
        if best < least or len(queues[best]) < best:
            return None
        taken = [queues[best].popleft() for _ in range(best)]
        for queue in queues.values():
            while queue and queue[0] <= taken[-1]:
                queue.popleft()
        return taken

    def _send(self, gpu: Executor, requests: list[int], now_ns: int) -> None:
        setting, action = self._setting, len(self._actions)
        duration_ns = setting.exec_ns[len(requests)]
        end_ns = max(gpu.free_ns, now_ns + setting.before_ns) + duration_ns
        gpu.free_ns = end_ns
        if not gpu.outstanding:
            gpu.work_begin_ns = now_ns
        gpu.outstanding.append((action, duration_ns))
        for request in requests:
            self._locked[request] = True
        self._actions.append((gpu, end_ns, requests))
        self._at(end_ns + setting.after_ns, "ends", action)
