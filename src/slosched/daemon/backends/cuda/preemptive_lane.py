"""The exec lane of a GPU whose long runs can be interrupted (`--preempt`).

A run in segments (segments.py) has `in_flight` of them launched at a time. When the lane notices the end of
one, it launches the next, unless due work of a higher priority waits: then it launches no more, and when
those in flight have ended the urgent work starts, on a stream of its own. The interrupted run goes on behind
it. So one run at a time is on the GPU, and each measured time is that run's alone.

What is urgent runs as its program's twin, which shares no memory with ordinary runs (recorded.py). An exec with
a priority whose class is in no twin is an ordinary one: it waits for its turn.

The measured time of an interrupted run is the sum of its stretches. A stretch ends with the event behind its
last segment; one that is resumed begins with an event before its first, which comes a launch (some 7 us,
H200) before that segment runs.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from slosched.clock import Clock
from slosched.core.worker.interface import OpDone, joined
from slosched.core.worker.lanes import PREEMPTIVE_EXEC_LANE
from slosched.daemon.backends.cuda.driver import Driver, Event, Stream
from slosched.daemon.backends.cuda.exec_lane import ExecLane, _Exec
from slosched.daemon.backends.cuda.program import BufferSet
from slosched.daemon.backends.cuda.segments import Gate, Progress
from slosched.daemon.blackbox import NoBlackbox
from slosched.messages import Span

#: Segments of a run that may be in flight; and events for them, an urgent run, and those that are still read.
MOST_IN_FLIGHT = 4
_EVENTS = MOST_IN_FLIGHT + 4


class PreemptiveExecLane(ExecLane):
    """An exec lane with urgent runs on `urgent_stream`. Preparations meet it at `gate`."""

    def __init__(
        self,
        driver: Driver,
        stream: Stream,
        clock: Clock,
        read_clock_mhz: Callable[[], int],
        blackbox: NoBlackbox,
        *,
        urgent_stream: Stream,
        gate: Gate,
    ) -> None:
        super().__init__(driver, stream, clock, read_clock_mhz, blackbox, lane=PREEMPTIVE_EXEC_LANE)
        self._urgent_stream, self._gate = urgent_stream, gate
        self._finish_events.extend(driver.event() for _ in range(_EVENTS))
        self._resumed = driver.event()  # of the one run that can be interrupted at a time
        self._waits_at_gate = False

    # ---------------------------------------------------------------------------- questions

    def quiet_until_ns(self) -> int | None:
        if self._waits_at_gate and self._gate.preparing and not self._running:
            return None  # the preparation needs the thread
        return super().quiet_until_ns()

    # -------------------------------------------------------------------------------- verbs

    def _settle(self, item: _Exec) -> int:
        _, urgent = item.place
        if urgent:
            item.stream = self._urgent_stream
            return max(1, item.op.priority)
        cut = item.program.cut_of(item.of)
        if cut is not None:
            item.progress, item.launch = Progress(cut), item.program.launch_segment
        return 0

    def fail_all(self, reason: str) -> None:
        super().fail_all(reason)
        self._gate.open_run = False

    # ------------------------------------------------------------------------------- inside

    def _start(self, item: _Exec, now_ns: int) -> bool:
        progress = item.progress
        if progress is not None and progress.launched:
            self._resume(item, progress)
            return False
        if not item.place[1] and not self._passes_gate(segments=progress is not None):
            return False
        failed = super()._start(item, now_ns)
        if progress is not None:
            if item in self._running:
                self._begun(item, progress)
            else:
                self._gate.open_run = False
        return failed

    def _passes_gate(self, *, segments: bool) -> bool:
        gate = self._gate
        if segments:
            gate.open_run = True
        passes = gate.admits(segments=segments)
        if segments and not passes:
            gate.open_run = False
        self._waits_at_gate = not passes
        return passes

    def _begun(self, item: _Exec, progress: Progress) -> None:
        """The first segment was launched like a whole run: launch what may be in flight beside it."""
        assert item.buffers is not None
        begin_ns = item.begin_ns
        progress.launched = 1
        progress.in_flight.append(item.finished)
        progress.begun_ns, progress.opened = begin_ns, item.buffers.started
        item.expected_end_ns = begin_ns + progress.cut.segment_ns[0]
        self._fill(item, progress, begin_ns)

    def _resume(self, item: _Exec, progress: Progress) -> None:
        self._order.begin(item)
        self._driver.record(self._resumed, item.stream)
        progress.opened = self._resumed
        progress.begun_ns = now_ns = self._clock()
        self._blackbox.running(item.model_number)
        self._fill(item, progress, now_ns)

    def _fill(self, item: _Exec, progress: Progress, now_ns: int) -> None:
        """Launch segments until as many are in flight as may be."""
        cut, in_flight = progress.cut, progress.in_flight
        times, buffers, stream = cut.segment_ns, item.buffers, item.stream
        assert buffers is not None
        while len(in_flight) < cut.in_flight and progress.launched < len(times):
            index = progress.launched
            item.program.launch_segment(buffers, stream, index)
            event = self._finish_events[0]
            self._driver.record(event, stream)
            self._finish_events.rotate(-1)
            in_flight.append(event)
            progress.launched = index + 1
            item.expected_end_ns = max(item.expected_end_ns, now_ns) + times[index]
        self._gate.open_run = progress.launched < len(times)
        item.finished = in_flight[0]

    def _notice(self, ended: _Exec, end_ns: int) -> None:
        progress = ended.progress
        if progress is None:
            super()._notice(ended, end_ns)
            return
        in_flight = progress.in_flight
        event = in_flight.popleft()
        if progress.all_launched:
            if not in_flight:
                super()._notice(ended, end_ns)
                return
        elif self._order.rival(ended, end_ns) is None:
            self._fill(ended, progress, end_ns)
            return
        elif not in_flight:
            self._interrupt(ended, progress, event, end_ns)
            return
        ended.finished = in_flight[0]

    def _interrupt(self, item: _Exec, progress: Progress, event: Event, end_ns: int) -> None:
        """Nothing of `item` is in flight: what is urgent starts in its place.

        `event` is behind its last segment.
        """
        goes_on = self._order.boundary(item, end_ns)
        assert not goes_on
        first = self._order.first(end_ns)
        assert first is not None
        failed = self._start(first, end_ns)
        duration_ns = self._driver.elapsed_ns(progress.opened, event)
        progress.stretches.append(Span(progress.begun_ns, end_ns, duration_ns))
        if failed:
            self._start_due(self._clock())

    def _outcome(self, item: _Exec, buffers: BufferSet, end_ns: int) -> OpDone:
        done = super()._outcome(item, buffers, end_ns)
        progress = item.progress
        if progress is None or not progress.stretches:
            return done
        duration_ns = self._driver.elapsed_ns(progress.opened, buffers.ended)
        segments = (*progress.stretches, Span(progress.begun_ns, end_ns, duration_ns))
        span, pause_ns = joined(segments)
        return msgspec.structs.replace(done, span=span, pause_ns=pause_ns, segments=segments)
