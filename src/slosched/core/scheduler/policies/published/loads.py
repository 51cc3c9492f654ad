"""Clockwork's LoadTracker: which weights to load, which to evict (OSDI'20 §5.3; reference code).

Demand is counted per request and shared over the GPUs that hold its model, more to those that have
less to do. The published condition that should stop a load whose demand is served compares a pointer
and never holds, so a model with any unserved request is replicated; that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.published.tracker import (
    FUTURE_NS,
    ExecutorTracker,
    PaperEstimator,
)
from slosched.core.scheduler.state import Gpu, Instance
from slosched.units import NS_PER_MS

_BASE_LOAD_NS = 1.0 * NS_PER_MS


@dataclass(slots=True, eq=False)
class _ModelDemand:
    model: Instance
    transfer: PaperEstimator
    exec_ns: float = 0
    loadweights_ns: float = 0
    last_used: int = 0
    shares_ns: dict[int, float] = field(default_factory=dict)  # GPU index -> allocated exec demand


class PaperLoads:
    """Demand of all models, and the loads and evictions that follow from it."""

    def __init__(self, cluster: Cluster, *, ahead_ns: int) -> None:
        self._cluster = cluster
        self._ahead_ns = ahead_ns
        self._capacity_ns = float(cluster.config.default_slo_ns)
        self._demands: dict[int, _ModelDemand] = {}
        self._load_ns: dict[int, float] = {}  # GPU index -> outstanding
        self._trackers: dict[int, ExecutorTracker] = {}
        self._uses = 0
        self._now_ns = 0

    def _demand(self, model: Instance) -> _ModelDemand:
        demand = self._demands.get(model.model_id)
        if demand is None:
            assert model.result is not None
            estimator = PaperEstimator(max(1, model.result.weights_ns))
            demand = self._demands[model.model_id] = _ModelDemand(model, estimator)
        return demand

    def transfer_ns(self, model: Instance) -> int:
        return self._demand(model).transfer.estimate_ns()

    # -------------------------------------------------------------------------------- facts

    def gpu_added(self, gpu: Gpu) -> None:
        self._load_ns[gpu.index] = _BASE_LOAD_NS
        self._trackers[gpu.index] = ExecutorTracker()

    def gpu_removed(self, gpu: Gpu) -> None:
        self._load_ns.pop(gpu.index, None)
        self._trackers.pop(gpu.index, None)
        for demand in self._demands.values():
            demand.shares_ns.pop(gpu.index, None)

    def add(self, model: Instance, exec_ns: float, loadweights_ns: float) -> None:
        """Change a model's demand. Give whole numbers, as published: rounding would leave a rest behind,
        and the least demand asks for a load."""
        demand = self._demand(model)
        demand.exec_ns = max(0, demand.exec_ns + exec_ns)
        demand.loadweights_ns = max(0, demand.loadweights_ns + loadweights_ns)
        self._share(demand)

    def used(self, model: Instance) -> None:
        self._uses += 1
        self._demand(model).last_used = self._uses

    def _share(self, demand: _ModelDemand) -> None:
        """Split the model's exec demand over the GPUs that hold it, by weight 1 / outstanding."""
        holders = [i for i in demand.model.resident_on if i in self._load_ns]
        for index, share in demand.shares_ns.items():
            if index in self._load_ns:
                self._load_ns[index] -= share
        weights = {i: self._capacity_ns / max(self._load_ns[i], 1.0) for i in holders}
        total = sum(weights.values())
        demand.shares_ns = {i: demand.exec_ns * w / total for i, w in weights.items()}
        for index, share in demand.shares_ns.items():
            self._load_ns[index] += share

    def _priority(self, demand: _ModelDemand) -> float:
        """Unserved demand: what the GPUs that hold the model will not get through in time."""
        if demand.exec_ns <= 0:
            return demand.loadweights_ns
        served = 0.0
        for index, share in demand.shares_ns.items():
            part = demand.loadweights_ns * share / demand.exec_ns
            served += self._capacity_ns * part / max(self._load_ns[index], 1.0)
        return demand.loadweights_ns - served

    def load_done(
        self, gpu: Gpu, model: Instance, action_id: int, end_ns: int, duration_ns: int, *, ok: bool
    ) -> None:
        tracker = self._trackers.get(gpu.index)
        if tracker is not None:
            tracker.done(action_id, end_ns, ok=ok)
        demand = self._demand(model)
        if ok:
            demand.transfer.add(duration_ns)
        self._share(demand)

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        wanting = [d for d in self._demands.values() if d.loadweights_ns > 0]
        if not wanting:
            return
        for gpu in list(self._cluster.gpus.values()):
            while self._load_one(gpu, wanting, now_ns):
                pass

    def next_wakeup_ns(self) -> int | None:
        if not any(d.loadweights_ns > 0 for d in self._demands.values()):
            return None
        # A tracker that is open already had its chance in `plan`; time alone changes nothing there.
        opens = (t.opens_ns(self._ahead_ns) for t in self._trackers.values())
        return min((o for o in opens if o > self._now_ns), default=None)

    def _load_one(self, gpu: Gpu, wanting: list[_ModelDemand], now_ns: int) -> bool:
        tracker = self._trackers[gpu.index]
        available_ns = tracker.available_ns(now_ns)
        if available_ns >= now_ns + self._ahead_ns:
            return False
        absent = [
            d
            for d in wanting
            if d.model.model_id not in gpu.resident
            and d.model.model_id not in gpu.loading
            and d.model.model_id in gpu.worker.instances
        ]
        if not absent:
            return False
        best = min(absent, key=lambda d: (-self._priority(d), -d.last_used, d.model.model_id))
        model = best.model
        if not self._make_room(gpu, model, now_ns):
            return False
        latest_ns = max(now_ns + FUTURE_NS + self._ahead_ns, available_ns + self._ahead_ns)
        action = self._cluster.send_load(
            gpu, model, now_ns=now_ns, start_ns=available_ns, latest_ns=latest_ns
        )
        tracker.add(action.action_id, self.transfer_ns(model), now_ns)
        return True

    def _make_room(self, gpu: Gpu, model: Instance, now_ns: int) -> bool:
        """Evict idle models first, then the least recently used, until `model` fits."""
        candidates = [m for m in gpu.resident.values() if not self._cluster.in_use(gpu, m)]
        candidates.sort(
            key=lambda m: (self._demand(m).exec_ns > 0, self._demand(m).last_used, m.model_id)
        )
        free_pages, victims = gpu.free_pages, []
        for victim in candidates:
            if free_pages >= model.pages:
                break
            victims.append(victim)
            free_pages += victim.pages
        if free_pages < model.pages:
            return False
        for victim in victims:
            self._cluster.send_evict(gpu, victim, now_ns=now_ns)
            self._share(self._demand(victim))
        return True
