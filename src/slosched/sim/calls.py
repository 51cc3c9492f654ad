"""Graphs of calls of functions in virtual time: hosts, scripts, arrivals, and what must hold for each call.

The controller and the workers are the ones that serve: their brains, the wires between them and the emulated
slots (core/worker/emulated_calls.py). A recorded graph runs here again as scripts (recorded_calls.py). Reports
are not trusted: what must hold is looked at where bodies begin, and where answers reach the client.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from slosched.config import GpuProfile, SchedulerConfig
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import (
    ActionRecord,
    CallPart,
    CallRecord,
    FromClient,
    Note,
    RequestRecord,
)
from slosched.core.worker.emulated_calls import mark_of
from slosched.errors import InvalidConfig, SloschedError
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    ClientMessage,
    ControllerToClient,
    Goodbye,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
)
from slosched.sim.cluster import SimCluster
from slosched.sim.faults import FaultPlan
from slosched.sim.hosts import HostPlan
from slosched.sim.injector import Injector
from slosched.sim.kernel import Kernel
from slosched.sim.marks import Framed, Payload
from slosched.sim.network import SMALL_MESSAGE_BYTES, Network
from slosched.sim.node import WorkerClock, WorkerNode
from slosched.sim.spec import sub_seed
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

CALLER = b"caller"
_NO_GPU = GpuProfile("none", {}, weights_cache_bytes=1, page_bytes=1)
#: The workers' processes are numbered from here, and those that follow a crash far from the first ones.
_FIRST_INCARNATION, _INCARNATIONS_APART = 100, 1_000_000
#: Functions are ready within this time, or the run fails.
_READY_WITHIN_NS = 60 * NS_PER_S
_NOTES = 200


class CallsFailed(SloschedError):
    """A function could not be loaded, or a call was not answered."""


@dataclass(frozen=True, kw_only=True)
class CallArrival:
    """A client's call: `at_ns` after the start. It follows script `number` of its function.

    The name may be that of a model too: then it is an inference without an input. It is taken back
    `cancel_after_ns` after it was sent (-1: it is not).
    """

    at_ns: int
    function: str
    slo_ns: int = 0
    number: int = 0
    size_class: int = 0
    near: str = ""
    in_bytes: int = 64
    cancel_after_ns: int = -1


@dataclass(frozen=True, kw_only=True)
class CallSpec:
    """Everything that a run of calls depends on. `hosts` has the host of each worker.

    Each worker has `gpus` GPUs of `profile` besides, whose models are served beside the functions. Every call
    must be answered `settle_ns` after the last arrival and the last fault.
    """

    hosts: tuple[HostPlan, ...]
    arrivals: tuple[CallArrival, ...]
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    network: Network = field(default_factory=Network)
    seed: int = 0
    faults: FaultPlan | None = None
    check: bool = True
    settle_ns: int = 10 * NS_PER_S
    gpus: int = 0
    profile: GpuProfile = _NO_GPU

    def __post_init__(self) -> None:
        if not self.hosts:
            raise InvalidConfig("calls need a worker")
        if self.faults is not None:
            self.faults.check([self.gpus + 1] * len(self.hosts))
        offered = dict.fromkeys(self.names)
        for arrival in self.arrivals:
            if arrival.function not in offered:
                known = ", ".join(sorted(offered))
                raise InvalidConfig(
                    f"no host has the function {arrival.function!r}; known: {known}"
                )
            if arrival.at_ns < 0:
                raise InvalidConfig("a call arrives at 0 or later")

    @property
    def names(self) -> list[str]:
        """The functions and the models."""
        functions = [name for host in self.hosts for name in host.names]
        return list(dict.fromkeys([*functions, *(self.profile.models if self.gpus else ())]))


@dataclass(slots=True)
class Answered:
    """What became of one arrival. `replies` has one answer when all is well."""

    arrival: CallArrival
    mark: bytes
    sent_ns: int = -1
    answered_ns: int = -1
    replies: list[InferReply] = field(default_factory=list)

    @property
    def code(self) -> int:
        return self.replies[0].code if self.replies else -1


@dataclass
class CallOutcome:
    """What a run produced, in order. `bodies` has the marks of the calls that began, and how often each did."""

    answers: list[Answered] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    parts: list[CallPart] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    actions: list[ActionRecord] = field(default_factory=list)
    bodies: dict[bytes, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    end_ns: int = 0  # from the start to the last answer
    events: int = 0


class _Caller:
    """The client: it says hello, loads the functions, sends and counts."""

    def __init__(self, cluster: SimCluster, models: Collection[str]) -> None:
        self._kernel = cluster.kernel
        self._models = models
        self._wire = cluster.add_client(CALLER, self._receive)
        self._asked = 0
        self._loading: dict[int, str] = {}
        self.model_ids: dict[str, int] = {}
        self.problem = ""
        self._by_request: dict[int, Answered] = {}
        self.unanswered = 0
        self._ended = False

    def start(self) -> None:
        self._say(ClientHello(PROTOCOL_VERSION, 7, "calls"))
        self._beat(None)

    def leave(self) -> None:
        self._ended = True
        self._say(Goodbye())

    def load(self, name: str) -> None:
        self._asked += 1
        self._loading[self._asked] = name
        self._say(LoadModelRequest(self._asked, name))

    def call(self, answered: Answered) -> None:
        arrival = answered.arrival
        self._asked = request_id = self._asked + 1
        self._by_request[request_id] = answered
        self.unanswered += 1
        answered.sent_ns = self._kernel.now_ns
        request = InferRequest(
            request_id=request_id,
            model_id=self.model_ids[arrival.function],
            slo_ns=arrival.slo_ns,
            length=arrival.size_class,
            near=arrival.near,
        )
        event = FromClient(CALLER, request)
        if arrival.in_bytes and arrival.function not in self._models:
            payload = Payload(answered.mark, arrival.in_bytes)
            self._wire.send(Framed(event, (payload,)), SMALL_MESSAGE_BYTES + arrival.in_bytes)
        else:
            self._wire.send(event)
        if arrival.cancel_after_ns >= 0:
            at_ns = self._kernel.now_ns + arrival.cancel_after_ns
            self._kernel.at(at_ns, self._say, CancelRequest(request_id))

    def pause(self) -> None:
        """The caller has nothing that could stand still: its calls are sent at their times."""

    def resume(self) -> None:
        """Nothing stood still."""

    def _say(self, message: ClientMessage) -> None:
        self._wire.send(FromClient(CALLER, message))

    def _beat(self, _: object) -> None:
        if not self._ended:
            self._say(ClientHeartbeat(self._kernel.now_ns))
            self._kernel.at(self._kernel.now_ns + NS_PER_S, self._beat)

    def _receive(self, message: ControllerToClient | Framed) -> None:
        frames: tuple[Payload, ...] = ()
        if isinstance(message, Framed):
            frames, message = tuple(message.frames), message.message
        if isinstance(message, LoadModelReply):
            name = self._loading.pop(message.request_id)
            if message.code:
                self.problem = f"cannot load the function {name!r}: {message.reason}"
            else:
                self.model_ids[name] = message.models[0].model_id
        elif isinstance(message, InferReply):
            self._answered(message, frames)

    def _answered(self, reply: InferReply, frames: tuple[Payload, ...]) -> None:
        answered = self._by_request[reply.request_id]
        answered.replies.append(reply)
        name = answered.arrival.function
        if len(answered.replies) > 1:
            codes = [each.code for each in answered.replies]
            raise InvariantViolated(f"a call of {name!r} is answered more than once: {codes}")
        answered.answered_ns = self._kernel.now_ns
        self.unanswered -= 1
        if frames and (reply.code or frames[0].mark != answered.mark):
            got = frames[0].mark.hex()
            raise InvariantViolated(f"a call of {name!r} got the result of another: {got}")


class CallTruth:
    """Counts bodies as they begin: none begins twice, unless its function is idempotent."""

    def __init__(self, spec: CallSpec, outcome: CallOutcome) -> None:
        self._outcome = outcome
        self._repeatable = {
            each.name for host in spec.hosts for each in host.functions if each.info.idempotent
        }

    def begins(self, function: str, mark: bytes) -> None:
        count = self._outcome.bodies[mark] = self._outcome.bodies.get(mark, 0) + 1
        if count > 1 and function not in self._repeatable:
            raise InvariantViolated(f"the body of a call of {function!r} begins a second time")


class CallSimulation:
    """A cluster that runs `spec`. `log` gets a line for each fault, and each note of the controller."""

    def __init__(self, spec: CallSpec, *, log: Callable[[str], None] = lambda _: None) -> None:
        self.spec = spec
        self.outcome = CallOutcome()
        self._log = log
        self._truth = CallTruth(spec, self.outcome)
        self.kernel = Kernel()
        self.cluster = SimCluster(
            self.kernel,
            spec.scheduler,
            [self._node(worker_id, 0) for worker_id in range(len(spec.hosts))],
            network=spec.network,
            on_request=self.outcome.requests.append,
            on_action=self.outcome.actions.append,
            on_note=self._note,
            seed=sub_seed(spec.seed, "network"),
            check=spec.check,
        )
        self.cluster.controller.on_call = self.outcome.calls.append
        self.cluster.controller.on_call_part = self.outcome.parts.append
        self._caller = _Caller(self.cluster, spec.profile.models)
        self._start_ns = self.kernel.now_ns

    def _node(self, worker_id: int, crashes: int) -> WorkerNode:
        incarnation = _FIRST_INCARNATION + worker_id + crashes * _INCARNATIONS_APART
        return WorkerNode(
            self.spec.profile,
            self.spec.gpus,
            incarnation=incarnation,
            clock=None if self.spec.faults is None else WorkerClock(),
            host=self.spec.hosts[worker_id],
            on_begin=self._truth.begins,
        )

    def _note(self, note: Note) -> None:
        if len(self.outcome.notes) < _NOTES:
            self.outcome.notes.append(note.text)
        self._log(f"{(self.kernel.now_ns - self._start_ns) / NS_PER_S:9.4f} s  {note.text}")

    def run(self) -> CallOutcome:
        """Load the functions, offer the calls, and wait for the answers.

        Raises CallsFailed for a function that does not load, InvariantViolated for what must not be.
        """
        kernel, spec, outcome = self.kernel, self.spec, self.outcome
        self._load()
        self._start_ns = start_ns = kernel.now_ns
        if spec.faults is not None:
            self.cluster.trust_no_reported_time()
            Injector(spec.faults, self.cluster, self._caller, new_node=self._node, log=self._log)
        for place, arrival in enumerate(spec.arrivals):
            identity = place.to_bytes(4, "big")
            answered = Answered(arrival, mark_of(arrival.number, b"caller" + identity))
            outcome.answers.append(answered)
            kernel.at(start_ns + arrival.at_ns, self._caller.call, answered)
        faults_end_ns = 0 if spec.faults is None else spec.faults.end_ns
        last_ns = max([faults_end_ns, *(arrival.at_ns for arrival in spec.arrivals)])
        kernel.run_until(start_ns + last_ns)
        until_ns = kernel.now_ns + spec.settle_ns
        while self._caller.unanswered and kernel.now_ns < until_ns:
            kernel.run_until(kernel.now_ns + NS_PER_MS)
        outcome.end_ns = max([0, *(each.answered_ns - start_ns for each in outcome.answers)])
        self._check_answered()
        kernel.run_until(kernel.now_ns + NS_PER_S)
        self._caller.leave()
        kernel.run_until(kernel.now_ns + NS_PER_S)
        self._check_nothing_left()
        outcome.events = kernel.events
        return outcome

    def _load(self) -> None:
        caller, kernel = self._caller, self.kernel
        caller.start()
        names = self.spec.names
        kernel.run_until(kernel.now_ns + 100 * NS_PER_MS)
        for name in names:
            caller.load(name)
        until_ns = kernel.now_ns + _READY_WITHIN_NS
        while len(caller.model_ids) < len(names) and not caller.problem:
            if kernel.now_ns >= until_ns:
                missing = [name for name in names if name not in caller.model_ids]
                raise CallsFailed(
                    f"not loaded within {format_duration(_READY_WITHIN_NS)}: {missing}"
                )
            kernel.run_until(kernel.now_ns + 10 * NS_PER_MS)
        if caller.problem:
            raise CallsFailed(caller.problem)

    def _check_answered(self) -> None:
        missing = [each for each in self.outcome.answers if not each.replies]
        if missing:
            names = ", ".join(each.arrival.function for each in missing[:5])
            raise InvariantViolated(
                f"{format_duration(self.spec.settle_ns)} after the last arrival {len(missing)} calls have no "
                f"answer: {names}"
            )

    def _check_nothing_left(self) -> None:
        """All is over: nothing of any call is kept anywhere."""
        controller = self.cluster.controller
        scheduler = controller.scheduler
        left = {
            "requests without an answer": scheduler.arrived - scheduler.answered,
            "frames at the controller": controller.inputs_kept,
        }
        for worker_id, worker in self.cluster.workers.items():
            node = worker.node
            if node is None or node.host is None:
                continue
            device = node.host.device
            left[f"running calls at worker {worker_id}"] = node.host.running
            left[f"unfinished calls at worker {worker_id}"] = device.unfinished
            left[f"frames at worker {worker_id}"] = device.frames_kept
            left[f"actions at worker {worker_id}"] = node.brain.pending
        kept = [f"{count} {what}" for what, count in left.items() if count]
        if kept:
            raise InvariantViolated(f"after the end: {', '.join(kept)}")
        controller.recount()


def simulate_calls(spec: CallSpec, *, log: Callable[[str], None] = lambda _: None) -> CallOutcome:
    """Run `spec`. Raises CallsFailed and InvariantViolated as CallSimulation.run does."""
    return CallSimulation(spec, log=log).run()


def codes(outcome: CallOutcome) -> dict[int, int]:
    """How many of the client's calls ended with each code."""
    counts: dict[int, int] = {}
    for each in outcome.answers:
        counts[each.code] = counts.get(each.code, 0) + 1
    return counts
