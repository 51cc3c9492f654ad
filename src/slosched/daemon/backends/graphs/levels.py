"""The exec lane of several jobs that interrupt each other, at any depth.

Each job has a program of its own, captured on the job's stream into the job's graph pool, so it needs no twin
(cuda/preemption.py): what interrupts a run writes neither the pool, nor the weights, nor the buffers of the run
that waits, whichever job it is of. Only two runs of one job share memory, so a request goes no earlier than
those of its own job that are here already. A run that interrupts another can be interrupted itself. The
priority of each request says what goes first; that of streams only orders what is still in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from slosched.clock import Clock
from slosched.core.worker.lane_order import LingeringOrder
from slosched.core.worker.lanes import PREEMPTIVE_EXEC_LANE
from slosched.daemon.backends.cuda.driver import Driver, Stream
from slosched.daemon.backends.cuda.exec_lane import _Exec
from slosched.daemon.backends.cuda.preemptive_lane import PreemptiveExecLane
from slosched.daemon.backends.cuda.segments import Gate, Progress
from slosched.daemon.blackbox import NoBlackbox
from slosched.share_spec import Job

#: Two can be read at a time: that of the run that goes on, and that of the one that has just stopped.
_RESUMED_EVENTS = 4


def levels_of(jobs: Mapping[int, Job]) -> dict[int, int]:
    """The place of each job's priority among those that there are, from 0 up."""
    priorities = sorted({job.priority for job in jobs.values()})
    return {number: priorities.index(job.priority) for number, job in jobs.items()}


class LeveledExecLane(PreemptiveExecLane):
    """An exec lane of models with a stream each, `streams` by the models' names."""

    def __init__(
        self, driver: Driver, clock: Clock, *, streams: Mapping[str, Stream], gate: Gate
    ) -> None:
        first = next(iter(streams.values()))
        super().__init__(
            driver, first, clock, lambda: 0, NoBlackbox(), urgent_stream=first, gate=gate
        )
        self._order = LingeringOrder(PREEMPTIVE_EXEC_LANE)
        self._armed, self._running = self._order.armed, self._order.running
        self._streams = streams
        self._resumed_events = deque(driver.event() for _ in range(_RESUMED_EVENTS))

    def _settle(self, item: _Exec) -> int:
        item.stream = self._streams[item.op.model_name]
        item.linger_ns, item.patient = item.op.linger_ns, item.op.patient
        cut = item.program.cut_of(item.of)
        if cut is not None:
            item.progress, item.launch = Progress(cut), item.program.launch_segment
        name = item.op.model_name
        own = [
            each.priority for each in (*self._running, *self._armed) if each.op.model_name == name
        ]
        return min([item.op.priority, *own])

    def _resume(self, item: _Exec, progress: Progress) -> None:
        # The run that has just ended may have been resumed too, and its event is read after this.
        self._resumed = self._resumed_events[0]
        self._resumed_events.rotate(-1)
        super()._resume(item, progress)
