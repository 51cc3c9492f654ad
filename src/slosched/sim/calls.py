"""Graphs of calls of functions in virtual time: hosts, scripts, arrivals, and what must hold for each call.

The controller and the workers are the ones that serve: their brains, the wires between them and the emulated
slots (core/worker/emulated_calls.py). A recorded graph runs here again as scripts (recorded_calls.py). Reports
are not trusted: what must hold is looked at where bodies begin, and where answers reach the client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from slosched.config import EmulationNoise, GpuProfile, SchedulerConfig
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import (
    ActionRecord,
    CallPart,
    CallRecord,
    Note,
    RequestRecord,
)
from slosched.core.worker.emulated_calls import mark_of
from slosched.errors import InvalidConfig, SloschedError
from slosched.sim.caller import Answered as Answered
from slosched.sim.caller import CallArrival as CallArrival
from slosched.sim.caller import Caller
from slosched.sim.cluster import SimCluster
from slosched.sim.faults import FaultPlan
from slosched.sim.hosts import HostPlan
from slosched.sim.injector import Injector
from slosched.sim.kernel import Kernel
from slosched.sim.network import Network
from slosched.sim.node import WorkerClock, WorkerNode
from slosched.sim.spec import sub_seed
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

_NO_GPU = GpuProfile("none", {}, weights_cache_bytes=1, page_bytes=1)
#: The workers' processes are numbered from here, and those that follow a crash far from the first ones.
_FIRST_INCARNATION, _INCARNATIONS_APART = 100, 1_000_000
#: Functions are ready within this time, or the run fails.
_READY_WITHIN_NS = 60 * NS_PER_S
_NOTES = 200


class CallsFailed(SloschedError):
    """A function could not be loaded, or a call was not answered."""


@dataclass(frozen=True, kw_only=True)
class CallSpec:
    """Everything that a run of calls depends on. `hosts` has the host of each worker.

    Each worker has `gpus` GPUs of `profile` besides, whose models are served beside the functions. Every call
    must be answered `settle_ns` after the last arrival and the last fault. Controllers of one `cluster_id` take
    over from each other. `noise` disturbs what calls and inferences run. The client leaves at `leave_ns` (-1:
    when it has its answers).
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
    cluster_id: str = ""
    leave_ns: int = -1
    noise: EmulationNoise = field(default_factory=EmulationNoise)

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
            cluster_id=spec.cluster_id,
        )
        self.cluster.controller.on_call = self.outcome.calls.append
        self.cluster.controller.on_call_part = self.outcome.parts.append
        self._caller = Caller(self.cluster, spec.names, spec.profile.models)
        self._start_ns = self.kernel.now_ns

    def _node(self, worker_id: int, crashes: int) -> WorkerNode:
        incarnation = _FIRST_INCARNATION + worker_id + crashes * _INCARNATIONS_APART
        return WorkerNode(
            self.spec.profile,
            self.spec.gpus,
            noise=replace(
                self.spec.noise,
                seed=sub_seed(self.spec.seed + self.spec.noise.seed, f"{incarnation}"),
            ),
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
        if spec.leave_ns >= 0:
            kernel.at(start_ns + spec.leave_ns, self._caller.leave)
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
        # A lost CancelCall is made good when the worker gives its call up.
        until_ns = kernel.now_ns + max(NS_PER_S, spec.settle_ns if spec.faults else 0)
        kernel.run_until(kernel.now_ns + NS_PER_S)
        while self._left() and kernel.now_ns < until_ns:
            kernel.run_until(kernel.now_ns + NS_PER_S)
        self._check_nothing_left()
        outcome.events = kernel.events
        return outcome

    def _load(self) -> None:
        caller, kernel = self._caller, self.kernel
        kernel.run_until(kernel.now_ns + 100 * NS_PER_MS)  # the workers join
        caller.start()
        until_ns = kernel.now_ns + _READY_WITHIN_NS
        while not caller.ready and not caller.problem:
            if kernel.now_ns >= until_ns:
                missing = [name for name in self.spec.names if name not in caller.model_ids]
                raise CallsFailed(
                    f"not loaded within {format_duration(_READY_WITHIN_NS)}: {missing}"
                )
            kernel.run_until(kernel.now_ns + 10 * NS_PER_MS)
        if caller.problem:
            raise CallsFailed(caller.problem)

    def _check_answered(self) -> None:
        missing = [each for each in self.outcome.answers if not each.replies and not each.lost]
        if missing:
            names = ", ".join(each.arrival.function for each in missing[:5])
            raise InvariantViolated(
                f"{format_duration(self.spec.settle_ns)} after the last arrival {len(missing)} calls have no "
                f"answer: {names}"
            )

    def _left(self) -> list[str]:
        """What is kept of calls, in words."""
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
        return [f"{count} {what}" for what, count in left.items() if count]

    def _check_nothing_left(self) -> None:
        """All is over: nothing of any call is kept anywhere."""
        left = self._left()
        if left:
            raise InvariantViolated(f"after the end: {', '.join(left)}")
        self.cluster.controller.recount()


def simulate_calls(spec: CallSpec, *, log: Callable[[str], None] = lambda _: None) -> CallOutcome:
    """Run `spec`. Raises CallsFailed and InvariantViolated as CallSimulation.run does."""
    return CallSimulation(spec, log=log).run()


def codes(outcome: CallOutcome) -> dict[int, int]:
    """How many of the client's calls ended with each code."""
    counts: dict[int, int] = {}
    for each in outcome.answers:
        counts[each.code] = counts.get(each.code, 0) + 1
    return counts
