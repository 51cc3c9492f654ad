"""A simulated cluster: one controller and its workers, joined by wires."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slosched.config import HEARTBEAT_NS, SchedulerConfig
from slosched.core.clock_sync import WINDOW
from slosched.core.invariants import InvariantChecker
from slosched.core.scheduler.interface import Event
from slosched.core.scheduler.scheduler import Scheduler
from slosched.messages import ControllerToClient
from slosched.sim.controller import OnAction, OnNote, OnRequest, SimController
from slosched.sim.kernel import Kernel
from slosched.sim.marks import Framed, Marks
from slosched.sim.network import Card, Network, Wire
from slosched.sim.node import WorkerNode
from slosched.sim.spec import sub_seed
from slosched.sim.worker import SimWorker
from slosched.units import NS_PER_S
from slosched.version import __version__

#: A worker uses the best clock exchange of this last stretch of time.
_EXCHANGES_KEPT_NS = WINDOW * HEARTBEAT_NS


class SimCluster:
    """`nodes` are the workers, by place. `seed` is that of the network's jitter. Each controller has the
    `cluster_id`.

    `controller` and `workers` are its parts; `add_client` joins a client to it.
    """

    def __init__(
        self,
        kernel: Kernel,
        config: SchedulerConfig,
        nodes: Sequence[WorkerNode],
        *,
        network: Network,
        on_request: OnRequest,
        on_action: OnAction,
        on_note: OnNote,
        seed: int = 0,
        check: bool = False,
        cluster_id: str = "",
    ) -> None:
        self.kernel = kernel
        self.network = network
        self._seed = seed
        self.wires: dict[str, Wire] = {}  # by name ("to worker 0"), in the order of their making
        self._config, self._cluster_id = config, cluster_id
        self._incarnation = 0
        self._slack_ns = self._report_slack_ns(nodes)
        self._check = check
        scheduler = self._new_scheduler(len(nodes))
        self.controller = SimController(
            kernel,
            scheduler,
            on_request=on_request,
            on_action=on_action,
            on_note=on_note,
            checker=self._checker(scheduler),
        )
        #: What the clients' inputs carry, and what comes back is compared with.
        self.marks = Marks(self.controller.story)
        self._card = self._new_card()
        self.workers = {
            worker_id: SimWorker(kernel, worker_id, node) for worker_id, node in enumerate(nodes)
        }
        for worker_id, worker in self.workers.items():
            self.controller.to_workers[worker_id] = self._wire(
                worker.receive,
                network.to_worker_ns,
                network.to_worker_spread_ns,
                self._card,
                f"to worker {worker_id}",
            )
            worker.to_controller = self._wire(
                self.controller.receive,
                network.from_worker_ns,
                network.from_worker_spread_ns,
                self._new_card(),
                f"from worker {worker_id}",
            )

    def _new_scheduler(self, worker_count: int) -> Scheduler:
        self._incarnation += 1
        return Scheduler(
            self._config,
            worker_count=worker_count,
            incarnation=self._incarnation,
            version=__version__,
            cluster_id=self._cluster_id,
            takes_over=bool(self._cluster_id),
        )

    def start_controller(self) -> None:
        """A new controller process. It takes over what the workers hold if there is a cluster id."""
        scheduler = self._new_scheduler(len(self.workers))
        self.controller.start(scheduler, self._checker(scheduler))

    def trust_no_reported_time(self) -> None:
        """For runs in which clocks jump and processes stand still. Before anything happens."""
        self._slack_ns = 2**62
        self.controller.checker = self._checker(self.controller.scheduler)

    def _checker(self, scheduler: Scheduler) -> InvariantChecker | None:
        return InvariantChecker(scheduler, drift_ns=self._slack_ns) if self._check else None

    def _report_slack_ns(self, nodes: Sequence[WorkerNode]) -> int | None:
        drifts = [abs(node.clock.drift_ppb) for node in nodes if node.clock is not None]
        exact = not (self.network.random or self.network.bandwidth_bits_per_s or any(drifts))
        drift_ns = max(drifts, default=0) * _EXCHANGES_KEPT_NS // NS_PER_S
        return None if exact else drift_ns

    def add_client(
        self, identity: bytes, receive: Callable[[ControllerToClient | Framed], None]
    ) -> Wire:
        """Join a client whose answers go to `receive`; returns its wire, which takes FromClient.

        Either way, what has frames comes Framed.
        """
        name, network = identity.decode("ascii", "replace"), self.network
        self.controller.to_clients[identity] = self._wire(
            receive, network.to_client_ns, network.to_client_spread_ns, self._card, f"to {name}"
        )
        return self._wire(
            self._from_client,
            network.from_client_ns,
            network.from_client_spread_ns,
            self._new_card(),
            f"from {name}",
        )

    def traffic(self) -> dict[str, dict[str, int]]:
        """Messages and bytes sent so far, by connection and direction."""
        return {
            name: {"messages": wire.messages_sent, "bytes": wire.bytes_sent}
            for name, wire in self.wires.items()
        }

    def _from_client(self, event: Event | Framed) -> None:
        self.controller.receive(event)

    def _new_card(self) -> Card | None:
        bits_per_s = self.network.bandwidth_bits_per_s
        return Card(bits_per_s) if bits_per_s else None

    def _wire(
        self,
        deliver: Callable[..., None],
        latency_ns: int,
        spread_ns: tuple[int, ...],
        card: Card | None,
        name: str,
    ) -> Wire:
        wire = self.wires[name] = Wire(
            self.kernel,
            deliver,
            latency_ns=latency_ns,
            jitter_ns=self.network.jitter_ns,
            card=card,
            seed=sub_seed(self._seed, name),
            spread_ns=spread_ns,
        )
        return wire
