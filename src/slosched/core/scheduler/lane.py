"""What one lane of a GPU has outstanding, and when that is expected to end."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heapreplace
from typing import Generic, Protocol, TypeVar


class Outstanding(Protocol):
    """An action that was sent and is not reported yet, as far as its lane looks at it. Times in ns."""

    predicted_start_ns: int
    predicted_end_ns: int
    expected_duration_ns: int
    reaches_ns: int
    priority: int
    paused_ns: int


A = TypeVar("A", bound=Outstanding)


class Lane(Generic[A]):
    """The actions that one lane of a GPU has outstanding: urgent ones first, then in the order sent.

    An urgent action interrupts the others. So each of these is expected to end that much later.

    The worker's lanes have roles exec, load, input, output and host; the scheduler plans exec and load, whose
    width is 1 (but for a WideLane), and the others follow from these.
    """

    __slots__ = ("busy_until_ns", "most", "outstanding", "role", "width")

    def __init__(self, role: str, *, width: int = 1) -> None:
        self.role, self.width = role, width
        self.most = 2 * width  # outstanding at a time: for each that runs, one on its way
        self.outstanding: deque[A] = deque()
        #: Predicted end of the last action sent; in the past when idle.
        self.busy_until_ns = 0

    def add(self, action: A) -> None:
        if action.priority:
            self._overtake(action)
            return
        self.outstanding.append(action)
        self.busy_until_ns = action.predicted_end_ns

    @property
    def urgent(self) -> int:
        """Number of urgent actions outstanding."""
        return sum([action.priority > 0 for action in self.outstanding])

    def ordinary(self) -> A | None:
        """The first that is not urgent: what runs, or is interrupted."""
        return next((action for action in self.outstanding if not action.priority), None)

    def _overtake(self, action: A) -> None:
        place = self.urgent
        self.outstanding.insert(place, action)
        duration_ns = action.expected_duration_ns
        for waiting in list(self.outstanding)[place + 1 :]:
            waiting.paused_ns += duration_ns
            if waiting.predicted_start_ns >= action.predicted_start_ns:
                waiting.predicted_start_ns += duration_ns
            waiting.predicted_end_ns += duration_ns
        self.busy_until_ns = self.outstanding[-1].predicted_end_ns

    def _urgent_ended(self, action: A, took_ns: int, end_ns: int) -> None:
        """What stands behind it is predicted anew.

        What it had interrupted is delayed by what it took, no matter when the boundary came.
        """
        # One that never ran leaves what waits behind it for the boundary that it waited for itself.
        free_ns = end_ns if took_ns else max(end_ns, action.predicted_start_ns)
        later_ns = free_ns - action.predicted_end_ns
        longer_ns = took_ns - action.expected_duration_ns
        self.outstanding.remove(action)
        self.busy_until_ns = end_ns
        interrupted = self.ordinary()
        if interrupted is None or interrupted.predicted_start_ns >= action.predicted_start_ns:
            longer_ns = later_ns
        for waiting in self.outstanding:
            change_ns = later_ns if waiting.priority else longer_ns
            if waiting.predicted_start_ns >= action.predicted_start_ns:
                waiting.predicted_start_ns += change_ns
            waiting.predicted_end_ns += change_ns
            self.busy_until_ns = waiting.predicted_end_ns

    def finish(self, action: A, *, end_ns: int, took_ns: int = 0) -> None:
        """Take `action` off, which took `took_ns` and ended at `end_ns`; predict what stands behind it anew."""
        if action.priority:
            self._urgent_ended(action, took_ns, end_ns)
            return
        head = self.outstanding[0]
        was_head = head is action or (head.priority > 0 and self.ordinary() is action)
        if head is action:
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

    def suspend(self, action: A, *, end_ns: int) -> None:
        """`action`, a call, gave its slot away at `end_ns`."""
        self.finish(action, end_ns=end_ns)

    def resume(self, action: A) -> None:
        """A call that was suspended runs again, before everything that waits."""
        self.outstanding.appendleft(action)
        end_ns = action.predicted_end_ns
        for waiting in list(self.outstanding)[1:]:
            waiting.predicted_start_ns = max(end_ns, waiting.predicted_start_ns)
            end_ns = waiting.predicted_start_ns + waiting.expected_duration_ns
            waiting.predicted_end_ns = end_ns
        self.busy_until_ns = end_ns

    def drain(self) -> list[A]:
        """Take everything off; returns what was outstanding."""
        drained, self.outstanding = list(self.outstanding), deque()
        return drained


class WideLane(Lane[A]):
    """A lane with several slots, as a host's: `busy_until_ns` is when the next slot is predicted to be free.

    That is in the past while one is free. Actions take the slots in the order in which they were sent, but for
    calls that go on, which stand before all that has not begun. None of them interrupts another.
    """

    __slots__ = ()

    def add(self, action: A) -> None:
        self.outstanding.append(action)
        self._predict()

    def finish(self, action: A, *, end_ns: int, took_ns: int = 0) -> None:
        outstanding, width = self.outstanding, self.width
        place = outstanding.index(action)
        del outstanding[place]
        if place < width <= len(outstanding):
            begins = outstanding[width - 1]  # the first that waited has the slot
            begins.predicted_start_ns = max(end_ns, begins.reaches_ns)
            begins.predicted_end_ns = begins.predicted_start_ns + begins.expected_duration_ns
        self._predict()

    def resume(self, action: A) -> None:
        self.outstanding.appendleft(action)
        self._predict()

    def drain(self) -> list[A]:
        self.busy_until_ns = 0
        return super().drain()

    def _predict(self) -> None:
        """When each that waits gets a slot, and when the next one could."""
        outstanding, width = list(self.outstanding), self.width
        if len(outstanding) < width:
            self.busy_until_ns = 0
            return
        ends_ns = [action.predicted_end_ns for action in outstanding[:width]]
        heapify(ends_ns)
        for action in outstanding[width:]:
            start_ns = max(ends_ns[0], action.reaches_ns)
            action.predicted_start_ns = start_ns
            action.predicted_end_ns = start_ns + action.expected_duration_ns
            heapreplace(ends_ns, action.predicted_end_ns)
        self.busy_until_ns = ends_ns[0]
