"""A worker's brain round emulated slots of a host, in virtual time, and a controller that a test plays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from slosched.codes import Code
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.emulated_calls import (
    AwaitAll,
    EmulatedFunction,
    EmulatedHost,
    Run,
    Script,
    Step,
    mark_of,
    prepare_function,
)
from slosched.core.worker.interface import (
    DeviceEvent,
    DropInputs,
    Effect,
    EndCall,
    FromController,
    Op,
    OpDone,
    PrepareModel,
    ToController,
    op_failed,
)
from slosched.core.worker.stepping import Stepper
from slosched.messages import (
    PROTOCOL_VERSION,
    Call,
    CallResult,
    ChildReply,
    ChildRequest,
    ControllerHello,
    ControllerToWorker,
    ErrorResult,
    FunctionInfo,
    GpuInfo,
    Heartbeat,
    LoadModel,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    WorkerWelcome,
)
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
PEER = b"controller"
FOREVER_NS = 2**62
COLD_NS = 3 * MS

Sent = TypeVar("Sent")
ALL = AwaitAll()


def function(name: str, *steps: Step, **more: Any) -> EmulatedFunction:
    """A function with one script."""
    return EmulatedFunction(name=name, scripts=(Script(steps),), cold_ns=COLD_NS, **more)


class ArmingHost(EmulatedHost):
    """Takes one op more than it runs, as a GPU that starts each by itself does."""

    arm_ahead_ns = MS

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.held: list[Op] = []

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        if self.running < self.slots and op.earliest_ns <= now_ns:
            return super().launch(op, now_ns=now_ns)
        self.held.append(op)
        return None

    def withdraw(self, op_id: int) -> OpDone | None:
        for op in self.held:
            if op.op_id == op_id:
                self.held.remove(op)
                return op_failed(op, Code.CANCELLED, "it was taken back", 0)
        return None

    def poll(self, *, now_ns: int) -> list[DeviceEvent]:
        events = super().poll(now_ns=now_ns)
        while self.held and self.running < self.slots and self.held[0].earliest_ns <= now_ns:
            super().launch(self.held.pop(0), now_ns=now_ns)
            events += super().poll(now_ns=now_ns)
        return events

    def next_event_ns(self) -> int | None:
        due_ns = super().next_event_ns()
        if not self.held or self.running >= self.slots:
            return due_ns
        held_ns = self.held[0].earliest_ns
        return held_ns if due_ns is None else min(due_ns, held_ns)


@dataclass
class CallingWorker:
    """`sent` has what went to the controller, in order, without heartbeats.

    The functions have the model ids 0, 1, ... in their order, and are ready after `serving`.
    """

    functions: Sequence[EmulatedFunction]
    slots: int = 1
    most_calls: int = 256
    now: int = NS_PER_S
    sent: list[Any] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    begun: list[bytes] = field(default_factory=list)
    session: int = -1
    next_action: int = 0
    on_sent: Callable[[Any], None] = lambda message: None
    host_type: type[EmulatedHost] = EmulatedHost

    def __post_init__(self) -> None:
        self.host = self.host_type(
            self.functions, self.slots, tag=5, on_begin=lambda name, mark: self.begun.append(mark)
        )
        names = [each.name for each in self.functions]
        self.brain = WorkerBrain(
            [
                GpuInfo(
                    gpu_id=0, name="host", pages=100, page_bytes=1000, slots=self.slots, host=True
                )
            ],
            [*names, "net"],
            incarnation=100,
            version="test",
            host="here",
            pid=1,
            device="emulated",
            functions=names,
            most_calls=self.most_calls,
        )
        self.stepper = Stepper(self.brain, {0: self.host}, self._perform)

    def _perform(self, effect: Effect, now_ns: int) -> None:
        self.effects.append(effect)
        if isinstance(effect, ToController):
            message = effect.message
            if isinstance(message, ChildRequest):
                assert effect.output_of is not None
                self.host.payload(effect.output_of, message.child)
            elif isinstance(message, CallResult) and effect.output_of is not None:
                self.host.take_result(effect.output_of)
            if not isinstance(message, Heartbeat):
                self.sent.append(message)
                self.on_sent(message)
        elif isinstance(effect, PrepareModel):
            named = next(each for each in self.functions if each.name == effect.name)
            self.stepper.handle(prepare_function(named, effect, now_ns=now_ns), now_ns=now_ns)
        elif isinstance(effect, DropInputs):
            self.host.drop_inputs(effect.action_id)
        elif isinstance(effect, EndCall):
            self.host.end(effect.action_id, effect.reason, now_ns=now_ns)

    def give(self, message: ControllerToWorker, *frames: int) -> int | None:
        """Hand over a message and do what follows at once. `frames`: bytes behind it."""
        key = self.stepper.handle(FromController(PEER, message, frames), now_ns=self.now)
        if key is not None and isinstance(message, ChildReply):
            self.host.deliver(
                key, message.child, code=message.code, reason=message.reason, mark=None
            )
        elif key is not None and isinstance(message, Call):
            mark = mark_of(0, message.action_id.to_bytes(8, "big"))
            self.host.keep_inputs(key, mark)
        self.stepper.step(self.now)
        return key

    def run(self, duration_ns: int) -> None:
        """Let time pass."""
        self.now += duration_ns
        self.stepper.run_until(self.now)

    def hello(self, incarnation: int = 7, times_lost: int = 0) -> WorkerWelcome:
        self.give(ControllerHello(PROTOCOL_VERSION, incarnation, times_lost))
        welcome = self.take(WorkerWelcome)
        self.session = welcome.session
        return welcome

    def serving(self) -> CallingWorker:
        self.hello()
        for model_id, each in enumerate(self.functions):
            self.load_model(each.name, model_id)
            assert self.take(LoadModelResult).function == each.info
            self.load_weights(model_id)
            self.run(COLD_NS)
            self.take(LoadWeightsResult)
        assert self.sent == []
        return self

    def load_model(self, name: str, model_id: int) -> None:
        message = LoadModel(
            session=self.session,
            action_id=self._number(),
            earliest_ns=0,
            latest_ns=FOREVER_NS,
            name=name,
            model_id=model_id,
            copies=1,
            max_batch=1,
            max_exec_ns=FOREVER_NS,
        )
        self.give(message)

    def load_weights(self, model_id: int) -> None:
        message = LoadWeights(
            session=self.session,
            action_id=self._number(),
            earliest_ns=0,
            latest_ns=FOREVER_NS,
            model_id=model_id,
            gpu_id=0,
            expected_duration_ns=0,
        )
        self.give(message)

    def call(self, model_id: int = 0, *, frames: tuple[int, ...] = (16,), **more: Any) -> int:
        """Send a Call; returns its action id."""
        number = self._number()
        fields: dict[str, Any] = {
            "earliest_ns": 0,
            "latest_ns": FOREVER_NS,
            "deadline_ns": self.now + NS_PER_S,
            "gpu_id": 0,
            "input_size": 16,
        } | more
        message = Call(
            session=self.session,
            action_id=number,
            model_id=model_id,
            call_id=1000 + number,
            expected_duration_ns=MS,
            **fields,
        )
        self.give(message, *frames)
        return number

    def reply(self, action_id: int, child: int, code: int = 0, reason: str = "") -> int | None:
        """Answer a child."""
        message = ChildReply(
            session=self.session, action_id=action_id, child=child, code=code, reason=reason
        )
        return self.give(message)

    def take(self, kind: type[Sent]) -> Sent:
        """The next message that was sent, which is a `kind`."""
        message = self.sent.pop(0)
        assert isinstance(message, kind), message
        return message

    def ended(self, code: int, action_id: int | None = None) -> str:
        """The next message is an error with `code`; returns its reason."""
        error = self.take(ErrorResult)
        assert error.code == code, error
        assert action_id in (None, error.action_id), error
        return error.reason

    def _number(self) -> int:
        self.next_action += 1
        return self.next_action


def leaf(ns: int = 2 * MS, *more: Step, **info: object) -> CallingWorker:
    return CallingWorker([function("leaf", Run(ns), *more, info=FunctionInfo(**info))]).serving()  # type: ignore[arg-type]


def parent(*steps: Step, slots: int = 1, **more: Any) -> CallingWorker:
    functions = [function("parent", *steps), function("leaf", Run(2 * MS))]
    return CallingWorker(functions, slots, **more).serving()


def nothing_left(worker: CallingWorker) -> None:
    """Nothing runs, waits or is kept."""
    assert worker.sent == []
    assert worker.brain.idle and not worker.brain._ledger.calls.begun
    assert (worker.host.running, worker.host.unfinished, worker.host.frames_kept) == (0, 0, 0)
