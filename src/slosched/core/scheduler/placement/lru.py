"""`lru`: every model that is asked for is loaded, in the order of asking, over the least recently used ones.

The rule of a plain cache, for comparison. It knows no deadlines, and gives no model a second GPU.
"""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import Placement, least_recently_used
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request


class LruPlacement(Placement):
    """See the head of this file."""

    def __init__(self, cluster: Cluster, *, heeds_deadlines: bool = True) -> None:
        super().__init__(cluster, heeds_deadlines=heeds_deadlines)
        self._wanted: dict[int, Instance] = {}  # by model id, in the order of asking

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        model = request.instance
        if not model.resident_on and not model.loading_on:
            self._wanted.setdefault(model.model_id, model)

    def _load_done(self, action: ActionState, *, ok: bool, end_ns: int, duration_ns: int) -> None:
        model = action.instance
        if not ok and model.waits and not model.resident_on:
            self._wanted.setdefault(model.model_id, model)

    def _gpu_removed(self, gpu: Gpu) -> None:
        for model in self._cluster.models.values():
            if model.waits and not model.resident_on:
                self._wanted.setdefault(model.model_id, model)

    def next_wakeup_ns(self) -> int | None:
        return self._loaders.next_ns(self._now_ns) if self._wanted else None

    def _plan_loads(self, now_ns: int) -> None:
        for model in list(self._wanted.values()):
            if not self._loaders.able(now_ns):
                return
            if model.resident_on or model.loading_on or self._load_somewhere(model, now_ns):
                del self._wanted[model.model_id]

    def _load_somewhere(self, model: Instance, now_ns: int) -> bool:
        options = self._able_for(model, now_ns)
        for _, _, gpu in options:
            if gpu.free_pages >= model.pages:
                self._load(gpu, model, now_ns)
                return True
        for _, _, gpu in options:
            victims = least_recently_used(self._cluster, gpu, model)
            if victims is not None:
                self._swap(gpu, victims, model, now_ns)
                for victim in victims:
                    if victim.waits and not victim.resident_on:
                        self._wanted.setdefault(victim.model_id, victim)
                return True
        return False
