"""The exec lane: one inference at a time, started exactly at its time.

The brain hands over each exec a moment ahead (`arm`). The lane starts it at its `earliest`, or when it notices
the end of the one before, whichever is later; the order is that of core/worker/lane_order.py. Between noticing
and the launch call there is no allocation and no message, and no decision but that order
(the start is 1.6 us late, p50, on an H200). Only after the launch is the end reported.

An exec copies the instance's weights into the architecture's active ones and then runs the model. If the model
was captured, both are one CUDA graph that also holds the events around them, so the measured time is the
device's, to the microsecond, whatever delays the host between two calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from slosched.clock import Clock
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone, op_failed, too_late
from slosched.core.worker.lane_order import ArmedWork, LaneOrder
from slosched.core.worker.lanes import EXEC_LANE, LaneSpec
from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.cuda.driver import DeviceFault, Driver, Event, Stream
from slosched.daemon.backends.cuda.program import BufferSet, Class, Copies, Program, Use
from slosched.daemon.backends.cuda.segments import Progress
from slosched.daemon.blackbox import NoBlackbox
from slosched.messages import Span


@dataclass(frozen=True, slots=True)
class Weights:
    """An instance's weights and how they become the active ones of its architecture.

    `load` numbers the load that brought them. `stay`: the architecture has no other instance and changes
    nothing in them, so they need not be copied again before the next exec.
    """

    model_id: int
    load: int
    copies: Copies
    stay: bool = False


def _unprepared(buffers: BufferSet, stream: Stream) -> None:
    raise AssertionError("an exec that was not armed")


@dataclass(slots=True, eq=False)
class _Exec(ArmedWork):
    op: Op
    program: Program
    of: Class
    buffers: BufferSet | None  # None: it brings no inputs, and every set still held outputs
    weights: Weights
    clock_before_mhz: int
    stream: Stream
    place: tuple[str, bool]  # whose active weights: a model's name, and whether its urgent twin's
    brings_inputs: bool = False
    copies: bool = (
        True  # it was aimed to copy its weights; else they will be the active ones already
    )
    finished: Event = None  # recorded behind its launch
    key: tuple[int, int] = (-1, -1)  # whose weights, of which load
    launch: Callable[[BufferSet, Stream], None] = _unprepared
    begin_ns: int = 0
    expected_end_ns: int = 0
    model_number: int = 0  # in the black box
    plain: bool = False
    progress: Progress | None = None  # of a run in segments


class ExecLane:
    """Runs what is armed, in order. `read_clock_mhz` returns the GPU's clock (0: unknown).

    The lane writes into `blackbox` which model runs, in case that model ends the process.
    """

    def __init__(
        self,
        driver: Driver,
        stream: Stream,
        clock: Clock,
        read_clock_mhz: Callable[[], int],
        blackbox: NoBlackbox,
        *,
        lane: LaneSpec = EXEC_LANE,
    ) -> None:
        self._blackbox = blackbox
        self._driver, self._stream, self._clock = driver, stream, clock
        self._read_clock_mhz = read_clock_mhz
        self._order: LaneOrder[_Exec] = LaneOrder(lane)
        self._armed, self._running = self._order.armed, self._order.running  # for reading
        self._ended: _Exec | None = None  # its end was noticed, and is not reported yet
        #: By place: whose weights are the active ones, of which load.
        self._active: dict[tuple[str, bool], tuple[int, int]] = {}
        self._finish_events = deque(driver.event() for _ in range(2))
        self._last_ns: dict[
            tuple[str, Class], int
        ] = {}  # duration of the last run, by model and class
        self.done: list[OpDone] = []

    # ---------------------------------------------------------------------------- questions

    @property
    def running(self) -> bool:
        return bool(self._running)

    @property
    def idle(self) -> bool:
        return not self._running and not self._armed

    def next_event_ns(self) -> int | None:
        """0 while something runs; when the next armed exec is due; None if there is none."""
        if self._running or self.done:
            return 0
        return self._order.next_due_ns()

    def quiet_until_ns(self) -> int | None:
        """When the lane will next need the thread at once. None: unknown, or the lane is empty."""
        if self._running:
            return self._running[0].expected_end_ns or None
        return self._order.next_due_ns()

    def uses(self, program: Program) -> bool:
        items = (self._ended, *self._running, *self._armed)
        return any(item is not None and item.program is program for item in items)

    # -------------------------------------------------------------------------------- verbs

    def arm(
        self,
        op: Op,
        program: Program,
        of: Class,
        buffers: BufferSet | None,
        weights: Weights,
        *,
        now_ns: int,
        urgent: bool = False,
    ) -> None:
        """Take `op`; `turn` and `spin` start it. `of` is the class of `program` that runs.

        `urgent`: `program` is a model's urgent twin. Raises DeviceFault, as does every method here that touches
        the device.
        """
        place = (op.model_name, urgent)
        clock_mhz = self._read_clock_mhz()
        item = _Exec(op, program, of, buffers, weights, clock_mhz, self._stream, place)
        item.brings_inputs = buffers is not None
        item.key, item.launch = (weights.model_id, weights.load), program.launch
        item.model_number = self._blackbox.index(op.model_name)
        item.plain = not program.captured(of)
        if buffers is None:
            item.buffers = self._without_outputs(item)
        if item.buffers is not None:
            self._aim(item, self._armed[-1] if self._armed else None)
        priority = self._settle(item)
        self._order.arm(item, start_ns=op.earliest_ns, now_ns=now_ns, priority=priority)
        self.turn()

    def _settle(self, item: _Exec) -> int:
        """Decide how `item` will run; returns its priority."""
        return 0

    def overwritten(self, name: str) -> None:
        """The active weights of `name` are those of no instance any more (the model was measured)."""
        for urgent in (False, True):
            self._active.pop((name, urgent), None)

    def withdraw(self, op_id: int) -> OpDone | None:
        """Take an armed op back. None if it has begun, or is not here."""
        for item in self._armed:
            if item.op.op_id == op_id and not item.begin_ns:
                self._order.disarm(item)
                reason = "cancelled before it began"
                return op_failed(item.op, Code.CANCELLED, reason, self._clock())
        return None

    def turn(self) -> None:
        """Notice an end; start what is due; then report the end."""
        if self._running:
            running = self._running[0]
            if self._driver.done(running.finished):
                self._notice(running, self._clock())
        elif self._armed:
            self._start_due(self._clock())

    def _notice(self, ended: _Exec, end_ns: int) -> None:
        self._ended = ended
        item = self._order.end(ended, end_ns)
        if item is None:
            self._report_ended(end_ns)
            return
        if item.buffers is ended.buffers:  # the next run records the same events
            self._report_ended(end_ns)
        failed = self._start(item, end_ns)
        self._report_ended(end_ns)
        if failed:
            self._start_due(self._clock())

    def _start_due(self, now_ns: int) -> None:
        first = self._order.first
        while (item := first(now_ns)) is not None and self._start(item, now_ns):
            now_ns = self._clock()

    def spin(self, until_ns: int) -> None:
        """Do nothing but wait for the end of what runs, or for a start; `turn` when it comes.

        Returns at `until_ns` at the latest.
        """
        driver_done, clock = self._driver.done, self._clock
        if self._running:
            running = self._running[0]
            finished = running.finished
            while not driver_done(finished):
                if clock() >= until_ns:
                    return
            self._notice(running, clock())
        elif self._armed:
            due_ns = min(self._armed[0].due_ns, until_ns)
            while clock() < due_ns:
                pass
            self.turn()

    def fail_all(self, reason: str) -> None:
        """The device is lost, and this process with it: everything that runs or is armed fails."""
        now_ns = self._clock()
        items = [] if self._ended is None else [self._ended]
        self._ended = None
        items += self._order.clear()
        self.done.extend(op_failed(each.op, Code.PROCESS_ENDED, reason, now_ns) for each in items)

    # ------------------------------------------------------------------------------- inside

    def _start(self, item: _Exec, now_ns: int) -> bool:
        """Start `item`, which is first. True: it failed instead, so another may start."""
        op = item.op
        if now_ns > op.latest_ns:
            self._order.disarm(item)
            self.done.append(too_late(op, now_ns))
            return True
        buffers = item.buffers
        if (
            buffers is None
            or buffers.aimed_for is not item  # another was armed on the same set since
            or (not item.copies and self._active.get(item.place) != item.key)
        ):
            buffers = item.buffers = buffers or self._without_outputs(item)
            if buffers is None:  # both sets' outputs are being copied out, for microseconds
                return False
            self._aim(item, None)
        launch, stream = item.launch, item.stream
        item.begin_ns = self._clock()
        try:
            if item.plain:
                self._blackbox.launching(item.model_number)
            launch(buffers, stream)
            self._blackbox.running(item.model_number)
            item.finished = self._finish_events[0]
            self._driver.record(item.finished, stream)
            self._order.begin(item)
        except DeviceFault:
            raise  # it is armed still, so `fail_all` reports it with the others
        except (Exception, SystemExit) as error:  # plain execution: a model may raise anything
            self._driver.done(self._finish_events[0])  # raises if it is the device that is lost
            self._order.disarm(item)
            self._blackbox.launching(0)
            self._active.pop(item.place, None)
            reason = f"{op.model_name}: {type(error).__name__}: {first_line(error)}"
            self.done.append(op_failed(op, Code.RUNTIME_ERROR, reason, self._clock()))
            return True
        if item.plain:
            self._blackbox.launching(0)
        self._finish_events.rotate(-1)
        self._active[item.place] = item.key
        if item.brings_inputs:
            buffers.use = Use.OUTPUTS
        last_ns = self._last_ns.get((op.model_name, item.of), 0)
        item.expected_end_ns = item.begin_ns + last_ns if last_ns else 0
        return False

    def _aim(self, item: _Exec, before: _Exec | None) -> None:
        """Have the weights copied, unless they will be the active ones. `before`: the exec ahead of it."""
        place, weights = item.place, item.weights
        active = self._active.get(place)
        if before is not None and before.place == place:
            active = before.key
        item.copies = not (weights.stay and active == item.key)
        assert item.buffers is not None
        item.buffers.aimed_for = item
        item.program.aim(item.buffers, weights.copies if item.copies else ())

    def _without_outputs(self, item: _Exec) -> BufferSet | None:
        """A set that may be run without loss: inputs that wait in it stay as they are.

        Not the set of the exec before it if there is another, so that the events of both can be read.
        """
        last = next(reversed(self._armed or self._running), None)
        taken = [each.buffers for each in self._armed if each.brings_inputs]
        sets = [
            each
            for each in item.program.sets(item.of)
            if each.use is not Use.OUTPUTS and each not in taken
        ]
        others = [each for each in sets if last is None or each is not last.buffers]
        free = [each for each in others or sets if each.use is Use.FREE]
        return next(iter(free or others or sets), None)

    def _report_ended(self, end_ns: int) -> None:
        """Report the exec whose end was noticed at `end_ns`, unless it is reported already."""
        item = self._ended
        if item is None:
            return
        assert item.buffers is not None
        if not self._running:
            self._blackbox.running(0)
        done = self._outcome(item, item.buffers, end_ns)
        self._last_ns[item.op.model_name, item.of] = done.span.duration_ns
        self.done.append(done)
        self._ended = None

    def _outcome(self, item: _Exec, buffers: BufferSet, end_ns: int) -> OpDone:
        duration_ns = self._driver.elapsed_ns(buffers.started, buffers.ended)
        return OpDone(
            item.op.op_id,
            Span(item.begin_ns, end_ns, duration_ns),
            clock_before_mhz=item.clock_before_mhz,
            clock_mhz=self._read_clock_mhz(),
        )
