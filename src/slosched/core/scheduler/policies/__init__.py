"""Scheduling policies by name. A new one is a file here and a line in `POLICIES`."""

from __future__ import annotations

from slosched.config import SchedulerConfig
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.base import Policy, Refusals
from slosched.core.scheduler.policies.baselines.aimd import Aimd
from slosched.core.scheduler.policies.baselines.edf import Edf
from slosched.core.scheduler.policies.baselines.fifo import Fifo
from slosched.core.scheduler.policies.baselines.reject import Reject
from slosched.core.scheduler.policies.echo import Echo
from slosched.core.scheduler.policies.infer5 import Infer5
from slosched.core.scheduler.policies.published.direct import Direct
from slosched.core.scheduler.policies.published.infer4 import Infer4
from slosched.core.scheduler.policies.published.infer5_paper import Infer5Paper
from slosched.core.scheduler.policies.published.smart import Smart
from slosched.core.scheduler.policies.published.stress import Stress
from slosched.errors import UnknownName

#: TYPE -> fidelity -> policy.
POLICIES: dict[str, dict[str, type[Policy]]] = {
    "INFER5": {"best": Infer5, "paper": Infer5Paper},
    "ECHO": {"best": Echo, "paper": Echo},
    "FIFO": {"best": Fifo, "paper": Fifo},
    "EDF": {"best": Edf, "paper": Edf},
    "REJECT": {"best": Reject, "paper": Reject},
    "AIMD": {"best": Aimd, "paper": Aimd},
    "INFER4": {"best": Infer4, "paper": Infer4},
    "SMART": {"best": Smart, "paper": Smart},
    "DIRECT": {"best": Direct, "paper": Direct},
    "STRESS": {"best": Stress, "paper": Stress},
}


def make_policy(config: SchedulerConfig, cluster: Cluster, refusals: Refusals) -> Policy:
    """Return the policy that `config` names. Raises UnknownName, which lists those there are."""
    try:
        by_fidelity = POLICIES[config.policy]
    except KeyError:
        raise UnknownName("controller TYPE", config.policy, list(POLICIES)) from None
    return by_fidelity[config.fidelity](cluster, refusals)
