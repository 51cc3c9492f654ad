"""The order of armed work in one lane: which work starts when a slot is free.

Work is armed before it may start, so that nothing has to be decided between the end of one run and the start
of the next. A lane on a CUDA device and a lane of an emulated GPU both follow this order:

- Work is due from its start time, or from the time at which it was armed if that is later.
- Among the work that is due, the highest priority goes first, then the work that was due first, then the work
  that was armed first.
- No more run at a time than the lane is wide.
- At a segment boundary in a preemptive lane, due work of a higher priority goes first. The interrupted work is
  armed again with the place that it had, so that it precedes everything of its own priority.

Work that becomes due later never overtakes work of the same priority, so nothing starves while no work of a
higher priority comes. A lane holds few armed works (its slots and one more), so a sorted list is enough.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from slosched.core.worker.lanes import LaneSpec


@dataclass(slots=True, eq=False)
class ArmedWork:
    """Base of what a lane runs. The order sets these fields when the work is armed."""

    due_ns: int = field(default=0, init=False)
    priority: int = field(default=0, init=False)
    number: int = field(default=0, init=False)  # counts what was armed before it
    # Of a LingeringOrder: how long the lane waits behind it, and whether it waits while the lane does.
    linger_ns: int = field(default=0, init=False)
    patient: bool = field(default=False, init=False)


Work = TypeVar("Work", bound=ArmedWork)


class LaneOrder(Generic[Work]):
    """The armed and the running work of one `lane`.

    `armed` is in the order in which the work is due, `running` in the order in which it began. Both are for
    reading; every change goes through the methods.
    """

    __slots__ = ("_number", "_preemptive", "_width", "armed", "running")

    def __init__(self, lane: LaneSpec) -> None:
        self._width, self._preemptive = lane.width, lane.preemptive
        self.armed: list[Work] = []
        self.running: list[Work] = []
        self._number = 0

    def arm(self, work: Work, *, start_ns: int, now_ns: int, priority: int = 0) -> None:
        """Take `work`, which may start from `start_ns`; a higher `priority` goes first."""
        self._number = work.number = self._number + 1
        work.due_ns = due_ns = start_ns if start_ns > now_ns else now_ns
        work.priority = priority
        armed = self.armed
        if not armed or armed[-1].due_ns <= due_ns:
            armed.append(work)
        else:
            insort(armed, work, key=_place)

    def first(self, now_ns: int) -> Work | None:
        """The work that is to start now. None: none is due, or no slot is free."""
        if len(self.running) >= self._width:
            return None
        return self._first_due(now_ns)

    def _first_due(self, now_ns: int) -> Work | None:
        first = None
        for work in self.armed:
            if work.due_ns > now_ns:
                break
            if first is None or work.priority > first.priority:
                first = work
        return first

    def next_due_ns(self) -> int | None:
        """When the next armed work is due. None: nothing is armed."""
        return self.armed[0].due_ns if self.armed else None

    def begin(self, work: Work) -> None:
        """Armed `work` has started: it takes a slot."""
        self.armed.remove(work)
        self.running.append(work)

    def end(self, work: Work, now_ns: int) -> Work | None:
        """Running `work` has ended: its slot is free. Returns what `first` would, in one call."""
        self.running.remove(work)
        armed = self.armed
        if len(armed) == 1 and armed[0].due_ns <= now_ns:
            return armed[
                0
            ]  # the usual case, without a call: the lane stands still until this returns
        return self._first_due(now_ns)

    def rival(self, work: Work, now_ns: int) -> Work | None:
        """The due work that goes first at the next boundary of running `work`; None: `work` goes on."""
        if not self._preemptive:
            return None
        rival = self._first_due(now_ns)
        return rival if rival is not None and rival.priority > work.priority else None

    def boundary(self, work: Work, now_ns: int) -> bool:
        """A segment of running `work` has ended, and another segment follows. True: it starts now.

        False: due work of a higher priority goes first, and `work` is armed again.
        """
        if self.rival(work, now_ns) is None:
            return True
        self.running.remove(work)
        insort(self.armed, work, key=_place)
        return False

    def disarm(self, work: Work) -> None:
        """Armed `work` is given up and will not start."""
        self.armed.remove(work)

    def clear(self) -> list[Work]:
        """Give up everything; returns it, the running work first."""
        works = [*self.running, *self.armed]
        self.running.clear()
        self.armed.clear()
        return works


class LingeringOrder(LaneOrder[Work]):
    """An order that can stand still behind a work for its `linger_ns`, for the next one of its client.

    If what is to go first meanwhile is `patient`, nothing starts; what was interrupted is patient. That is
    anticipatory scheduling (Iyer and Druschel, SOSP'01): what would start in the gap between two urgent works
    costs the second one a whole segment.
    """

    __slots__ = ("lingers_until_ns",)

    def __init__(self, lane: LaneSpec) -> None:
        super().__init__(lane)
        self.lingers_until_ns = 0

    def _first_due(self, now_ns: int) -> Work | None:
        first = super()._first_due(now_ns)
        if first is not None and first.patient and now_ns < self.lingers_until_ns:
            return None
        return first

    def begin(self, work: Work) -> None:
        super().begin(work)
        self.lingers_until_ns = 0

    def end(self, work: Work, now_ns: int) -> Work | None:
        self.running.remove(work)
        if work.linger_ns:
            self.lingers_until_ns = now_ns + work.linger_ns
        return self._first_due(now_ns)

    def boundary(self, work: Work, now_ns: int) -> bool:
        goes_on = super().boundary(work, now_ns)
        work.patient = work.patient or not goes_on
        return goes_on


def _place(work: ArmedWork) -> tuple[int, int]:
    return work.due_ns, work.number
