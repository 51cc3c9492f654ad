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
from slosched.sim.network import Card, Network, Wire
from slosched.sim.node import WorkerNode
from slosched.sim.spec import sub_seed
from slosched.sim.worker import SimWorker
from slosched.units import NS_PER_S
from slosched.version import __version__

#: A worker goes by the best of the clock exchanges of this long.
_EXCHANGES_KEPT_NS = WINDOW * HEARTBEAT_NS


class SimCluster:
    """`nodes` are the workers, by place. `seed` is that of the network's jitter.

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
    ) -> None:
        self.kernel = kernel
        self.network = network
        self._seed = seed
        self._wires: dict[str, Wire] = {}  # by name, in the order of their making
        scheduler = Scheduler(config, worker_count=len(nodes), incarnation=1, version=__version__)
        self.controller = SimController(
            kernel,
            scheduler,
            on_request=on_request,
            on_action=on_action,
            on_note=on_note,
            checker=self._checker(scheduler, nodes) if check else None,
        )
        self._card = self._new_card()
        self.workers = {
            worker_id: SimWorker(kernel, worker_id, node) for worker_id, node in enumerate(nodes)
        }
        for worker_id, worker in self.workers.items():
            self.controller.to_workers[worker_id] = self._wire(
                worker.receive, network.to_worker_ns, self._card, f"to worker {worker_id}"
            )
            worker.to_controller = self._wire(
                self.controller.receive,
                network.from_worker_ns,
                self._new_card(),
                f"from worker {worker_id}",
            )

    def _checker(self, scheduler: Scheduler, nodes: Sequence[WorkerNode]) -> InvariantChecker:
        drifts = [abs(node.clock.drift_ppb) for node in nodes if node.clock is not None]
        exact = not (self.network.jitter_ns or self.network.bandwidth_bits_per_s or any(drifts))
        drift_ns = max(drifts, default=0) * _EXCHANGES_KEPT_NS // NS_PER_S
        return InvariantChecker(scheduler, drift_ns=None if exact else drift_ns)

    def add_client(self, identity: bytes, receive: Callable[[ControllerToClient], None]) -> Wire:
        """Join a client whose answers go to `receive`; returns its wire, which takes FromClient."""
        name = identity.decode("ascii", "replace")
        self.controller.to_clients[identity] = self._wire(
            receive, self.network.to_client_ns, self._card, f"to {name}"
        )
        return self._wire(
            self._from_client, self.network.from_client_ns, self._new_card(), f"from {name}"
        )

    def traffic(self) -> dict[str, dict[str, int]]:
        """Messages and bytes sent so far, by connection and direction."""
        return {
            name: {"messages": wire.messages_sent, "bytes": wire.bytes_sent}
            for name, wire in self._wires.items()
        }

    def _from_client(self, event: Event) -> None:
        self.controller.receive(event)

    def _new_card(self) -> Card | None:
        bits_per_s = self.network.bandwidth_bits_per_s
        return Card(bits_per_s) if bits_per_s else None

    def _wire(
        self, deliver: Callable[..., None], latency_ns: int, card: Card | None, name: str
    ) -> Wire:
        wire = self._wires[name] = Wire(
            self.kernel,
            deliver,
            latency_ns=latency_ns,
            jitter_ns=self.network.jitter_ns,
            card=card,
            seed=sub_seed(self._seed, name),
        )
        return wire
