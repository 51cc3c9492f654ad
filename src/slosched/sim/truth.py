"""What really happened, whatever the reports say: checks that need no scheduler's view.

A WorkerTruth watches one worker process at its devices, in true time:

- each lane of a GPU holds no more ops than it has slots, and the segments of execs never overlap;
- weights on a GPU never take more pages than it has, and no exec runs on weights that are not there;
- an exec starts within its action's window, except for the error of the worker's clock: the error that it
  states, its possible drift since, and the jumps injected into it, until the next heartbeat was answered;
- a running exec keeps its weights until it ends, the worker's count of its pages is right, and it takes only
  actions of the open session.

A ClientTruth watches the clients' connections: each request that reaches a controller is answered at most once,
however often it comes before that, and exactly once in the end, unless that controller died or had given the
client up. An answer is right about its deadline, and no client gets the answer to a load that it did not ask
for. It counts what it saw, so that a test can make sure that the fuzzer reaches the cases that matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slosched.codes import ActionType, Code
from slosched.config import GpuProfile
from slosched.core.clock_sync import UNKNOWN_ERROR_NS
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import (
    ActionRecord,
    ClientLost,
    Event,
    FromClient,
    FromWorker,
    RequestRecord,
)
from slosched.core.timeline import Timeline
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.emulated import EmulatedGpu
from slosched.core.worker.interface import (
    Device,
    DeviceEvent,
    Effect,
    EvictPages,
    Op,
    OpDone,
    OpKind,
    ToController,
    WeightsLost,
    joined,
)
from slosched.core.worker.pipeline import URGENT_AT_ONCE
from slosched.messages import (
    ClientHello,
    ControllerToWorker,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Infer,
    InferReply,
    InferRequest,
    InferResult,
    LoadModelReply,
    LoadModelRequest,
    Refused,
    UnloadModelReply,
    UnloadModelRequest,
    WorkerWelcome,
)
from slosched.sim.cluster import SimCluster
from slosched.sim.stage_truth import what_is_wrong
from slosched.units import NS_PER_S, format_duration

#: The rounding error of a window's conversions.
_ROUNDING_NS = 4
#: A worker may use a clock exchange of this age.
_EXCHANGES_KEPT_NS = 15 * NS_PER_S
#: First the weights of an instance are evicted and then it is unloaded, each by a look once a second.
_UNLOADS_TAKE_NS = 3 * NS_PER_S
#: Heartbeats that may still be answered.
_BEATS_KEPT = 64


class WorkerTruth:
    """One process, called `name`, with GPUs of `profile`. `now_ns` is the true time."""

    def __init__(
        self, name: str, profile: GpuProfile, now_ns: Callable[[], int], *, drift_ppb: int = 0
    ) -> None:
        self.name = name
        self.now_ns = now_ns
        self._profile = profile
        self._jumps_ns = 0  # in all
        self._unnoticed_ns = (
            0  # the part of these that no exchange of heartbeats can have shown yet
        )
        self._beats: dict[int, None] = {}  # local times of heartbeats sent since the last jump
        self._session = -1  # the open one; -1: none was opened yet
        self._drift_ns = abs(drift_ppb) * _EXCHANGES_KEPT_NS // NS_PER_S
        #: By key: the Infer, the error of the clock it was converted with, and the jumps until then.
        self._windows: dict[int, tuple[Infer, int, int]] = {}
        self._gpus: dict[int, _WatchedGpu] = {}

    def devices(self, gpus: Mapping[int, EmulatedGpu]) -> Mapping[int, Device]:
        self._gpus = {g: _WatchedGpu(self, g, gpu, self._profile) for g, gpu in gpus.items()}
        return self._gpus

    def heard(self, message: ControllerToWorker, local_ns: int, clock_error_ns: int) -> None:
        if not isinstance(message, HeartbeatAck):
            return
        sent_ns = message.heartbeat_sent_ns
        half_ns = (local_ns - sent_ns + 1) // 2
        if half_ns < 0 or sent_ns not in self._beats:
            return  # the exchange began before the clock jumped
        # The new exchange contradicts the others by more than their bounds allow, or by no more.
        first = clock_error_ns == UNKNOWN_ERROR_NS
        self._unnoticed_ns = min(self._unnoticed_ns, 0 if first else clock_error_ns + half_ns)

    def accepted(self, key: int, message: ControllerToWorker, clock_error_ns: int) -> None:
        session = getattr(message, "session", self._session)
        if self._session not in (-1, session):
            self.fail(f"an action of session {session} is taken in session {self._session}")
        if isinstance(message, Infer):
            error_ns = clock_error_ns + self._unnoticed_ns
            self._windows[key] = (message, error_ns, self._jumps_ns)

    def performed(self, effect: Effect) -> None:
        if isinstance(effect, EvictPages):
            self._gpus[effect.gpu_id].gives_up(effect.model_id)
        elif isinstance(effect, ToController):
            message = effect.message
            if isinstance(message, WorkerWelcome):
                self._session = message.session
            elif isinstance(message, Heartbeat):
                if len(self._beats) >= _BEATS_KEPT:
                    del self._beats[next(iter(self._beats))]
                self._beats[message.sent_ns] = None

    def stepped(self, brain: WorkerBrain) -> None:
        """The worker's count of its pages agrees with its devices."""
        for gpu_id, gpu in self._gpus.items():
            if not gpu.changed:
                continue
            gpu.changed = False
            free = self._profile.pages - gpu.pages_taken
            if brain.free_pages(gpu_id) != free:
                self.fail(
                    f"it counts {brain.free_pages(gpu_id)} free pages on GPU {gpu_id}, and there are {free}"
                )

    def jumped(self, by_ns: int) -> None:
        self._jumps_ns += abs(by_ns)
        self._unnoticed_ns += abs(by_ns)
        self._beats.clear()

    def starts(self, op: Op) -> None:
        """An exec starts now: may it?"""
        infer, error_ns, jumps_ns = self._windows.pop(op.action_id)
        now_ns = self.now_ns()
        slack_ns = error_ns + self._jumps_ns - jumps_ns + self._drift_ns + _ROUNDING_NS
        if not infer.earliest_ns - slack_ns <= now_ns <= infer.latest_ns + slack_ns:
            self.fail(
                f"action {infer.action_id} starts at {now_ns}, outside {infer.earliest_ns}.."
                f"{infer.latest_ns}, and its clock is off by {format_duration(slack_ns)} at most"
            )

    def fail(self, what: str) -> None:
        raise InvariantViolated(f"{self.name}, by its own truth: {what}")


class _WatchedGpu:
    """An EmulatedGpu under observation. `held` has what holds pages: model id -> (pages, loaded)."""

    def __init__(
        self, truth: WorkerTruth, gpu_id: int, gpu: EmulatedGpu, profile: GpuProfile
    ) -> None:
        self.steady, self.free_copies = gpu.steady, gpu.free_copies
        self.arm_ahead_ns = gpu.arm_ahead_ns
        self.next_event_ns = gpu.next_event_ns
        self.held: dict[int, tuple[int, bool]] = {}
        self._truth, self._gpu_id, self._gpu, self._profile = truth, gpu_id, gpu, profile
        self._launched: dict[int, Op] = {}  # by op id, until it is done
        self._execs = Timeline()
        self.changed = False  # `held` has changed since the last step
        self._given_up: Op | None = None  # runs on weights that were given up, and not loaded anew

    def withdraw(self, op_id: int) -> OpDone | None:
        done = self._gpu.withdraw(op_id)
        if done is not None:
            self._ended(done)
        return done

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        others = [other for other in self._launched.values() if other.kind is op.kind]
        if len(others) >= self._slots(op.kind) + self._urgent_slots(op):
            self._truth.fail(
                f"{op.kind.name} of action {op.action_id} begins on GPU {self._gpu_id} while that of "
                f"action {others[0].action_id} runs"
            )
        self._launched[op.op_id] = op
        if op.kind is OpKind.LOAD_WEIGHTS:
            if self._given_up is not None and self._given_up.model_id == op.model_id:
                self._given_up = None  # a reload: what runs is going to fail, and says so
            self._take_pages(op)
        elif op.kind is OpKind.EXEC:
            if not self.held.get(op.model_id, (0, False))[1]:
                self._truth.fail(f"action {op.action_id} runs without the weights of {op.model_id}")
            self._truth.starts(op)
        done = self._gpu.launch(op, now_ns=now_ns)
        if done is not None:
            self._ended(done)
        return done

    def poll(self, *, now_ns: int) -> Sequence[DeviceEvent]:
        events = self._gpu.poll(now_ns=now_ns)
        for event in events:
            if isinstance(event, WeightsLost):
                for model_id in event.model_ids:
                    # What is still loading goes to the process that comes next.
                    if self.held.get(model_id, (0, False))[1]:
                        del self.held[model_id]
                        self.changed = True
            elif isinstance(event, OpDone):
                self._ended(event)
        return events

    def _slots(self, kind: OpKind) -> int:
        """How many ops of a kind the GPU may hold: one runs, and an exec may be armed behind it."""
        return 1 + (kind is OpKind.EXEC and self.arm_ahead_ns > 0)

    def _urgent_slots(self, op: Op) -> int:
        """How many more a preemptive lane is given, each more urgent than what it has begun."""
        return URGENT_AT_ONCE if op.priority and self._gpu.preemptive else 0

    def _take_pages(self, op: Op) -> None:
        profile = self._profile
        pages = profile.model(op.model_name).pages(profile.page_bytes)
        self.held[op.model_id] = (pages, False)
        self.changed = True
        if self.pages_taken > profile.pages:
            taken = self.pages_taken
            self._truth.fail(f"GPU {self._gpu_id} holds {taken} of {profile.pages} pages")

    @property
    def pages_taken(self) -> int:
        return sum(pages for pages, _ in self.held.values())

    def gives_up(self, model_id: int) -> None:
        """The weights of the instance are given up."""
        self.held.pop(model_id, None)
        self.changed = True
        for op in self._launched.values():
            if op.kind is OpKind.EXEC and op.model_id == model_id:
                self._given_up = op

    def _ended(self, done: OpDone) -> None:
        op = self._launched.pop(done.op_id)
        if op.kind is OpKind.EXEC:
            self._ran(op, done)
        if op is self._given_up:
            self._truth.fail(
                f"the weights of model {op.model_id} on GPU {self._gpu_id} were given up while action "
                f"{op.action_id} ran"
            )
        if op.kind is OpKind.LOAD_WEIGHTS and op.model_id in self.held and not done.code:
            self.held[op.model_id] = (self.held[op.model_id][0], True)

    def _ran(self, op: Op, done: OpDone) -> None:
        """No segment of an exec overlaps another one, and the exec's span is that of its segments."""
        what = f"the exec of action {op.action_id} on GPU {self._gpu_id}"
        if done.segments and joined(done.segments) != (done.span, done.pause_ns):
            self._truth.fail(f"{what} ran in {done.segments}, and reports {done}")
        for segment in done.segments or (done.span,):
            if segment.duration_ns:
                overlap = self._execs.add(segment.begin_ns, segment.end_ns)
                if overlap:
                    self._truth.fail(f"{what} began at {segment.begin_ns}, {overlap}")


@dataclass
class Sights:
    """How often a run reached the difficult cases.

    Answers whose mark was compared; results that brought outputs; requests that could still be served when
    their client said goodbye, when its connection broke and when it fell silent; Infers that were lost with
    their worker, and how many of these carried several requests; requests that succeeded at a second try;
    unloads that clients asked for and got, and the instances that went with them; workers that joined with
    models, and with weights on their GPUs.
    """

    marks_compared: int = 0
    results_with_outputs: int = 0
    left_by_goodbye: int = 0
    left_by_a_break: int = 0
    left_in_silence: int = 0
    infers_lost: int = 0
    batches_lost: int = 0
    second_tries: int = 0
    unloads: int = 0
    unloaded: int = 0
    taken_over: int = 0
    weights_kept: int = 0

    def request_done(self, record: RequestRecord) -> None:
        self.second_tries += record.code == Code.OK and record.attempts > 1
        if record.departure_ns <= record.arrival_ns + record.slo_ns:
            self.left_by_goodbye += record.reason.endswith("client is gone: it left")
            self.left_by_a_break += record.reason.endswith("client is gone: its connection broke")
            self.left_in_silence += record.reason.endswith("client is gone: it fell silent")

    def action_done(self, record: ActionRecord) -> None:
        lost = record.code == Code.CANCELLED and not record.worker_sent_ns
        if lost and record.action_type == ActionType.INFER:
            self.infers_lost += 1
            self.batches_lost += record.batch_size > 1


class ClientTruth:
    """Counts copies of requests and answers at the controller's end of `cluster`'s clients."""

    def __init__(self, cluster: SimCluster) -> None:
        self._controller = cluster.controller
        self._kernel = cluster.kernel
        #: By client: when it said goodbye, or could not be reached.
        self._left_ns: dict[bytes, int] = {}
        #: By (client, request id): copies that still have no answer, each as the client's session that
        #: answers it.
        self._waiting: dict[tuple[bytes, int], list[object]] = {}
        self._due_ns: dict[tuple[bytes, int], int] = {}  # of those that wait; -1: it named no SLO
        self._models: dict[
            tuple[bytes, int], int
        ] = {}  # of those that wait: the ids that they ask for
        self._loads: set[tuple[bytes, int]] = set()  # the loads that clients asked for
        self._unloads: dict[tuple[bytes, int], str] = {}  # the names that clients want unloaded
        #: Instances that an unload kept, and when, by the names that no client has loaded since.
        self._kept: dict[str, tuple[int, int]] = {}
        self._life, self._event_ns = 1, 0  # of the controller, and its last event
        self.sights = Sights()
        self._controller.on_event = self._arrived
        self._controller.on_reply = self._answered

    def _arrived(self, event: Event) -> None:
        self._note_life()
        if isinstance(event, FromClient) and isinstance(event.message, InferRequest):
            key = (event.client, event.message.request_id)
            known = self._controller.scheduler.clients.get(event.client)
            copies = self._waiting.setdefault(key, [])
            if not any(copy is known for copy in copies):  # a second copy shares the answer
                copies.append(known)
                slo_ns = event.message.slo_ns
                self._due_ns[key] = self._kernel.now_ns + slo_ns if slo_ns else -1
                self._models[key] = event.message.model_id
        elif isinstance(event, FromClient) and isinstance(event.message, LoadModelRequest):
            self._loads.add((event.client, event.message.request_id))
            self._kept.pop(event.message.name, None)
        elif isinstance(event, FromClient) and isinstance(event.message, UnloadModelRequest):
            self._unloads[event.client, event.message.request_id] = event.message.name
        elif isinstance(event, ClientLost) or (
            isinstance(event, FromClient) and isinstance(event.message, Goodbye)
        ):
            self._left_ns[event.client] = self._kernel.now_ns
        elif isinstance(event, FromClient) and isinstance(event.message, ClientHello):
            self._left_ns.pop(event.client, None)
        elif isinstance(event, FromWorker) and isinstance(event.message, WorkerWelcome):
            self.sights.taken_over += bool(event.message.inventory)
            self.sights.weights_kept += any(gpu.resident for gpu in event.message.gpus)
        elif isinstance(event, FromWorker) and isinstance(event.message, InferResult):
            self.sights.results_with_outputs += any(event.message.output_sizes)

    def _note_life(self) -> None:
        """A new controller takes back what was still to be unloaded when the one before it died."""
        life = self._controller.life
        if life and life != self._life:
            self._life, last_ns = life, self._event_ns
            done = {
                n: each for n, each in self._kept.items() if each[1] < last_ns - _UNLOADS_TAKE_NS
            }
            self._kept = done
        self._event_ns = self._kernel.now_ns

    def _answered(self, identity: bytes, message: Any) -> None:
        now_ns = self._kernel.now_ns
        # In the instant in which it leaves, what was decided just before may still go out.
        if isinstance(message, InferReply) and self._left_ns.get(identity, now_ns) < now_ns:
            raise InvariantViolated(
                f"{identity.decode()} has left, and its request {message.request_id} is answered "
                f"with code {message.code} {message.reason}"
            )
        if (
            isinstance(message, LoadModelReply)
            and (identity, message.request_id) not in self._loads
        ):
            raise InvariantViolated(
                f"{identity.decode()} gets an answer to load {message.request_id}, which it did not ask for"
            )
        if isinstance(message, UnloadModelReply):
            self._unloaded(identity, message)
        if isinstance(message, InferReply | Refused) and message.request_id >= 0:
            key = (identity, message.request_id)
            copies = self._waiting.get(key)
            if copies:
                due_ns = self._due_ns[key]
                if isinstance(message, InferReply) and len(copies) == 1 and due_ns >= 0:
                    self._check_verdict(identity, message, due_ns)
                if isinstance(message, InferReply):
                    self._check_stages(identity, message, self._models[key])
                # Where copies came before and after a restart, a controller answers the copy that it got.
                known_now = self._controller.scheduler.clients.get(identity)
                for known in (known_now, None, copies[0]):
                    if any(copy is known for copy in copies):
                        del copies[next(i for i, copy in enumerate(copies) if copy is known)]
                        break
                if not copies:
                    del self._waiting[key], self._due_ns[key], self._models[key]
            elif isinstance(message, InferReply):
                raise InvariantViolated(
                    f"request {message.request_id} of {identity.decode()} is answered more often than it was "
                    f"asked: now with code {message.code} {message.reason}"
                )

    def _unloaded(self, identity: bytes, reply: UnloadModelReply) -> None:
        name = self._unloads.pop((identity, reply.request_id), None)
        if name is None:
            raise InvariantViolated(
                f"{identity.decode()} gets an answer to unload {reply.request_id}, which it did not ask for"
            )
        if reply.code:
            return
        self.sights.unloads += 1
        self.sights.unloaded += reply.unloaded
        self._kept[name] = reply.kept, self._kernel.now_ns
        client = self._controller.scheduler.clients.get(identity)
        if client is not None and any(model.name == name for model in client.models.values()):
            raise InvariantViolated(f"{identity.decode()} unloaded {name!r} and still uses it")

    def check_unloaded(self) -> None:
        """What was unloaded long ago is gone. Raises InvariantViolated if more is there than was kept."""
        models = self._controller.scheduler.cluster.models.values()
        for name, (kept, _) in self._kept.items():
            there = sum(model.name == name for model in models)
            if there > kept:
                raise InvariantViolated(
                    f"{there} instances of {name!r} are there; a client unloaded it long ago, {kept} were kept"
                )

    def _check_verdict(self, identity: bytes, reply: InferReply, due_ns: int) -> None:
        """The answer is right about its deadline."""
        met = not reply.code and self._kernel.now_ns <= due_ns
        if reply.deadline_met != met:
            late_ns = self._kernel.now_ns - due_ns
            raise InvariantViolated(
                f"request {reply.request_id} of {identity.decode()} is answered with code {reply.code}, "
                f"{format_duration(abs(late_ns))} {'after' if late_ns > 0 else 'before'} its deadline, and "
                f"with deadline_met={reply.deadline_met}"
            )

    def _check_stages(self, identity: bytes, reply: InferReply, model_id: int) -> None:
        """The answer tells of the stages of a cascade, in order, and of no others."""
        cascade = self._controller.scheduler.cluster.cascades.by_id.get(model_id)
        wrong = what_is_wrong(reply, None if cascade is None else cascade.spec)
        if wrong:
            raise InvariantViolated(
                f"the answer to request {reply.request_id} of {identity.decode()}: {wrong}"
            )

    def check_all_answered(self) -> None:
        """Nothing is in flight any more. Raises InvariantViolated if requests were forgotten."""
        clients = self._controller.scheduler.clients
        forgotten = [
            key[1]
            for key, copies in self._waiting.items()
            if any(known is not None and known is clients.get(key[0]) for known in copies)
        ]
        if forgotten:
            raise InvariantViolated(f"requests {forgotten[:10]} of the client were never answered")

    def unanswered(self) -> int:
        """Copies that reached a controller and have no answer yet (also of dead controllers)."""
        return sum(len(copies) for copies in self._waiting.values())
