"""What really happened, whatever anybody reports: checks that need no scheduler's view.

A WorkerTruth watches one worker process at its devices, in true time:

- each executor of a GPU runs one op at a time;
- weights on a GPU never take more pages than it has, and no exec runs on weights that are not there;
- an exec starts within its action's window, but for the error of the worker's clock: what it says itself,
  what it can have drifted since, and what its clock was made to jump, until the next heartbeat was answered;
- what runs has its weights until it ends, the worker counts its pages as they are, and it takes no action but
  of the session that is open.

A ClientTruth watches the clients' connections: each request that reaches a controller is answered at most
once, however often it comes before that, and once it is all over, exactly once, unless that controller died
or had given the client up. What an answer says of its deadline is so, and nobody is told of a load that it did
not ask for. It counts what it saw, so that a test can hold the fuzzer to cases that matter.
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
)
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
from slosched.units import NS_PER_S, format_duration

#: Conversions of a window round by so much.
_ROUNDING_NS = 4
#: A worker may go by a clock exchange this old.
_EXCHANGES_KEPT_NS = 15 * NS_PER_S
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
        self._unnoticed_ns = 0  # as much of these as no exchange of heartbeats can have shown yet
        self._beats: dict[int, None] = {}  # local times of heartbeats said since the last jump
        self._session = -1  # that is open; -1: none was yet
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
        """The worker's count of its pages is what its devices hold."""
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
    """An EmulatedGpu, looked at. `held` is what has pages: model id -> (pages, is it all there)."""

    def __init__(
        self, truth: WorkerTruth, gpu_id: int, gpu: EmulatedGpu, profile: GpuProfile
    ) -> None:
        self.steady, self.free_copies = gpu.steady, gpu.free_copies
        self.arm_ahead_ns = gpu.arm_ahead_ns
        self.withdraw = gpu.withdraw
        self.next_event_ns = gpu.next_event_ns
        self.held: dict[int, tuple[int, bool]] = {}
        self._truth, self._gpu_id, self._gpu, self._profile = truth, gpu_id, gpu, profile
        self._running: dict[OpKind, Op] = {}
        self.changed = False  # what is held has changed since the last step
        self._given_up: Op | None = None  # runs on weights that were given up, and not loaded anew

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        other = self._running.get(op.kind)
        if other is not None:
            self._truth.fail(
                f"{op.kind.name} of action {op.action_id} begins on GPU {self._gpu_id} while that of "
                f"action {other.action_id} runs"
            )
        self._running[op.kind] = op
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
            else:
                self._ended(event)
        return events

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
        running = self._running.get(OpKind.EXEC)
        if running is not None and running.model_id == model_id:
            self._given_up = running

    def _ended(self, done: OpDone) -> None:
        op = next(op for op in self._running.values() if op.op_id == done.op_id)
        del self._running[op.kind]
        if op is self._given_up:
            self._truth.fail(
                f"the weights of model {op.model_id} on GPU {self._gpu_id} were given up while action "
                f"{op.action_id} ran"
            )
        if op.kind is OpKind.LOAD_WEIGHTS and op.model_id in self.held and not done.code:
            self.held[op.model_id] = (self.held[op.model_id][0], True)


@dataclass
class Sights:
    """How often a run got into what is hard.

    Answers whose mark was compared; results that brought outputs; requests that could still be served when
    their client said goodbye, when its connection broke and when it fell silent; Infers that were lost with
    their worker, and those of them with several requests aboard; requests that succeeded at a second try;
    unloads that clients asked for and got, and the instances that went with them.
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
        self._left_ns: dict[bytes, int] = {}  # when who said goodbye, or could not be reached
        #: (client, request id) -> copies that still have no answer: each with who answers for it.
        self._waiting: dict[tuple[bytes, int], list[object]] = {}
        self._due_ns: dict[tuple[bytes, int], int] = {}  # of those that wait; -1: no SLO was said
        self._loads: set[tuple[bytes, int]] = set()  # asked for so far
        self._unloads: dict[tuple[bytes, int], str] = {}  # names, asked for so far
        #: Instances that an unload kept, by the names that nobody has loaded since.
        self._kept: dict[str, int] = {}
        self.sights = Sights()
        self._controller.on_event = self._arrived
        self._controller.on_reply = self._answered

    def _arrived(self, event: Event) -> None:
        if isinstance(event, FromClient) and isinstance(event.message, InferRequest):
            key = (event.client, event.message.request_id)
            known = self._controller.scheduler.clients.get(event.client)
            copies = self._waiting.setdefault(key, [])
            if not any(
                copy is known for copy in copies
            ):  # a second copy of one is answered with it
                copies.append(known)
                slo_ns = event.message.slo_ns
                self._due_ns[key] = self._kernel.now_ns + slo_ns if slo_ns else -1
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
        elif isinstance(event, FromWorker) and isinstance(event.message, InferResult):
            self.sights.results_with_outputs += any(event.message.output_sizes)

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
                f"{identity.decode()} is told of load {message.request_id}, which it did not ask for"
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
                # Of copies before and after a restart, who answers now answers the one that it got.
                known_now = self._controller.scheduler.clients.get(identity)
                for known in (known_now, None, copies[0]):
                    if any(copy is known for copy in copies):
                        del copies[next(i for i, copy in enumerate(copies) if copy is known)]
                        break
                if not copies:
                    del self._waiting[key], self._due_ns[key]
            elif isinstance(message, InferReply):
                raise InvariantViolated(
                    f"request {message.request_id} of {identity.decode()} is answered more often than it was "
                    f"asked: now with code {message.code} {message.reason}"
                )

    def _unloaded(self, identity: bytes, reply: UnloadModelReply) -> None:
        name = self._unloads.pop((identity, reply.request_id), None)
        if name is None:
            raise InvariantViolated(
                f"{identity.decode()} is told of unload {reply.request_id}, which it did not ask for"
            )
        if reply.code:
            return
        self.sights.unloads += 1
        self.sights.unloaded += reply.unloaded
        self._kept[name] = reply.kept
        client = self._controller.scheduler.clients.get(identity)
        if client is not None and any(model.name == name for model in client.models.values()):
            raise InvariantViolated(f"{identity.decode()} unloaded {name!r} and still uses it")

    def check_unloaded(self) -> None:
        """What was unloaded long ago is gone. Raises InvariantViolated if more is there than was kept."""
        models = self._controller.scheduler.cluster.models.values()
        for name, kept in self._kept.items():
            there = sum(model.name == name for model in models)
            if there > kept:
                raise InvariantViolated(
                    f"{there} instances of {name!r} are there; a client unloaded it long ago, {kept} were kept"
                )

    def _check_verdict(self, identity: bytes, reply: InferReply, due_ns: int) -> None:
        """What an answer says of its deadline is so."""
        met = not reply.code and self._kernel.now_ns <= due_ns
        if reply.deadline_met != met:
            late_ns = self._kernel.now_ns - due_ns
            raise InvariantViolated(
                f"request {reply.request_id} of {identity.decode()} is answered with code {reply.code}, "
                f"{format_duration(abs(late_ns))} {'after' if late_ns > 0 else 'before'} its deadline, and "
                f"told deadline_met={reply.deadline_met}"
            )

    def check_all_answered(self) -> None:
        """Nothing is under way any more. Raises InvariantViolated for who was forgotten."""
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
