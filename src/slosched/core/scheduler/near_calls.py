"""Calls in slots of hosts: which goes first, and those that should run near something.

That is a sibling, or the last call with the same key. It is soft. Such a call is sent to the worker where the
other one went while a slot of it is free, or opens within the time of one exchange with that worker: fetching
something from there takes as long, at the least. A slot that opens takes a waiting call that is near its worker
before others that are due about as soon. It never waits longer than that, and never for a worker that cannot
run it in time.

Deeper calls go first (chains.py), because each call that has begun keeps a process while it awaits. A call that
is near goes before deeper ones only on a host where few await: without that a graph of 585 calls had three to
four times as many processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from slosched.core.scheduler.batch_choice import Choice
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.host_parts import HostParts, has_host_part
from slosched.core.scheduler.queues import first_from
from slosched.core.scheduler.state import Gpu, Queue, Request, RequestState
from slosched.core.scheduler.trials import Trials
from slosched.core.scheduler.urgency import Urgency

#: Up to this loss rate, calls on hosts go by their due dates alone: of nested ones, the deeper first.
CALM = 0.05
#: Calls that await, for each slot of a host, up to which a call that is near goes before deeper ones.
_AWAIT_AT_MOST = 6
#: Calls, or queues, that are looked at for one slot, and entries of which some may be stale.
_LOOKED_AT, _CLEARED_FROM = 16, 4096


class NearCalls:
    """Those that wait in the policy's queues, which `urgency` knows.

    `commit` sends a batch of INFER5 to a device, from a time on: (device, `Choice`, time, now).
    """

    def __init__(
        self, cluster: Cluster, urgency: Urgency, commit: Callable[[Gpu, Choice, int, int], object]
    ) -> None:
        self._cluster, self._urgency, self._commit = cluster, urgency, commit
        self.trials = Trials(cluster, urgency, commit)
        self._host_parts = HostParts(cluster, commit)
        self._fresh: list[Request] = []
        self._waiting: dict[int, dict[int, Request]] = {}  # by worker id and request key
        self._count = 0  # entries there; what has left its queue is taken out when it is met

    def __bool__(self) -> bool:
        return bool(self._fresh or self._waiting or self._host_parts)

    def queued(self, request: Request) -> None:
        """`request`, a call, has entered its queue."""
        self._host_parts.queued(request)
        if request.call is not None and request.call.choosy:
            self._fresh.append(request)

    def plan(self, now_ns: int) -> None:
        """Send what came to the worker that it should be near, if that has room about now; and host parts."""
        if self._host_parts:
            self._host_parts.plan(now_ns)
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

    def instead_of(self, choice: Choice | None, gpu: Gpu, start_ns: int) -> Choice | None:
        """A call that should be near `gpu` and could be in time there, unless `choice` is more urgent.

        Instead of a call with a host part that finds no room, something that needs the lane at once.
        """
        if choice is not None and has_host_part(choice[0]) and self._host_parts.full(gpu):
            others = self._host_parts.others(self._urgency.waiting.values())
            choice, _ = first_due(gpu, others, start_ns)
        calls = self._waiting.get(gpu.worker.worker_id)
        if not calls:
            return choice
        most_ns, chosen = None, None
        if choice is not None:
            chosen = choice[0].requests[choice[1]]
            most_ns = chosen.due_ns + self._exchange_ns(gpu)
        for request in list(calls.values())[:_LOOKED_AT]:
            if request.state is not RequestState.QUEUED:
                self._drop(gpu.worker.worker_id, request)
                continue
            soon = most_ns is None or request.due_ns <= most_ns
            soon = soon and (chosen is None or not self._after(chosen, gpu, request))
            resident = gpu.index in request.instance.resident_on
            if soon and resident and start_ns <= self._latest_ns(gpu, request):
                return self._alone(request) or choice
        return choice

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
        if not self._cluster.reports(gpu, now_ns) or self._others_first(gpu, request):
            return False
        alone = self._alone(request)
        if alone is None or start_ns > self._latest_ns(gpu, request):
            return False
        self._commit(gpu, alone, start_ns, now_ns)
        return True

    def _alone(self, request: Request) -> Choice | None:
        """The batch of `request` alone. None: what is worth most in its queue goes first."""
        queue = request.queue
        if queue.queue_id in self._urgency.weighted:
            return None
        return queue, bisect_left(queue.requests, request), 1, 1

    def _latest_ns(self, gpu: Gpu, request: Request) -> int:
        """The latest start on `gpu` with which it would be in time."""
        expected_ns = gpu.tables[request.queue.program].single.expected_ns
        return request.deadline_ns - expected_ns - gpu.worker.returns.expected_ns

    def _others_first(self, gpu: Gpu, request: Request) -> bool:
        """Whether something waits that `gpu` could run, and that is due clearly sooner than `request`."""
        waiting = self._urgency.waiting
        if len(waiting) > _LOOKED_AT:
            return True  # each slot that opens decides
        before_ns = request.due_ns - self._exchange_ns(gpu)
        firsts = [q.requests[0] for q in waiting.values() if q.instance.model_id in gpu.resident]
        return any(each.due_ns < before_ns or self._after(each, gpu, request) for each in firsts)

    def _after(self, other: Request, gpu: Gpu, request: Request) -> bool:
        """Whether `request` must not go before `other`, a deeper call that is due first."""
        few = len(gpu.suspended) < _AWAIT_AT_MOST * gpu.exec.width
        return not few and _is_deeper(other, request)

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


def _is_deeper(other: Request, request: Request) -> bool:
    """Whether `other` is due before `request`, and is a call further down."""
    first, second = other.call, request.call
    if first is None or second is None or other.due_ns >= request.due_ns:
        return False
    return first.depth > second.depth


def first_due(gpu: Gpu, queues: Iterable[Queue], start_ns: int) -> tuple[Choice | None, bool]:
    """The call that is due first of those that could be in time on the host `gpu` from `start_ns` on.

    And whether some queue has only requests that are too old.
    """
    best: tuple[int, Queue, int] | None = None
    all_late = False
    floor_ns = start_ns + gpu.worker.returns.margin_ns
    for queue in queues:
        if queue.instance.model_id not in gpu.resident:
            continue
        requests = queue.requests
        needs_ns = floor_ns + gpu.tables[queue.program].single.expected_ns
        place = first_from(requests, needs_ns) if requests[0].due_ns < needs_ns else 0
        if place == len(requests):
            all_late = True
        elif best is None or requests[place].due_ns < best[0]:
            best = (requests[place].due_ns, queue, place)
    return (None if best is None else (best[1], best[2], 1, 1)), all_late
