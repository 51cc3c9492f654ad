"""Rules by which weights go to GPUs, by name. A new one is a file and a line in `PLACEMENT_RULES`."""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import Placement
from slosched.core.scheduler.placement.gain import GainPlacement
from slosched.core.scheduler.placement.lru import LruPlacement
from slosched.core.scheduler.policies.published.demand_placement import DemandPlacement

PLACEMENT_RULES: dict[str, type[Placement]] = {
    "gain": GainPlacement,
    "demand": DemandPlacement,
    "lru": LruPlacement,
}


def make_placement(cluster: Cluster, *, heeds_deadlines: bool = True) -> Placement:
    """Return the rule that the cluster's options name (`SchedulerConfig.placement`)."""
    return PLACEMENT_RULES[cluster.config.placement](cluster, heeds_deadlines=heeds_deadlines)
