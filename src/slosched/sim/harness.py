"""A cluster in virtual time for tests: load models, offer demands, look at every record.

`simulate` (run.py) is what runs experiments; this keeps all records in memory and lets a test do
something at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from slosched.config import EmulationNoise, GpuProfile, SchedulerConfig
from slosched.core.scheduler.interface import ActionRecord, FromClient, Note, RequestRecord
from slosched.errors import SloschedError
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHeartbeat,
    ClientHello,
    ClientMessage,
    ControllerToClient,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
    ModelInfo,
)
from slosched.sim.cluster import SimCluster
from slosched.sim.kernel import Kernel
from slosched.sim.marks import Framed
from slosched.sim.network import Network
from slosched.sim.node import WorkerNode
from slosched.units import NS_PER_S

CLIENT = b"client"

__all__ = ["CLIENT", "Demand", "Network", "Outcome", "Simulation", "SimulationFailed"]


class SimulationFailed(SloschedError):
    """A model could not be loaded, or a request was never answered."""


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
    """One arrival: `at_ns` after the start of `Simulation.run`, for the instance `index`, from `client`."""

    at_ns: int
    index: int
    slo_factor: float = 0.0
    slo_ns: int = 0
    client: bytes = CLIENT


class Simulation:
    """A controller, workers with emulated GPUs, and a client, in virtual time.

    `gpus_per_worker` lists the GPUs of each worker; `more_clients` are others with their weights, for
    their own demands. Checks the invariants after each step unless `check` is off. Times are ns.
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
        more_clients: Mapping[bytes, float] | None = None,
    ) -> None:
        self.outcome = Outcome()
        #: To the client, less those to its inferences: `outcome.requests` has those.
        self.replies: list[ControllerToClient] = []
        self.network = network or Network()
        self._kernel = Kernel()
        self.cluster = SimCluster(
            self._kernel,
            config,
            [
                WorkerNode(profile, gpus, noise=noise, incarnation=100 + worker_id)
                for worker_id, gpus in enumerate(gpus_per_worker)
            ],
            network=self.network,
            on_request=lambda record: self.outcome.requests.append(record),
            on_action=lambda record: self.outcome.actions.append(record),
            on_note=self._note,
            check=check,
        )
        self.scheduler = self.cluster.controller.scheduler
        self._wires = {CLIENT: self.cluster.add_client(CLIENT, self._receive)}
        self._next_request_id = 0
        self._say(ClientHello(PROTOCOL_VERSION, 7, "simulation"))
        for identity, weight in (more_clients or {}).items():
            self._wires[identity] = self.cluster.add_client(identity, self._receive)
            self._say(ClientHello(PROTOCOL_VERSION, 7, identity.decode(), weight), identity)
        self._beat(None)

    @property
    def now_ns(self) -> int:
        return self._kernel.now_ns

    def _note(self, note: Note) -> None:
        self.outcome.notes.append(note.text)

    def _receive(self, message: ControllerToClient | Framed) -> None:
        if not isinstance(message, InferReply | Framed):
            self.replies.append(message)

    def _say(self, message: ClientMessage, client: bytes = CLIENT) -> None:
        self._wires[client].send(FromClient(client, message))

    def _beat(self, _: object) -> None:
        for client in self._wires:
            self._say(ClientHeartbeat(self.now_ns), client)
        self._kernel.at(self.now_ns + NS_PER_S, self._beat)

    # ------------------------------------------------------------------------------- driving

    def at(self, when_ns: int, do: Callable[[], None]) -> None:
        """Run `do` at the absolute virtual time `when_ns`."""
        self._kernel.at(when_ns, lambda _: do())

    def run_until(self, when_ns: int) -> None:
        """Let virtual time pass."""
        self._kernel.run_until(when_ns)

    def load(
        self, name: str, copies: int = 1, *, within_ns: int = 60 * NS_PER_S
    ) -> tuple[ModelInfo, ...]:
        """Load instances and wait for the reply. Raises SimulationFailed with the controller's words."""
        self._next_request_id += 1
        request_id = self._next_request_id
        self._say(LoadModelRequest(request_id, name, copies))
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
        last_ns = start_ns

        def offer_next(_: object) -> None:
            nonlocal last_ns
            demand = next(source, None)
            if demand is None:
                self._kernel.stop()
                return
            last_ns = start_ns + demand.at_ns
            self._kernel.at(last_ns, arrive, demand)

        def arrive(demand: Demand) -> None:
            self._offer(models[demand.index].model_id, demand)
            offer_next(None)

        self._kernel.at(start_ns, offer_next)
        self._kernel.run_until(2**62)
        self.run_until(last_ns + settle_ns)
        if not self.scheduler.idle:
            missing = self.scheduler.arrived - self.scheduler.answered
            raise SimulationFailed(f"{missing} request(s) were never answered")
        self.cluster.controller.recount()
        return self.outcome

    def _offer(self, model_id: int, demand: Demand) -> None:
        self._next_request_id += 1
        self._say(
            InferRequest(
                request_id=self._next_request_id,
                model_id=model_id,
                slo_factor=demand.slo_factor,
                slo_ns=demand.slo_ns,
                user_id=demand.index,
            ),
            demand.client,
        )

    def kill_worker(self, worker_id: int) -> None:
        """The worker vanishes, with everything that it had not sent."""
        self.cluster.workers[worker_id].kill()

    def start_worker(self, worker_id: int, node: WorkerNode) -> None:
        """A (new) worker process answers under `worker_id` from now on."""
        self.cluster.workers[worker_id].start(node)
