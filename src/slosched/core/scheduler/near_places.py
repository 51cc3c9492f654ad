"""Where calls went that others may want to be near."""

from __future__ import annotations

from slosched.call_messages import MOST_CHILDREN
from slosched.core.scheduler.state import Request

#: Keys that are remembered; of more, those that were used last.
MOST_KEYS = 20_000


class NearPlaces:
    """The worker that the last call near each key was sent to."""

    def __init__(self) -> None:
        self._workers: dict[str, int] = {}  # by key, in the order of use

    def sent(self, request: Request, worker_id: int) -> None:
        """`request`, a call, was sent to the worker."""
        call = request.call
        assert call is not None
        if call.near:
            self._workers.pop(call.near, None)
            self._workers[call.near] = worker_id
            if len(self._workers) > MOST_KEYS:
                del self._workers[next(iter(self._workers))]
        parent = request.parent
        if parent is not None and parent.call is not None:
            places = parent.call.places
            places[call.child] = worker_id
            if len(places) > MOST_CHILDREN:
                del places[next(iter(places))]

    def worker_of(self, request: Request) -> int:
        """The worker that `request`, a call, should go to; -1: there is none so far."""
        call, parent = request.call, request.parent
        if call is None:
            return -1
        if call.near_child >= 0 and parent is not None and parent.call is not None:
            worker_id = parent.call.places.get(call.near_child, -1)
            if worker_id >= 0:
                return worker_id
        return self._workers.get(call.near, -1) if call.near else -1
