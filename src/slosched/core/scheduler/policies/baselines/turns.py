"""A turn for each model, under policies without deadlines.

Placement evicts nothing that is in use, or that more wait for than for the candidate. Under a policy that knows
deadlines, what waits for such a model is answered when it is hopeless; without deadlines it would wait
for ever. So when a request for a model that is resident nowhere has waited `PATIENCE_NS`, one GPU is
kept for it: it gets nothing more, and once it is idle gives up its least recently used weights, takes
the model and runs it first.
"""

from __future__ import annotations

from collections.abc import Iterable

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Gpu, Instance, Request
from slosched.units import NS_PER_S

#: Some hundred times what a load takes, so that taking turns costs about one per cent of a GPU.
PATIENCE_NS = NS_PER_S


class Turns:
    """Keeps at most one GPU at a time for a model that has waited too long."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._turn: tuple[Gpu, Instance] | None = None

    def kept_for(self, gpu: Gpu) -> Instance | None:
        """The only model that may run on `gpu` now; None if any may."""
        return self._turn[1] if self._turn is not None and self._turn[0] is gpu else None

    def plan(self, oldest: Iterable[Request], *, now_ns: int) -> None:
        """`oldest` is the first waiting request of each model that is resident nowhere.

        Call it after what could be sent was sent, and before Placement plans: a model that has just
        arrived is then in use, and no victim.
        """
        if self._turn is not None and self._is_over(*self._turn, now_ns):
            self._turn = None
        if self._turn is None:
            self._turn = self._next_turn(oldest, now_ns)
        if self._turn is not None:
            self._make_way(*self._turn, now_ns)

    def _is_over(self, gpu: Gpu, model: Instance, now_ns: int) -> bool:
        if self._cluster.gpus.get(gpu.index) is not gpu:
            return True
        if model.model_id in gpu.resident:
            return not model.waits or self._cluster.in_use(gpu, model)
        return not model.waits or bool(model.resident_on) or not gpu.may_load(model, now_ns)

    def _next_turn(self, oldest: Iterable[Request], now_ns: int) -> tuple[Gpu, Instance] | None:
        gpus = self._cluster.gpus.values()
        overdue = [r for r in oldest if now_ns - r.arrival_ns >= PATIENCE_NS]
        for request in sorted(overdue, key=lambda r: r.key):
            model = request.instance
            if any(model.model_id in gpu.loading for gpu in gpus):
                continue  # its load is under way
            able = [gpu for gpu in gpus if gpu.can_load(model, now_ns)]
            if able:
                return min(able, key=lambda gpu: (gpu.exec.busy_until_ns, gpu.index)), model
        return None

    def _make_way(self, gpu: Gpu, model: Instance, now_ns: int) -> None:
        """Swap the weights as soon as nothing runs and nothing else is being loaded there."""
        if gpu.exec.outstanding or gpu.loading or model.model_id in gpu.resident:
            return
        for victim in list(gpu.resident.values()):  # least recently used first
            if gpu.free_pages >= model.pages:
                break
            self._cluster.send_evict(gpu, victim, now_ns=now_ns)
        start_ns = max(now_ns + gpu.worker.transit.margin_ns, gpu.load.busy_until_ns)
        self._cluster.send_load(
            gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=start_ns + PATIENCE_NS
        )
