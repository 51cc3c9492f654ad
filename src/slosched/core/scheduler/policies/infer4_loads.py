"""Loads of INFER4: the published LoadTracker, with a limit on what is outstanding and on how often."""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.paper.loads import PaperLoads, _ModelDemand
from slosched.core.scheduler.state import Gpu
from slosched.units import NS_PER_US

_MAX_LOADS = 2  # outstanding per GPU
_BETWEEN_LOADS_NS = 100 * NS_PER_US


class Infer4Loads(PaperLoads):
    """At most two loads outstanding per GPU, 100 us between any two, none for demand that is served."""

    def __init__(self, cluster: Cluster, *, ahead_ns: int) -> None:
        super().__init__(cluster, ahead_ns=ahead_ns)
        self._not_before_ns: dict[int, int] = {}  # by GPU index

    def gpu_removed(self, gpu: Gpu) -> None:
        super().gpu_removed(gpu)
        self._not_before_ns.pop(gpu.index, None)

    def _load_one(self, gpu: Gpu, wanting: list[_ModelDemand], now_ns: int) -> bool:
        if len(gpu.loading) >= _MAX_LOADS or now_ns < self._not_before_ns.get(gpu.index, 0):
            return False
        unserved = [d for d in wanting if self._priority(d) > 0]
        sent = super()._load_one(gpu, unserved, now_ns)
        if sent:
            self._not_before_ns[gpu.index] = now_ns + _BETWEEN_LOADS_NS
        return sent

    def next_wakeup_ns(self) -> int | None:
        times = [super().next_wakeup_ns()]
        if any(d.loadweights_ns > 0 for d in self._demands.values()):
            times += [t for t in self._not_before_ns.values() if t > self._now_ns]
        return min((t for t in times if t is not None), default=None)
