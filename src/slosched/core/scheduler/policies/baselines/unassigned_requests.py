"""Requests of models that no GPU holds, for policies that assign each request to a GPU."""

from __future__ import annotations

from slosched.core.scheduler.slices import Slices
from slosched.core.scheduler.state import Queue, Request

#: What assigning a request to a GPU costs, or taking it back, in units of slices.py.
AN_ASSIGNMENT = 4


class UnassignedRequests:
    """Queued requests by queue, in the order in which they came."""

    __slots__ = ("_by_queue",)

    def __init__(self) -> None:
        self._by_queue: dict[int, dict[int, Request]] = {}  # queue id -> request key -> request

    def __bool__(self) -> bool:
        return bool(self._by_queue)

    def add(self, request: Request) -> None:
        self._by_queue.setdefault(request.queue.queue_id, {})[request.key] = request

    def discard(self, request: Request) -> None:
        """Take `request` out if it is here."""
        requests = self._by_queue.get(request.queue.queue_id)
        if requests is not None and requests.pop(request.key, None) is not None and not requests:
            del self._by_queue[request.queue.queue_id]

    def queues(self) -> list[Queue]:
        """The queues of these requests."""
        return [head.queue for head in self.oldest()]

    def head(self, queue: Queue) -> Request | None:
        """The first request of `queue`."""
        return next(iter(self._by_queue.get(queue.queue_id, {}).values()), None)

    def oldest(self) -> list[Request]:
        """The first request of each queue."""
        return [next(iter(requests.values())) for requests in self._by_queue.values()]

    def take_ready(self, slices: Slices) -> list[Request]:
        """Take out those whose model some GPU holds by now: as many as this step may assign."""
        ready: list[Request] = []
        for queue_id in [r.queue.queue_id for r in self.oldest() if r.instance.resident_on]:
            requests = self._by_queue[queue_id]
            while requests and slices.spend(AN_ASSIGNMENT):
                ready.append(requests.pop(next(iter(requests))))
            if not requests:
                del self._by_queue[queue_id]
        return ready
