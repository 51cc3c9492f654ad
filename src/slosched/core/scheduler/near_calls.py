"""Calls that should run near something: a sibling, or the last call with the same key.

That is soft. Such a call is sent to the worker where the other one went while a slot of it is free, or opens
within the time of one exchange with that worker, which is the least that fetching something from there takes. A
slot that opens takes a waiting call that is near its worker before others that are due about as soon. It
never waits longer than that, and never for a worker that cannot run it in time.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Gpu, Queue, Request, RequestState

#: Calls that are looked at for one slot, and entries of which some may be stale.
_LOOKED_AT, _CLEARED_FROM = 16, 4096


class NearCalls:
    """Those that wait in the policy's queues. `take` takes one of them out of its queue."""

    def __init__(self, cluster: Cluster, take: Callable[[Request], None]) -> None:
        self._cluster, self._take = cluster, take
        self._fresh: list[Request] = []
        self._waiting: dict[int, dict[int, Request]] = {}  # by worker id and request key
        self._count = 0  # entries there; what has left its queue is taken out when it is met

    def __bool__(self) -> bool:
        return bool(self._fresh or self._waiting)

    def queued(self, request: Request) -> None:
        """`request`, a call, has entered its queue; what need not be near something is ignored."""
        if request.call is not None and request.call.choosy:
            self._fresh.append(request)

    def plan(self, now_ns: int) -> None:
        """Send what came to the worker that it should be near, if that has room about now."""
        fresh, self._fresh = self._fresh, []
        for request in fresh:
            worker_id = self._cluster.near.worker_of(request)
            if request.state is not RequestState.QUEUED or worker_id < 0:
                continue
            gpu = self._device(request, worker_id)
            if gpu is None or not self._send_soon(gpu, request, now_ns):
                self._waiting.setdefault(worker_id, {})[request.key] = request
                self._count += 1
        if self._count > _CLEARED_FROM:
            self._clear()

    def send_instead(
        self, gpu: Gpu, choice: tuple[Queue, int, int, int] | None, start_ns: int, now_ns: int
    ) -> bool:
        """Send a call that should be near `gpu` there, unless the policy's `choice` is more urgent."""
        calls = self._waiting.get(gpu.worker.worker_id)
        if not calls:
            return False
        most_ns = None
        if choice is not None:
            most_ns = choice[0].requests[choice[1]].due_ns + self._exchange_ns(gpu)
        for request in list(calls.values())[:_LOOKED_AT]:
            if request.state is not RequestState.QUEUED:
                self._drop(gpu.worker.worker_id, request)
                continue
            soon = most_ns is None or request.due_ns <= most_ns
            here = gpu.index in request.instance.resident_on
            if soon and here and self._send(gpu, request, start_ns, now_ns):
                self._drop(gpu.worker.worker_id, request)
                return True
        return False

    def _device(self, request: Request, worker_id: int) -> Gpu | None:
        holders = request.instance.resident_on.values()
        return next((gpu for gpu in holders if gpu.worker.worker_id == worker_id), None)

    def _exchange_ns(self, gpu: Gpu) -> int:
        return gpu.worker.transit.expected_ns + gpu.worker.returns.expected_ns

    def _send_soon(self, gpu: Gpu, request: Request, now_ns: int) -> bool:
        lane = gpu.exec
        if len(lane.outstanding) >= lane.most or gpu.held or gpu.runs_alone:
            return False
        start_ns = self._cluster.earliest_start_ns(gpu, now_ns)
        if start_ns > now_ns + gpu.worker.transit.margin_ns + self._exchange_ns(gpu):
            return False
        return self._cluster.reports(gpu, now_ns) and self._send(gpu, request, start_ns, now_ns)

    def _send(self, gpu: Gpu, request: Request, start_ns: int, now_ns: int) -> bool:
        """False if it could not be in time there."""
        expected_ns = gpu.tables[request.queue.program].single.expected_ns
        latest_ns = request.deadline_ns - expected_ns - gpu.worker.returns.expected_ns
        if start_ns > latest_ns:
            return False
        self._take(request)
        self._cluster.send_infer(
            gpu,
            (request,),
            1,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=expected_ns,
            latest_ns=latest_ns,
        )
        return True

    def _drop(self, worker_id: int, request: Request) -> None:
        calls = self._waiting[worker_id]
        del calls[request.key]
        self._count -= 1
        if not calls:
            del self._waiting[worker_id]

    def _clear(self) -> None:
        for worker_id, calls in list(self._waiting.items()):
            for request in list(calls.values()):
                if request.state is not RequestState.QUEUED:
                    self._drop(worker_id, request)
