"""One CUDA GPU behind the core's `Device` protocol: the exec lane, and copies beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone, OpKind, op_failed
from slosched.daemon.backends.base import Frame
from slosched.daemon.backends.cuda.copy_lanes import CopyLanes
from slosched.daemon.backends.cuda.driver import Block, DeviceFault, Driver, Stream
from slosched.daemon.backends.cuda.exec_lane import ExecLane
from slosched.daemon.backends.cuda.preemptive_lane import PreemptiveExecLane
from slosched.daemon.backends.cuda.program import Program, side_of
from slosched.daemon.backends.cuda.segments import Gate
from slosched.daemon.blackbox import NoBlackbox
from slosched.units import NS_PER_MS

#: An exec is armed this long before its time; the loop's turn takes some 30 us.
ARM_AHEAD_NS = 1 * NS_PER_MS
_UNREAD = NoBlackbox()
#: An only instance's weights are copied before each exec all the same, unless they are larger than this:
#: 256 MiB take 0.15 ms (H200), and a model that changes its own buffers unseen starts from its own ones.
STAY_BYTES = 256 * 2**20
#: The exec lane's spare time when it cannot tell: enough for a look at the socket.
_LONG_NS = 10 * NS_PER_MS


class CudaDevice:
    """Runs ops of the models in `programs`; both mappings may grow and shrink while it runs.

    `cache` is the weights cache on the device, given out in pages of `page_bytes`. Errors are reported
    through OpDone; after one that leaves no CUDA context, `lost` says so in words and every op fails.
    With an `urgent_stream`, urgent execs interrupt long ones (preemptive_lane.py); preparations pass `gate`.
    `lane` is an exec lane that takes the place of both.
    """

    steady = False
    free_copies = True
    arm_ahead_ns = ARM_AHEAD_NS

    def __init__(
        self,
        driver: Driver,
        programs: Mapping[str, Program],
        images: Mapping[str, Sequence[Block]],
        *,
        cache: Block,
        page_bytes: int,
        stream: Stream,
        clock: Clock = now_ns,
        read_clock_mhz: Callable[[], int] = lambda: 0,
        stay_bytes: int = STAY_BYTES,
        blackbox: NoBlackbox = _UNREAD,
        urgent_stream: Stream | None = None,
        gate: Gate | None = None,
        lane: ExecLane | None = None,
    ) -> None:
        self._programs, self._clock = programs, clock
        self._stay_bytes = stay_bytes
        self.lost = ""
        if lane is not None:
            self._exec = lane
        elif urgent_stream is None:
            self._exec = ExecLane(driver, stream, clock, read_clock_mhz, blackbox)
        else:
            self._exec = PreemptiveExecLane(
                driver,
                stream,
                clock,
                read_clock_mhz,
                blackbox,
                urgent_stream=urgent_stream,
                gate=gate or Gate(clock),
            )
        self._copies = CopyLanes(
            driver,
            programs,
            images,
            cache=cache,
            page_bytes=page_bytes,
            clock=clock,
            spare_ns=self.spare_ns,
        )
        self.instances: dict[str, int] = {}  # number of instances that the worker knows, by name

    # ------------------------------------------------------------------------ the protocol

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        if self.lost:
            return self._refused(op, self.lost, Code.PROCESS_ENDED)
        try:
            if op.kind is OpKind.EXEC:
                return self._arm(op, now_ns)
            self._copies.begin(op)
        except DeviceFault as fault:
            self._lose(fault)
            if op.kind is OpKind.EXEC and not self._reports(op):
                return self._refused(op, self.lost, Code.PROCESS_ENDED)
        return None

    def withdraw(self, op_id: int) -> OpDone | None:
        return self._exec.withdraw(op_id)

    def poll(self, *, now_ns: int) -> list[OpDone]:
        try:
            if not self.lost:
                self._exec.turn()
                self._copies.turn()
        except DeviceFault as fault:
            self._lose(fault)
        done = [*self._exec.done, *self._copies.done]
        self._exec.done.clear()
        self._copies.done.clear()
        return done

    def next_event_ns(self) -> int | None:
        if self._copies.active or self._copies.done:
            return 0
        return self._exec.next_event_ns()

    # ------------------------------------------------------------------- what the loop asks

    @property
    def idle(self) -> bool:
        """True if nothing runs, is armed or is copied."""
        return self._exec.idle and not self._copies.active

    @property
    def running(self) -> bool:
        return self._exec.running

    @property
    def copying(self) -> bool:
        return self._copies.active

    def spare_ns(self) -> int:
        """For how long the exec lane can spare the thread."""
        quiet_ns = self._exec.quiet_until_ns()
        return _LONG_NS if quiet_ns is None else quiet_ns - self._clock()

    def spin(self, until_ns: int) -> None:
        """Wait for the exec lane until `until_ns` at the latest, and let it start what is due."""
        if self.lost:
            return
        try:
            self._exec.spin(until_ns)
        except DeviceFault as fault:
            self._lose(fault)

    # ---------------------------------------------------------------- what the backend asks

    def evict(self, model_id: int) -> None:
        self._copies.evict(model_id)

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._copies.keep_inputs(action_id, frames)

    def drop_inputs(self, action_id: int) -> None:
        self._copies.drop(action_id)

    def take_outputs(self, action_id: int) -> Sequence[Frame]:
        return self._copies.take_outputs(action_id)

    @property
    def free_pages(self) -> int:
        return self._copies.pages.free_pages

    def overwritten(self, name: str) -> None:
        """The active weights of `name` are those of no instance any more (the model was measured)."""
        self._exec.overwritten(name)

    def uses(self, program: Program) -> bool:
        """True if something of `program` or its twin runs, is armed, or is copied to or from their buffers."""
        twin = program.urgent
        if twin is not None and self.uses(twin):
            return True
        return self._exec.uses(program) or self._copies.uses(program)

    # ------------------------------------------------------------------------------- inside

    def _arm(self, op: Op, now_ns: int) -> OpDone | None:
        prepared = self._programs.get(op.model_name)
        if prepared is None:
            return self._refused(op, f"model {op.model_name!r} is not prepared")
        try:
            of = prepared.class_of(op.batch_size, op.length)
        except ValueError as error:
            return self._refused(op, str(error))
        program = side_of(prepared, op.priority, of)
        stay = (
            program.keeps_weights
            and program.weights_bytes > self._stay_bytes
            and self.instances.get(op.model_name) == 1
        )
        try:
            weights = self._copies.weights_of(op.model_id, program.active, stay=stay)
        except KeyError:
            reason = f"the weights of model id {op.model_id} are not here"
            return self._refused(op, reason, Code.EXEC_WEIGHTS_MISSING)
        buffers = self._copies.buffers_of(op.action_id)
        if buffers is not None and buffers not in program.sets(of):
            reason = f"{op.model_name} was prepared anew after its inputs came"
            return self._refused(op, reason, Code.CANCELLED)  # another try brings them again
        urgent = program is not prepared
        self._exec.arm(op, program, of, buffers, weights, now_ns=now_ns, urgent=urgent)
        return None

    def _refused(self, op: Op, reason: str, code: Code = Code.RUNTIME_ERROR) -> OpDone:
        return op_failed(op, code, reason, self._clock())

    def _reports(self, op: Op) -> bool:
        return any(done.op_id == op.op_id for done in self._exec.done)

    def _lose(self, fault: DeviceFault) -> None:
        self.lost = str(fault)
        self._exec.fail_all(self.lost)
        self._copies.fail_all(self.lost)
