"""Which weights go to which GPU. A rule is a file here and a line in `PLACEMENTS`."""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import Placement
from slosched.core.scheduler.placement.demand import DemandPlacement
from slosched.core.scheduler.placement.gain import GainPlacement
from slosched.core.scheduler.placement.lru import LruPlacement

__all__ = ["PLACEMENTS", "Placement", "make_placement"]

PLACEMENTS: dict[str, type[Placement]] = {
    "gain": GainPlacement,
    "demand": DemandPlacement,
    "lru": LruPlacement,
}


def make_placement(cluster: Cluster, *, heeds_deadlines: bool = True) -> Placement:
    """Return the rule that the cluster's options name (`SchedulerConfig.placement`)."""
    return PLACEMENTS[cluster.config.placement](cluster, heeds_deadlines=heeds_deadlines)
