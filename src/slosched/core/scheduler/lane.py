"""What one lane of a GPU has outstanding, and when that is expected to end."""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Outstanding(Protocol):
    """An action that was sent and is not reported yet, as far as its lane looks at it. Times in ns."""

    predicted_start_ns: int
    predicted_end_ns: int
    expected_duration_ns: int
    reaches_ns: int


A = TypeVar("A", bound=Outstanding)


class Lane(Generic[A]):
    """The actions that one lane of a GPU has outstanding, in the order sent.

    The worker's lanes have roles exec, load, input, output and host; the scheduler plans exec and load, whose
    width is 1, and the others follow from these.
    """

    __slots__ = ("busy_until_ns", "outstanding", "preemptive", "role", "width")

    def __init__(self, role: str, *, width: int = 1, preemptive: bool = False) -> None:
        self.role, self.width, self.preemptive = role, width, preemptive
        self.outstanding: deque[A] = deque()
        #: Predicted end of the last action sent; in the past when idle.
        self.busy_until_ns = 0

    def add(self, action: A) -> None:
        self.outstanding.append(action)
        self.busy_until_ns = action.predicted_end_ns

    def finish(self, action: A, *, end_ns: int) -> None:
        """Take `action` off; it ended at `end_ns`. What stands behind it is predicted anew."""
        was_head = self.outstanding[0] is action
        if was_head:
            self.outstanding.popleft()
        else:
            self.outstanding.remove(action)
        previous_end_ns = end_ns
        for waiting in self.outstanding:
            if was_head:
                # It starts when the one before it ends, unless it is still on its way.
                waiting.predicted_start_ns = max(previous_end_ns, waiting.reaches_ns)
                waiting.predicted_end_ns = waiting.predicted_start_ns + waiting.expected_duration_ns
            previous_end_ns = waiting.predicted_end_ns
        self.busy_until_ns = previous_end_ns

    def drain(self) -> list[A]:
        """Take everything off; returns what was outstanding."""
        drained, self.outstanding = list(self.outstanding), deque()
        return drained
