"""From a spec to everything that moves: kernel, cluster, client, and what breaks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slosched.errors import InvalidConfig
from slosched.sim.client import SimClient
from slosched.sim.cluster import SimCluster
from slosched.sim.controller import OnAction, OnNote, OnRequest
from slosched.sim.enduring_client import EnduringClient
from slosched.sim.injector import Injector
from slosched.sim.kernel import Kernel
from slosched.sim.node import WorkerClock, WorkerNode
from slosched.sim.spec import SimSpec, sub_seed
from slosched.sim.take_over import TakeOverTruth
from slosched.sim.truth import ClientTruth, WorkerTruth
from slosched.telemetry.client_log import ClientRecord
from slosched.workloads.composed import senders_of
from slosched.workloads.engine import Engine

#: Sessions of one process are numbered from its incarnation; those of the next are far from them.
_INCARNATIONS_APART = 1_000_000


class World:
    """What `spec` describes, at rest: `client.start` sets it going. `log` gets a line for each fault.

    `truth` watches the client's end, and `take_over` the workers', if the spec has faults and wants checks;
    else they are None.
    """

    def __init__(
        self,
        spec: SimSpec,
        engine: Engine,
        *,
        on_request: OnRequest,
        on_action: OnAction,
        on_note: OnNote,
        on_client: Callable[[ClientRecord], None] | None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.kernel = Kernel()
        nodes = _Nodes(spec, self.kernel)
        self.cluster = SimCluster(
            self.kernel,
            spec.scheduler,
            nodes.first(),
            network=spec.network,
            on_request=on_request,
            on_action=on_action,
            on_note=on_note,
            seed=spec.seeds()["network"],
            check=spec.check,
            cluster_id=spec.cluster_id,
        )
        if spec.faults is not None and senders_of(spec.workload):
            raise InvalidConfig(
                "a workload with clients of its own cannot be simulated under faults: leave out its "
                "client and weight keys, or the faults"
            )
        kind = SimClient if spec.faults is None else EnduringClient
        self.client = kind(
            self.cluster,
            spec.workload,
            engine,
            inputs=spec.inputs,
            without_input=spec.without_input,
            on_record=on_client,
            on_done=self.kernel.stop,
        )
        self.truth: ClientTruth | None = None
        self.take_over: TakeOverTruth | None = None
        if isinstance(self.client, EnduringClient) and spec.faults is not None:
            self.cluster.trust_no_reported_time()
            self.truth = ClientTruth(self.cluster) if spec.check else None
            if spec.check:
                keeps_models = bool(spec.cluster_id)
                self.take_over = TakeOverTruth(self.cluster, keeps_models=keeps_models)
            Injector(spec.faults, self.cluster, self.client, new_node=nodes.again, log=log)


class _Nodes:
    """Makes the workers of a spec; each has noise and a clock of its own."""

    def __init__(self, spec: SimSpec, kernel: Kernel) -> None:
        self._spec = spec
        self._kernel = kernel
        self._profiles = spec.worker_profiles()
        seeds = spec.seeds()
        self._clocks = [
            _clock(spec, sub_seed(seeds["clocks"], f"worker {worker_id}"), kernel.now_ns)
            for worker_id in range(len(self._profiles))
        ]

    def first(self) -> list[WorkerNode]:
        return [self._node(worker_id, "") for worker_id in range(len(self._profiles))]

    def again(self, worker_id: int, crashes: int) -> WorkerNode:
        """The next process on that worker's host: the same clock, new memory."""
        return self._node(worker_id, f" again {crashes}", crashes)

    def _node(self, worker_id: int, which: str, crashes: int = 0) -> WorkerNode:
        spec, profiles = self._spec, self._profiles[worker_id]
        name = f"worker {worker_id}{which}"
        noise_seed = sub_seed(spec.seeds()["durations"] + spec.noise.seed, name)
        clock, watch = self._clocks[worker_id], None
        if spec.faults is not None and spec.check:
            kernel = self._kernel
            drift_ppb = 0 if clock is None else clock.drift_ppb
            watch = WorkerTruth(name, profiles[0], lambda: kernel.now_ns, drift_ppb=drift_ppb)
        return WorkerNode(
            profiles[0],
            len(profiles),
            noise=replace(spec.noise, seed=noise_seed),
            incarnation=100 + worker_id + crashes * _INCARNATIONS_APART,
            clock=clock,
            watch=watch,
            preemptive=spec.scheduler.preempt,
        )


def _clock(spec: SimSpec, seed: int, now_ns: int) -> WorkerClock | None:
    clocks = spec.clocks
    if not clocks.offset_ns and not clocks.drift_ppm:
        return None if spec.faults is None else WorkerClock()
    # Two numbers within -1000..1000 out of the seed: one for each of the two.
    offset, drift = ((seed >> shift) % 2001 - 1000 for shift in (0, 28))
    drift_ppb = round(clocks.drift_ppm * drift)  # ppm / 1000 is ppb
    return WorkerClock(clocks.offset_ns * offset // 1000, drift_ppb, since_ns=now_ns)
