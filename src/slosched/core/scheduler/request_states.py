"""The states of a request, and the one table of how they follow each other.

    (arrives) -> QUEUED -> IN_FLIGHT -> ANSWERED
                   |  ^        |
                   |  +--------+  its action failed, not its model, and slack is left
                   |  ASIDE <-> IN_FLIGHT   its model or process failed (second_tries.py)
                   |  ASIDE <-> QUEUED      its function is still being made ready (unready.py)
                   +-> ANSWERED   refused, timed out, given up, cancelled

It is answered exactly once, because ANSWERED leads nowhere. A call that is suspended is IN_FLIGHT (chains.py).
"""

from __future__ import annotations

from enum import IntEnum


class RequestState(IntEnum):
    QUEUED = 0
    IN_FLIGHT = 1
    ANSWERED = 2
    ASIDE = 3  # waits for a second try, or for its function, outside the policy's queues


TRANSITIONS: dict[tuple[RequestState, RequestState], str] = {
    (RequestState.QUEUED, RequestState.IN_FLIGHT): "put into an action",
    (RequestState.IN_FLIGHT, RequestState.QUEUED): "replanned",
    (RequestState.IN_FLIGHT, RequestState.ASIDE): "set aside for a second try",
    (RequestState.ASIDE, RequestState.IN_FLIGHT): "tried again",
    (RequestState.ASIDE, RequestState.ANSWERED): "answered while it was set aside",
    (RequestState.QUEUED, RequestState.ASIDE): "set aside until its function is ready",
    (RequestState.ASIDE, RequestState.QUEUED): "its function is ready",
    (RequestState.QUEUED, RequestState.ANSWERED): "answered from the queue",
    (RequestState.IN_FLIGHT, RequestState.ANSWERED): "answered with its action's outcome",
}

#: The table as rows of booleans: looked at two times for every request.
MAY_FOLLOW = tuple(
    tuple((before, after) in TRANSITIONS for after in RequestState) for before in RequestState
)
