"""The processes of a worker's models, as its loop sees them: what each was asked, what it holds, how it ends.

`Processes` has one `ModelProcess` for each name that is loaded, and at most a few `Preparation`s beside.
Nothing here waits: `step` takes what has come, and ends what has been silent for too long. A model's
process that ends costs what it was working on; another is started at once, in the background, and later
if that ends soon, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.config import ModelProfile
from slosched.core.worker.interface import DeviceEvent, Op, OpDone, OpKind, WeightsLost
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.children import ChildRunner
from slosched.daemon.backends.cpu import wire
from slosched.daemon.backends.cpu.children import Nursery
from slosched.daemon.backends.cpu.slots import Slot
from slosched.daemon.backends.layout import Layouts
from slosched.daemon.repository.listing import Version
from slosched.messages import Span
from slosched.units import NS_PER_S

#: A preparation that is silent for this time hangs. Building a large model takes a minute or two.
SILENT_NS = 120 * NS_PER_S
#: An op hangs that takes four times what was measured and this time more.
_OVERDUE_NS = 4 * NS_PER_S
#: Slots of one batch class that are kept for the next batch.
_SPARE_SLOTS = 4
#: A process that lived for this time is started again at once; else after as long as it took to build, so that
#: no more than half of the time goes into that. One that cannot be built waits twice as long each time.
_STEADY_NS = 10 * NS_PER_S
_FIRST_PAUSE_NS = NS_PER_S // 2
_LONGEST_PAUSE_NS = 30 * NS_PER_S
_NEVER_NS = 2**63 - 1


class Preparation:
    """A child that builds `order.name`, and checks and measures it unless its profile is known.

    Once `over`, either `result` is there, and the child can serve, or `code` and `reason` say why not.
    `note` gets a line for each batch size; `when_over` is called by Processes.step, once.
    """

    def __init__(
        self,
        child: ChildRunner,
        order: wire.Prepare,
        *,
        now_ns: int,
        silent_ns: int,
        note: Callable[[str], None] | None = None,
        when_over: Callable[[Preparation], None] | None = None,
    ) -> None:
        self.child, self.name = child, order.name
        self.when_over = when_over
        self.result: wire.Prepared | None = None
        self.code, self.reason = 0, ""
        self._silent_ns, self._note = silent_ns, note
        self.due_ns = now_ns + silent_ns
        child.send(packets.encode(order))

    @property
    def over(self) -> bool:
        return self.result is not None or self.code != 0

    def hear(self, now_ns: int) -> None:
        """Take what the child said; end it if it has been silent for too long."""
        while self.child.inbox and not self.over:
            self.due_ns = now_ns + self._silent_ns
            try:
                message = wire.from_child.decode(self.child.inbox.popleft())
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.child.kill(f"it sent nonsense ({error})")
                break
            if isinstance(message, wire.Prepared):
                self.result = message
            elif isinstance(message, wire.PrepareFailed):
                self._fail(message.code or Code.RUNTIME_ERROR, message.words)
                self.child.kill("its model cannot be prepared")
            elif isinstance(message, wire.Progress) and message.words and self._note is not None:
                self._note(message.words)
        if not self.over and not self.child.ended and now_ns >= self.due_ns:
            self.child.kill(f"ended after {self._silent_ns // NS_PER_S} s in which it said nothing")
        if not self.over and self.child.ended:
            self._fail(
                Code.MODEL_PROCESS_ENDED,
                f"the process of {self.name!r} ended while the model was prepared: {self.child.ended}",
            )

    def _fail(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason

    def cancel(self) -> None:
        self.child.kill("no request waits for it any more")


@dataclass(slots=True)
class Known:
    """What was measured of one model: it outlives its processes."""

    prepared: wire.Prepared
    max_batch: int
    max_exec_ns: int
    version: Version | None = None  # of the repository, as it was built

    @property
    def profile(self) -> ModelProfile:
        return self.prepared.profile

    def suffices(self, max_batch: int, max_exec_ns: int) -> bool:
        return max_batch <= self.max_batch and max_exec_ns <= self.max_exec_ns

    def order(self, name: str) -> wire.Prepare:
        """To build the model without measuring it again."""
        return wire.Prepare(
            name=name,
            batches=(),
            max_exec_ns=0,
            known=self.profile,
            own_state=self.prepared.own_state,
            version=self.version,
            digest=self.prepared.digest,
        )


@dataclass(slots=True)
class _Running:
    op: Op
    begin_ns: int
    limit_ns: int
    slot: Slot | None


class ModelProcess:
    """The process that serves the model `name`. `child` has built it already."""

    def __init__(
        self, nursery: Nursery, name: str, known: Known, child: ChildRunner, *, now_ns: int
    ) -> None:
        self._nursery, self.name = nursery, name
        self.known = known
        self.child = child
        self.generation = 0
        self._since_ns = now_ns
        self._rebuilding: Preparation | None = None
        self._why = ""  # how the last process ended, until the next one is ready
        self._again_ns, self._pause_ns = _NEVER_NS, _FIRST_PAUSE_NS
        self._build_ns = 0  # what the last build of a process took
        self._held: set[int] = set()  # model ids
        self._running: dict[int, _Running] = {}  # by op id
        self._spare: dict[tuple[int, int], list[Slot]] = {}  # by batch size and length
        self._next_slot = 0
        profile = known.profile
        self._layouts = Layouts(
            profile.takes, profile.gives, known.prepared.pads, scored=bool(profile.score)
        )

    # ------------------------------------------------------------------------------ questions

    @property
    def ready(self) -> bool:
        return not self._why and not self.child.ended

    @property
    def due_ns(self) -> int:
        """When `step` has something to do by itself."""
        limits = [running.limit_ns for running in self._running.values()]
        if self._rebuilding is not None:
            limits.append(self._rebuilding.due_ns)
        return min(limits, default=self._again_ns)

    def absent(self) -> str:
        """Why it cannot do what it is asked."""
        return (
            f"the process of {self.name!r} ended ({self._why or self.child.ended}) and is being started "
            "again"
        )

    def batch_class(self, batch_size: int, length: int) -> int:
        """The batch size that runs, in the class of `length`. Raises ValueError if there is no such class."""
        profile = self.known.profile
        if length not in (profile.lengths or (0,)):
            raise ValueError(f"{self.name!r} has no length class {length}")
        fitting = [batch for batch in profile.times(length) if batch >= batch_size]
        return min(fitting, default=batch_size)

    # ----------------------------------------------------------------------------------- slots

    def take_slot(self, batch: int, length: int) -> Slot:
        """Memory for a batch of this class. Raises OSError or ValueError if there is none."""
        spare = self._spare.get((batch, length))
        if spare:
            return spare.pop()
        self._next_slot += 1
        return Slot(self._next_slot, batch, self._layouts.at(length), self.generation)

    def give_back(self, slot: Slot) -> None:
        """The slot is not needed any more, once what runs on it has ended."""
        if slot.running:
            slot.dropped = True
            return
        spare = self._spare.setdefault((slot.batch, slot.length), [])
        if slot.generation == self.generation and len(spare) < _SPARE_SLOTS:
            spare.append(slot)
            return
        if slot.shared and slot.generation == self.generation:
            self.child.send(packets.encode(wire.DropSlot(slot.number)))
        slot.close()

    # ------------------------------------------------------------------------------------- ops

    def load(self, op: Op, *, now_ns: int) -> None:
        """Begin a LOAD_WEIGHTS; `step` reports its end. The process must be ready."""
        self._begin(op, self.known.profile.weights_ns, None, now_ns)
        self.child.send(packets.encode(wire.Load(op.op_id, op.model_id)))

    def execute(self, op: Op, slot: Slot, *, now_ns: int) -> None:
        """Begin an EXEC on the rows in `slot`; `step` reports its end. The process must be ready."""
        if not slot.shared:
            message = wire.AddSlot(
                slot.number, slot.batch, slot.length, slot.outputs_at, slot.nbytes
            )
            self.child.send(packets.encode(message), (slot.fd,))
            slot.shared = True
        slot.running = True
        expected_ns = self.known.profile.times(slot.length).get(slot.batch, _OVERDUE_NS)
        self._begin(op, expected_ns, slot, now_ns)
        given = tuple(row for row, size in enumerate(op.input_sizes) if size)
        answers = op.request_count if given else 0
        self.child.send(
            packets.encode(wire.Exec(op.op_id, op.model_id, slot.number, given, answers))
        )

    def _begin(self, op: Op, expected_ns: int, slot: Slot | None, now_ns: int) -> None:
        limit_ns = now_ns + 4 * expected_ns + _OVERDUE_NS
        self._running[op.op_id] = _Running(op, now_ns, limit_ns, slot)

    def evict(self, model_id: int) -> None:
        self._held.discard(model_id)
        if self.ready:
            self.child.send(packets.encode(wire.Evict(model_id)))

    def measured_anew(self, known: Known) -> None:
        """Another process measured the model for larger batches."""
        self.known = known
        if self.ready:
            classes = wire.Classes(known.profile, known.prepared.own_state)
            self.child.send(packets.encode(classes))

    def end(self) -> None:
        """The model is not needed any more."""
        self.child.kill("the model was unloaded")
        if self._rebuilding is not None:
            self._rebuilding.cancel()
        self._close_spare()

    # ------------------------------------------------------------------------------------ step

    def step(self, now_ns: int, silent_ns: int) -> list[DeviceEvent]:
        """What has ended since the last call. Ends a process that hangs; starts another for one that ended."""
        if self._rebuilding is not None:
            self._step_rebuilding(now_ns)
            return []
        events: list[DeviceEvent] = []
        while self.child.inbox:
            try:
                message = wire.from_child.decode(self.child.inbox.popleft())
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.child.kill(f"it sent nonsense ({error})")
                break
            if isinstance(message, wire.Done) and message.op_id in self._running:
                events.append(self._done(message, now_ns))
        if not self.child.ended:
            for running in self._running.values():
                if now_ns >= running.limit_ns:
                    took_s = (now_ns - running.begin_ns) / NS_PER_S
                    self.child.kill(
                        f"ended after {took_s:.1f} s in which one {running.op.kind.name} did not end"
                    )
                    break
        if self.child.ended and not self._why:
            events += self._ended(now_ns)
        if self._why and now_ns >= self._again_ns:
            self._again_ns, self._since_ns = _NEVER_NS, now_ns
            self._rebuilding = Preparation(
                self._nursery.spawn(self.name),
                self.known.order(self.name),
                now_ns=now_ns,
                silent_ns=silent_ns,
            )
        return events

    def _done(self, message: wire.Done, now_ns: int) -> OpDone:
        running = self._running.pop(message.op_id)
        op, slot = running.op, running.slot
        if slot is not None:
            slot.running = False
            if slot.dropped:
                self.give_back(slot)
        if op.kind is OpKind.LOAD_WEIGHTS and not message.code:
            self._held.add(op.model_id)
        # From the launch on, since the device was taken from then on. A process may say what it likes.
        end_ns = min(max(message.end_ns, running.begin_ns), now_ns)
        span = Span(running.begin_ns, end_ns, end_ns - running.begin_ns)
        return OpDone(op.op_id, span, code=message.code, reason=message.words[:400])

    def _ended(self, now_ns: int) -> list[DeviceEvent]:
        """The process is gone: what it worked on fails, what it held is lost."""
        self._why = self.child.ended
        self.generation += 1
        self._close_spare()
        steady = now_ns - self._since_ns >= _STEADY_NS
        self._again_ns = now_ns + (0 if steady else min(self._build_ns, _LONGEST_PAUSE_NS))
        self._nursery.announce(f"{self.name}: its process ended ({self._why}); another is started")
        events: list[DeviceEvent] = []
        gpu_id = 0
        for op_id, running in self._running.items():
            gpu_id = running.op.gpu_id
            if running.slot is not None:
                running.slot.running = False
                if running.slot.dropped:
                    self.give_back(running.slot)
            span = Span(running.begin_ns, now_ns, now_ns - running.begin_ns)
            reason = f"the process of {self.name!r} ended: {self._why}"
            events.append(OpDone(op_id, span, code=Code.MODEL_PROCESS_ENDED, reason=reason))
        self._running.clear()
        if self._held:
            events.append(WeightsLost(gpu_id, tuple(sorted(self._held))))
            self._held.clear()
        return events

    def _step_rebuilding(self, now_ns: int) -> None:
        rebuilding = self._rebuilding
        assert rebuilding is not None
        rebuilding.hear(now_ns)
        if not rebuilding.over:
            return
        self._rebuilding = None
        if rebuilding.result is not None:
            self._build_ns = now_ns - self._since_ns
            self.child, self._why, self._since_ns = rebuilding.child, "", now_ns
            self._pause_ns = _FIRST_PAUSE_NS
        else:
            self._why = rebuilding.reason
            self._nursery.announce(f"{self.name}: it cannot be started again: {self._why}")
            self._again_ns = now_ns + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, _LONGEST_PAUSE_NS)

    def _close_spare(self) -> None:
        for slots in self._spare.values():
            for slot in slots:
                slot.close()
        self._spare.clear()


class Processes:
    """Every process of one worker's models. `nursery` starts them."""

    def __init__(
        self, nursery: Nursery, *, clock: Clock = now_ns, silent_ns: int = SILENT_NS
    ) -> None:
        self.nursery = nursery
        self._clock, self._silent_ns = clock, silent_ns
        self.by_name: dict[str, ModelProcess] = {}
        self.preparations: list[Preparation] = []

    def prepare(
        self,
        order: wire.Prepare,
        *,
        note: Callable[[str], None] | None = None,
        when_over: Callable[[Preparation], None] | None = None,
    ) -> Preparation:
        """Start a child that builds a model. It is heard in `step`, which calls `when_over` when it is over."""
        preparation = Preparation(
            self.nursery.spawn(order.name),
            order,
            now_ns=self._clock(),
            silent_ns=self._silent_ns,
            note=note,
            when_over=when_over,
        )
        self.preparations.append(preparation)
        return preparation

    def serve(self, name: str, known: Known, child: ChildRunner) -> ModelProcess:
        """`child` has built the model and serves it from now on."""
        process = ModelProcess(self.nursery, name, known, child, now_ns=self._clock())
        self.by_name[name] = process
        return process

    def end(self, name: str) -> None:
        process = self.by_name.pop(name, None)
        if process is not None:
            process.end()

    @property
    def due_ns(self) -> int | None:
        """When `step` has something to do; 0: now."""
        if self.nursery.ready:
            return 0
        due_ns = min((process.due_ns for process in self.by_name.values()), default=_NEVER_NS)
        for preparation in self.preparations:
            due_ns = min(due_ns, preparation.due_ns)
        return None if due_ns == _NEVER_NS else due_ns

    def step(self) -> list[DeviceEvent]:
        """Take what the children said; returns what the worker's brain must know."""
        self.nursery.step()
        now = self._clock()
        for preparation in self.preparations:
            preparation.hear(now)
        ended = [each for each in self.preparations if each.over]
        if ended:
            self.preparations = [each for each in self.preparations if not each.over]
        for preparation in ended:
            if preparation.when_over is not None:
                preparation.when_over(preparation)
        events: list[DeviceEvent] = []
        for process in self.by_name.values():
            events += process.step(now, self._silent_ns)
        return events

    def close(self) -> None:
        """End every process; bounded by two seconds."""
        for name in list(self.by_name):
            self.end(name)
        self.preparations.clear()
        self.nursery.close()
