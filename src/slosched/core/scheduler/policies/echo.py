"""ECHO: every inference is answered at once with success and an empty output (Clockwork).

It measures everything except the GPUs: the clients, the wire and the controller's event loop.
"""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request


class Echo:
    about = About(
        type="ECHO",
        rank=20,
        summary="answers at once without a GPU: measures the network and the client",
        takes_placement=False,
        unloads_unused=False,
        runs_models=False,
        not_planned="answers at once without running a model",
    )
    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._refusals = refusals

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        self._refusals.succeed(request)

    def forget(self, request: Request) -> None:
        """Nothing is ever queued."""

    def plan(self, *, now_ns: int) -> None:
        """Nothing is ever planned."""

    def next_wakeup_ns(self) -> int | None:
        return None

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        """The cluster's own predictions are enough."""

    def gpu_added(self, gpu: Gpu) -> None:
        """GPUs are not used."""

    def gpu_removed(self, gpu: Gpu) -> None:
        """GPUs are not used."""

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        """Weights are not moved."""

    def settled(self, model: Instance) -> bool:
        return True
