"""Take one request out of the middle of a queue without examining all of them.

A queue is a plain list in ascending order of some key, so a request is found by bisection and removed by one
move of memory. `list.remove` compares with each request before it: that made a client that leaves, many
cancelled requests and a shutdown cost the square of what was queued.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

from slosched.core.scheduler.state import Request

_due_ns = attrgetter("due_ns")
_place = attrgetter("place")
_key = attrgetter("key")


#: The search examines this number of requests one by one first: most requests are found there.
_NEAR = 8


def first_from(queue: list[Request], due_ns: int, place: int = 0) -> int:
    """The first place, from `place` on, of a request that is not due before `due_ns`."""
    near = min(place + _NEAR, len(queue))
    for at in range(place, near):
        if queue[at].due_ns >= due_ns:
            return at
    return bisect_left(queue, due_ns, near, key=_due_ns)


def take_by_due(queue: list[Request], request: Request) -> None:
    """Take `request` out of a queue in the order of requests: by due date, then by key."""
    if queue[0] is request:
        del queue[0]
    else:
        _take(queue, bisect_left(queue, request), request)


def insert_by_key(queue: list[Request], request: Request) -> None:
    """Put `request` into a queue in the order of keys, which is that of arrival."""
    if queue and request.key < queue[-1].key:
        queue.insert(bisect_left(queue, request.key, key=_key), request)
    else:
        queue.append(request)


def take_by_key(queue: list[Request], request: Request) -> None:
    """Take `request` out of a queue in the order of keys."""
    _take(queue, bisect_left(queue, request.key, key=_key), request)


def append(queue: list[Request], request: Request) -> None:
    """Put `request` at the end of a queue in the order in which requests were appended."""
    request.place = queue[-1].place + 1 if queue else 0
    queue.append(request)


def take_appended(queue: list[Request], request: Request) -> None:
    """Take `request` out of a queue that was made with `append` alone."""
    _take(queue, bisect_left(queue, request.place, key=_place), request)


def _take(queue: list[Request], position: int, request: Request) -> None:
    if position == len(queue) or queue[position] is not request:
        raise ValueError(f"request {request.key} is not in the queue")
    del queue[position]
