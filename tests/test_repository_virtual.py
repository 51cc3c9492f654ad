"""What workers offer changes under faults, in virtual time: in the end the controller knows it."""

from __future__ import annotations

from random import Random

import pytest

from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.state import WorkerState
from slosched.messages import PROTOCOL_VERSION, ClientHello
from slosched.sim.cluster import SimCluster
from slosched.sim.faults import FaultPlan
from slosched.sim.injector import Injector
from slosched.sim.kernel import Kernel
from slosched.sim.network import Network
from slosched.sim.node import WorkerNode
from slosched.units import NS_PER_MS, NS_PER_S

WORKERS, UNTIL_NS = 2, 5 * NS_PER_S
KINDS = (
    "crash",
    "restart",
    "pause",
    "jump",
    "intrude",
    "partition",
    "hold",
    "lose",
    "lose",
    "lose",
    "lose",
    "lose",
    "lose",
    "late",
    "twice",
)
#: If an Offer that was lost is not said again, the last two fail.
SEEDS = (*range(30), 50, 138)


class _NoClient:
    def pause(self) -> None: ...

    def resume(self) -> None: ...


def node(incarnation: int) -> WorkerNode:
    models = {
        name: ModelProfile(name=name, exec_ns={1: NS_PER_MS}, weights_ns=1, weights_bytes=1)
        for name in ("net", "other")
    }
    profile = GpuProfile("small", models, weights_cache_bytes=10**9)
    return WorkerNode(profile, 1, incarnation=incarnation)


def cluster_of(kernel: Kernel, cluster_id: str) -> SimCluster:
    nodes = [node(1_000 * (worker_id + 1)) for worker_id in range(WORKERS)]
    ignored = lambda *each, **more: None  # noqa: E731
    return SimCluster(
        kernel,
        SchedulerConfig(),
        nodes,
        network=Network(),
        on_request=ignored,
        on_action=ignored,
        on_note=ignored,
        cluster_id=cluster_id,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_after_any_faults_the_controller_knows_what_each_worker_offers(seed: int) -> None:
    draw = Random(seed)
    kernel = Kernel()
    cluster = cluster_of(kernel, draw.choice(("", "ours")))
    wire = cluster.add_client(b"client", lambda message: None)
    wire.send(FromClient(b"client", ClientHello(PROTOCOL_VERSION, 1)))
    plan = FaultPlan.random(seed, [1] * WORKERS, until_ns=UNTIL_NS, kinds=KINDS)
    Injector(plan, cluster, _NoClient(), new_node=lambda worker_id, n: node(10**6 * n + worker_id))

    def change(worker_id: int) -> None:
        worker = cluster.workers[worker_id]
        if worker.node is not None and worker.answers:
            names = [f"digits:{version}" for version in range(1, 6) if draw.random() < 0.5]
            clock = worker.node.clock
            now_ns = kernel.now_ns if clock is None else clock.local_ns(kernel.now_ns)
            worker.node.brain.offer(("net", *names), (("x", str(draw.random())),), now_ns=now_ns)
            worker._step(worker.node)

    for _ in range(20):
        at_ns = draw.randrange(UNTIL_NS)
        kernel.at(kernel.now_ns + at_ns, change, draw.randrange(WORKERS))
    kernel.run_until(kernel.now_ns + UNTIL_NS + 15 * NS_PER_S)
    for worker_id, worker in cluster.workers.items():
        known = cluster.controller.scheduler.cluster.workers[worker_id]
        assert worker.node is not None and known.state is WorkerState.JOINED, plan.text()
        offers = worker.node.brain._offers
        assert set(known.loadable) == set(offers.loadable), plan.text()
        assert tuple(known.left_out.items()) == offers.left_out, plan.text()
        assert known.offer == offers.number, plan.text()
