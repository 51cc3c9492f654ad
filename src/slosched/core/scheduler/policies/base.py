"""What a scheduling policy is: it owns the queues, and decides through a `Cluster`'s verbs.

A policy is one file here, or a class of another package; published/ holds replicas, baselines/ what to
compare with.

`Policy`, `Refusals`, `About` and what they name are the stable interface of policies, in the version
`POLICY_INTERFACE` (about.py).

A policy receives a request once through `enqueue` (and again after a failed action), and must end each one: put
it into an action, or `refuse` it with a code and a reason. What it notes about a request it keeps itself, by
`Request.key`, or in `Request.policy_data`, which no other code touches and which goes with the request.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request


class Refusals(Protocol):
    """How a policy ends a request without an action."""

    def refuse(
        self, request: Request, code: int, reason: str, *, start_ns: int = -1, exec_ns: int = 0
    ) -> None:
        """Answer `request` now. `start_ns` (absolute) and `exec_ns` tell the best plan that was found."""

    def succeed(self, request: Request) -> None:
        """Answer `request` with success and no output (ECHO)."""


class Policy(Protocol):
    """One way to schedule. All times in ns on the controller's clock."""

    #: What it says about itself, on the class.
    about: About
    #: Whether the requests of a failed action come back through `enqueue`.
    replans: bool

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None: ...

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        """A request arrived, or came back from a failed action. Queue it or refuse it."""

    def forget(self, request: Request) -> None:
        """The request is answered from outside (cancelled, its client gone): unqueue it."""

    def plan(self, *, now_ns: int) -> None:
        """Send and refuse everything that is due by now."""

    def next_wakeup_ns(self) -> int | None:
        """When `plan` must run although nothing happens."""

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        """An action was reported, or lost with its worker (`end_ns` is now, then).

        `clock_mhz` is the mean of the GPU's clocks before and after an Infer that ran, else 0.
        """

    def gpu_added(self, gpu: Gpu) -> None: ...

    def gpu_removed(self, gpu: Gpu) -> None: ...

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        """`model` is in the host memory of the worker of `gpus`, so its weights can go there."""

    def settled(self, model: Instance) -> bool:
        """Whether everything that was begun for a newly loaded `model` has ended."""


@runtime_checkable
class LoadsByDemand(Protocol):
    """A policy whose placement takes demand from outside the policy's queues."""

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        """`request` waits in the policy's queue, and its model's weights were evicted (second_tries.py)."""


NOT_OFFERED = "no connected GPU has this model ready"
LAST_ONE_LOST = "the last GPU that had it was lost"


def is_offered(cluster: Cluster, model: Instance) -> bool:
    """True if a connected GPU has the model in its host memory and pages enough for its weights."""
    return any(
        model.model_id in gpu.worker.instances and gpu.serves(model) and gpu.pages >= model.pages
        for gpu in cluster.gpus.values()
    )


def soonest(*times_ns: int | None) -> int | None:
    """The earliest of the times that are not None; None if all are."""
    return min((ns for ns in times_ns if ns is not None), default=None)
