"""The exec lane: one inference at a time, started on the dot.

The brain hands over each exec a moment ahead (`arm`). The lane starts it at its `earliest`, or when it
notices the end of the one before, whichever is later: between noticing and the launch call there is no
decision, no allocation and no message (0.3 to 0.5 us, H200). Only after the launch is the end reported.

An exec is the instance's weights into the architecture's active ones, then the model: for a captured one
both are one CUDA graph, and the events round them lie in it. So what is measured is what the device took,
to the microsecond, whatever held up the host between two calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from slosched.clock import Clock
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone
from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.cuda.driver import DeviceFault, Driver, Event, Stream
from slosched.daemon.backends.cuda.program import BufferSet, Copies, Program, Use
from slosched.daemon.blackbox import NoBlackbox
from slosched.messages import Span
from slosched.units import format_duration


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
class _Exec:
    op: Op
    program: Program
    batch: int
    buffers: BufferSet | None  # None: it brings no inputs, and no set was without outputs yet
    weights: Weights
    clock_before_mhz: int
    brings_inputs: bool = False
    copies: bool = True  # it was aimed to copy its weights; else they are the active ones by then
    over: Event = None
    key: tuple[int, int] = (-1, -1)  # whose weights, of which load
    launch: Callable[[BufferSet, Stream], None] = _unprepared
    begin_ns: int = 0
    expected_end_ns: int = 0
    number: int = 0  # of its model in the black box
    plain: bool = False


class ExecLane:
    """Runs what is armed, in order. `read_clock_mhz` tells the GPU's clock (0: unknown).

    Into `blackbox` goes whose model runs, for the case that the process ends by it.
    """

    def __init__(
        self,
        driver: Driver,
        stream: Stream,
        clock: Clock,
        read_clock_mhz: Callable[[], int],
        blackbox: NoBlackbox,
    ) -> None:
        self._blackbox = blackbox
        self._driver, self._stream, self._clock = driver, stream, clock
        self._read_clock_mhz = read_clock_mhz
        self._armed: deque[_Exec] = deque()
        self._running: _Exec | None = None
        self._ended: _Exec | None = None  # noticed, and not yet reported
        self._active: dict[str, tuple[int, int]] = {}  # by name: whose weights, of which load
        self._over = deque(driver.event() for _ in range(2))
        self._last_ns: dict[tuple[str, int], int] = {}  # what (model, batch) took the last time
        self.done: list[OpDone] = []

    # ---------------------------------------------------------------------------- questions

    @property
    def running(self) -> bool:
        return self._running is not None

    @property
    def idle(self) -> bool:
        return self._running is None and not self._armed

    def next_event_ns(self) -> int | None:
        """0 while something runs; when the armed one may start; None if there is nothing."""
        if self._running is not None or self.done:
            return 0
        return self._armed[0].op.earliest_ns if self._armed else None

    def quiet_until_ns(self) -> int | None:
        """When the lane will next need the thread at once. None: it cannot say, or nothing is here."""
        running = self._running
        if running is not None:
            return running.expected_end_ns or None
        return self._armed[0].op.earliest_ns if self._armed else None

    def uses(self, program: Program) -> bool:
        items = (self._running, self._ended, *self._armed)
        return any(item is not None and item.program is program for item in items)

    # -------------------------------------------------------------------------------- verbs

    def arm(
        self, op: Op, program: Program, batch: int, buffers: BufferSet | None, weights: Weights
    ) -> None:
        """Take `op`; `turn` and `spin` start it. `batch` is the class of `program` that runs.

        Raises DeviceFault, like everything here that touches the device.
        """
        item = _Exec(op, program, batch, buffers, weights, self._read_clock_mhz())
        item.brings_inputs = buffers is not None
        item.key, item.launch = (weights.model_id, weights.load), program.launch
        item.number = self._blackbox.index(op.model_name)
        item.plain = not program.captured(batch)
        if buffers is None:
            item.buffers = self._without_outputs(item)
        if item.buffers is not None:
            self._aim(item, self._armed[-1] if self._armed else None)
        self._armed.append(item)
        self.turn()

    def overwritten(self, name: str) -> None:
        """The active weights of `name` are no instance's any more (it was measured)."""
        self._active.pop(name, None)

    def withdraw(self, op_id: int) -> OpDone | None:
        """Take an armed op back. None if it has begun, or is not here."""
        for item in self._armed:
            if item.op.op_id == op_id:
                self._armed.remove(item)
                now_ns = self._clock()
                return _failed(item.op, Code.CANCELLED, "cancelled before it began", now_ns)
        return None

    def turn(self) -> None:
        """Notice an end; start what is due; then report the end."""
        running = self._running
        if running is None:
            while self._armed and self._running is None and self._start(self._clock()):
                pass
        elif self._driver.done(running.over):
            self._notice(running, self._clock())

    def _notice(self, running: _Exec, end_ns: int) -> None:
        self._ended, self._running = running, None
        armed = self._armed
        if armed:
            if armed[0].buffers is running.buffers:  # the next run records the same events
                self._report(running, end_ns)
                self._ended = None
            now_ns = end_ns
            while armed and self._running is None and self._start(now_ns):
                now_ns = self._clock()
        if self._ended is not None:
            self._report(running, end_ns)
            self._ended = None

    def spin(self, until_ns: int) -> None:
        """Do nothing but wait for the end of what runs, or for a start; `turn` when it comes.

        Returns at `until_ns` at the latest.
        """
        driver_done, clock = self._driver.done, self._clock
        running = self._running
        if running is not None:
            over = running.over
            while not driver_done(over):
                if clock() >= until_ns:
                    return
            self._notice(running, clock())
        elif self._armed:
            due_ns = min(self._armed[0].op.earliest_ns, until_ns)
            while clock() < due_ns:
                pass
            self.turn()

    def fail_all(self, reason: str) -> None:
        """The device is lost, and this process with it: so ends everything that runs or is armed."""
        now_ns = self._clock()
        items = [item for item in (self._ended, self._running, *self._armed) if item is not None]
        self._ended = self._running = None
        self._armed.clear()
        self.done.extend(_failed(item.op, Code.PROCESS_ENDED, reason, now_ns) for item in items)

    # ------------------------------------------------------------------------------- inside

    def _start(self, now_ns: int) -> bool:
        """Start the first armed one if its time has come. True if the next one may be looked at."""
        item = self._armed[0]
        op = item.op
        if now_ns < op.earliest_ns:
            return False
        if now_ns > op.latest_ns:
            self._armed.popleft()
            late = format_duration(now_ns - op.latest_ns)
            reason = f"it could only start {late} after latest"
            self.done.append(_failed(op, Code.EXEC_TOO_LATE, reason, now_ns))
            return True
        buffers = item.buffers
        if (
            buffers is None
            or buffers.aimed_for is not item  # another was armed on the same set since
            or (not item.copies and self._active.get(op.model_name) != item.key)
        ):
            buffers = item.buffers = buffers or self._without_outputs(item)
            if buffers is None:  # both sets' outputs are on their way out: microseconds
                return False
            self._aim(item, None)
        launch = item.launch
        item.begin_ns = self._clock()
        try:
            if item.plain:
                self._blackbox.launching(item.number)
            launch(buffers, self._stream)
            self._blackbox.running(item.number)
            item.over = self._over[0]
            self._driver.record(item.over, self._stream)
            self._armed.popleft()
        except DeviceFault:
            raise  # it is armed still, and `fail_all` reports it with the others
        except (Exception, SystemExit) as error:  # plain execution: a model may raise anything
            self._driver.done(self._over[0])  # raises if it is the device that is lost
            self._armed.popleft()
            self._blackbox.launching(0)
            self._active.pop(op.model_name, None)
            reason = f"{op.model_name}: {type(error).__name__}: {first_line(error)}"
            self.done.append(_failed(op, Code.RUNTIME_ERROR, reason, self._clock()))
            return True
        if item.plain:
            self._blackbox.launching(0)
        self._over.rotate(-1)
        self._active[op.model_name] = item.key
        if item.brings_inputs:
            buffers.use = Use.OUTPUTS
        last_ns = self._last_ns.get((op.model_name, item.batch), 0)
        item.expected_end_ns = item.begin_ns + last_ns if last_ns else 0
        self._running = item
        return False

    def _aim(self, item: _Exec, before: _Exec | None) -> None:
        """Have the weights copied, unless they will be the active ones. `before` runs before it, if any."""
        name, weights = item.op.model_name, item.weights
        active = self._active.get(name)
        if before is not None and before.op.model_name == name:
            active = before.key
        item.copies = not (weights.stay and active == item.key)
        assert item.buffers is not None
        item.buffers.aimed_for = item
        item.program.aim(item.buffers, weights.copies if item.copies else ())

    def _without_outputs(self, item: _Exec) -> BufferSet | None:
        """A set that may be run without loss: inputs that wait in it stay as they are.

        Not that of the exec before it, so that the events of both can be read in peace.
        """
        last = self._armed[-1] if self._armed else self._running
        taken = [each.buffers for each in self._armed if each.brings_inputs]
        sets = [
            each
            for each in item.program.sets(item.batch)
            if each.use is not Use.OUTPUTS and each not in taken
        ]
        others = [each for each in sets if last is None or each is not last.buffers]
        free = [each for each in others or sets if each.use is Use.FREE]
        return next(iter(free or others or sets), None)

    def _report(self, item: _Exec, end_ns: int) -> None:
        assert item.buffers is not None
        if self._running is None:
            self._blackbox.running(0)
        duration_ns = self._driver.elapsed_ns(item.buffers.started, item.buffers.ended)
        self._last_ns[item.op.model_name, item.batch] = duration_ns
        self.done.append(
            OpDone(
                item.op.op_id,
                Span(item.begin_ns, end_ns, duration_ns),
                clock_before_mhz=item.clock_before_mhz,
                clock_mhz=self._read_clock_mhz(),
            )
        )


def _failed(op: Op, code: Code, reason: str, now_ns: int) -> OpDone:
    return OpDone(op.op_id, Span(now_ns, now_ns, 0), code=code, reason=reason)
