"""The same brains in virtual time: scheduler, workers, a network with fixed delays, and arrivals.

Everything is a discrete event on one heap with the total order (time, sequence), so a run depends on
nothing but its arguments. Facts that reach the controller at the same instant are all handled before
it schedules once, as in the live shell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from slosched.config import EmulationNoise, GpuProfile, SchedulerConfig
from slosched.core.invariants import InvariantChecker
from slosched.core.scheduler.interface import (
    ActionDone,
    ActionRecord,
    Event,
    FromClient,
    FromWorker,
    Note,
    RequestDone,
    RequestRecord,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.scheduler import Scheduler
from slosched.errors import SloschedError
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHeartbeat,
    ClientHello,
    ControllerToClient,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
    ModelInfo,
)
from slosched.sim.node import WorkerNode
from slosched.units import NS_PER_S
from slosched.version import __version__

CLIENT = b"client"
_START_NS = 1_000_000_000 * NS_PER_S  # an arbitrary date; 0 would hide mistakes with relative times


class SimulationFailed(SloschedError):
    """A model could not be loaded, or a request was never answered."""


@dataclass(frozen=True)
class Network:
    """One-way delays, ns."""

    to_worker_ns: int = 200_000
    from_worker_ns: int = 200_000
    from_client_ns: int = 0


@dataclass
class Outcome:
    """What a simulation produced: the records behind the telemetry rows, in the order of their rows."""

    requests: list[RequestRecord] = field(default_factory=list)
    actions: list[ActionRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def satisfaction(self) -> float:
        """Share of requests answered in time, from arrival at the controller."""
        return sum(r.deadline_met for r in self.requests) / max(1, len(self.requests))


@dataclass(frozen=True)
class Demand:
    """One arrival: `at_ns` after the start of `Simulation.run`, for the instance `index`."""

    at_ns: int
    index: int
    slo_factor: float = 0.0
    slo_ns: int = 0


class Simulation:
    """A controller, workers with emulated GPUs, and one client, in virtual time.

    `gpus_per_worker` lists the GPUs of each worker. Checks the invariants after each step unless
    `check` is off. Times are ns.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        profile: GpuProfile,
        *,
        gpus_per_worker: tuple[int, ...] = (6,),
        network: Network | None = None,
        noise: EmulationNoise | None = None,
        check: bool = True,
    ) -> None:
        self.now_ns = _START_NS
        self.network = network or Network()
        self.scheduler = Scheduler(
            config, worker_count=len(gpus_per_worker), incarnation=1, version=__version__
        )
        self.workers = {
            worker_id: WorkerNode(profile, gpus, noise=noise, incarnation=100 + worker_id)
            for worker_id, gpus in enumerate(gpus_per_worker)
        }
        self.outcome = Outcome()
        #: To the client, less those to its inferences: `outcome.requests` has those.
        self.replies: list[ControllerToClient] = []
        self._checker = InvariantChecker(self.scheduler) if check else None
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._seq = 0
        self._schedule_due_ns: int | None = None
        self._worker_due_ns: dict[int, int] = {}
        self._next_request_id = 0
        self.to_controller(FromClient(CLIENT, ClientHello(PROTOCOL_VERSION, 7, "simulation")))
        self._beat()

    # ------------------------------------------------------------------------------- driving

    def at(self, when_ns: int, do: Callable[[], None]) -> None:
        """Run `do` at the absolute virtual time `when_ns`."""
        self._seq += 1
        heappush(self._heap, (max(when_ns, self.now_ns), self._seq, do))

    def load(
        self, name: str, copies: int = 1, *, within_ns: int = 60 * NS_PER_S
    ) -> tuple[ModelInfo, ...]:
        """Load instances and wait for the reply. Raises SimulationFailed with the controller's words."""
        self._next_request_id += 1
        request_id = self._next_request_id
        message = LoadModelRequest(request_id, name, copies)
        self.to_controller(FromClient(CLIENT, message))
        limit_ns = self.now_ns + within_ns
        while self.now_ns < limit_ns:
            self.run_until(self.now_ns + NS_PER_S // 100)
            for reply in self.replies:
                if isinstance(reply, LoadModelReply) and reply.request_id == request_id:
                    if reply.code:
                        raise SimulationFailed(reply.reason)
                    return reply.models
        raise SimulationFailed(f"no reply to the load of {name!r} within the time allowed")

    def run(
        self, models: tuple[ModelInfo, ...], demands: Iterable[Demand], *, settle_ns: int = NS_PER_S
    ) -> Outcome:
        """Offer `demands` (in time order) and run until all are answered, `settle_ns` past the last.

        Raises SimulationFailed if some are not answered by then.
        """
        start_ns, source = self.now_ns, iter(demands)
        pending = True

        def offer() -> None:
            nonlocal pending
            demand = next(source, None)
            if demand is None:
                pending = False
                return
            at_ns = start_ns + demand.at_ns

            def arrive() -> None:
                self._offer(models[demand.index].model_id, demand)
                offer()

            self.at(at_ns, arrive)

        offer()
        while self._heap and pending:
            self._advance()
        self.run_until(self.now_ns + settle_ns)
        if not self.scheduler.idle:
            missing = self.scheduler.arrived - self.scheduler.answered
            raise SimulationFailed(f"{missing} request(s) were never answered")
        return self.outcome

    def _offer(self, model_id: int, demand: Demand) -> None:
        self._next_request_id += 1
        message = InferRequest(
            self._next_request_id,
            model_id,
            slo_factor=demand.slo_factor,
            slo_ns=demand.slo_ns,
            user_id=demand.index,
        )
        event = FromClient(CLIENT, message)
        delay_ns = self.network.from_client_ns
        if delay_ns:
            self.at(self.now_ns + delay_ns, lambda: self.to_controller(event))
        else:
            self.to_controller(event)

    def run_until(self, when_ns: int) -> None:
        """Let virtual time pass."""
        while self._heap and self._heap[0][0] <= when_ns:
            self._advance()
        self.now_ns = when_ns

    def _advance(self) -> None:
        self.now_ns, _, do = heappop(self._heap)
        do()

    def _beat(self) -> None:
        self.to_controller(FromClient(CLIENT, ClientHeartbeat(self.now_ns)))
        self.at(self.now_ns + NS_PER_S, self._beat)

    # ------------------------------------------------------------------------------ controller

    def to_controller(self, event: Event) -> None:
        """A fact reaches the controller now."""
        if self._checker is not None:
            self._checker.saw(event, now_ns=self.now_ns)
        self.scheduler.handle(event, now_ns=self.now_ns)
        self._arm_schedule(self.now_ns)

    def _arm_schedule(self, when_ns: int | None) -> None:
        if when_ns is None:
            return
        when_ns = max(when_ns, self.now_ns)
        if self._schedule_due_ns is None or when_ns < self._schedule_due_ns:
            self._schedule_due_ns = when_ns
            self.at(when_ns, lambda: self._schedule(when_ns))

    def _schedule(self, due_ns: int) -> None:
        if self._schedule_due_ns != due_ns:
            return  # an earlier one came in between
        self._schedule_due_ns = None
        effects = self.scheduler.schedule(now_ns=self.now_ns)
        if self._checker is not None:
            self._checker.check(effects, now_ns=self.now_ns)
        for effect in effects:
            if isinstance(effect, ToWorker):
                self._to_worker(effect)
            elif isinstance(effect, ToClient):
                if not isinstance(effect.message, InferReply):
                    self.replies.append(effect.message)
            elif isinstance(effect, RequestDone):
                self.outcome.requests.append(effect.record)
            elif isinstance(effect, ActionDone):
                self.outcome.actions.append(effect.record)
            elif isinstance(effect, Note):
                self.outcome.notes.append(effect.text)
        self._arm_schedule(self.scheduler.next_wakeup_ns())

    # --------------------------------------------------------------------------------- workers

    def _to_worker(self, effect: ToWorker) -> None:
        worker_id, message = effect.worker_id, effect.message

        def arrive() -> None:
            node = self.workers.get(worker_id)
            if node is not None:
                node.receive(message, now_ns=self.now_ns)
                self._step_worker(worker_id)

        self.at(self.now_ns + self.network.to_worker_ns, arrive)

    def _step_worker(self, worker_id: int) -> None:
        node = self.workers.get(worker_id)
        if node is None:
            return
        for message in node.step(now_ns=self.now_ns):
            event = FromWorker(worker_id, message)
            self.at(
                self.now_ns + self.network.from_worker_ns,
                lambda event=event: self.to_controller(event),  # type: ignore[misc]
            )
        due_ns = node.next_wakeup_ns()
        if due_ns is not None and due_ns < self._worker_due_ns.get(worker_id, 2**63):
            self._worker_due_ns[worker_id] = due_ns
            self.at(due_ns, lambda: self._wake_worker(worker_id, due_ns))

    def _wake_worker(self, worker_id: int, due_ns: int) -> None:
        if self._worker_due_ns.get(worker_id) == due_ns:
            del self._worker_due_ns[worker_id]
            self._step_worker(worker_id)

    def kill_worker(self, worker_id: int) -> None:
        """The worker vanishes, with everything that it had not sent."""
        self.workers.pop(worker_id, None)
        self._worker_due_ns.pop(worker_id, None)

    def start_worker(self, worker_id: int, node: WorkerNode) -> None:
        """A (new) worker process answers under `worker_id` from now on."""
        self.workers[worker_id] = node
        self._step_worker(worker_id)
