"""Requests aboard an action that its worker does not report: they are answered when they are hopeless.

A worker is lost only after four silent ticks (sessions.py), long after the deadline of a request with an SLO of
100 ms. Its client is told as soon as no answer could be in time any more and none is about to come.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import ActionState, Request, RequestState
from slosched.units import NS_PER_MS

#: A report that is later than this, and than the action should have taken, is not about to come.
_GRACE_NS = 50 * NS_PER_MS
_LOOK_EVERY_NS = 10 * NS_PER_MS


class Overdue:
    """Looks at most each `_LOOK_EVERY_NS`, and needs no wake-up: whatever wakes the scheduler will do.

    `give_up` answers a request whose deadline has passed. It stays aboard the action, which may yet be
    reported.
    """

    def __init__(self, cluster: Cluster, give_up: Callable[[Request, ActionState], None]) -> None:
        self._cluster, self._give_up = cluster, give_up
        self._due_ns = 0

    def look(self, *, now_ns: int) -> None:
        if now_ns < self._due_ns:
            return
        self._due_ns = now_ns + _LOOK_EVERY_NS
        for gpu in self._cluster.gpus.values():
            outstanding = gpu.exec.outstanding
            if not outstanding:
                continue
            late_ns = now_ns - _GRACE_NS
            if gpu.exec.width > 1:
                overdue = [a for a in outstanding if late_ns > a.predicted_end_ns + a.patience_ns]
            else:
                first = outstanding[0]
                if late_ns <= first.predicted_end_ns + first.patience_ns:
                    continue
                overdue = list(outstanding)
            for action in overdue:
                for request in action.requests:
                    if request.state is not RequestState.ANSWERED and request.deadline_ns < now_ns:
                        self._give_up(request, action)
