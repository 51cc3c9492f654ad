"""What policies share that serve one cascade: its stages, where its weights are, and what waits for them.

A request comes through `enqueue` for each of its stages. A policy says how it is put into a queue (`_arrived`,
`_deferred`) and what is sent when (`_serve`). Roles of GPUs are up to the policy, and heeded by RolePlacement.
"""

from __future__ import annotations

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.dispatch_windows import DispatchWindows
from slosched.core.scheduler.interface import PlanMade, PlanRecord
from slosched.core.scheduler.placement.roles import RolePlacement
from slosched.core.scheduler.policies.about import Defaults
from slosched.core.scheduler.policies.base import (
    LAST_ONE_LOST,
    NOT_OFFERED,
    Refusals,
    is_offered,
    soonest,
)
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Queue, Request
from slosched.units import NS_PER_MS, NS_PER_S

#: Batches of a cascade take seconds, and every size that a worker offers is of use.
CASCADE_DEFAULTS = Defaults(
    schedule_ahead_ns=10 * NS_PER_MS,
    generated_ahead_ns=10 * NS_PER_MS,
    max_exec_ns=600 * NS_PER_S,
    max_batch=64,
)
_ONE_ALONE = (
    "serves the requests of one cascade alone; a controller with INFER5 serves other models"
)


class ServesOneCascade:
    """The part of such a policy that decides nothing."""

    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster, self._refusals = cluster, refusals
        self._cascade = cluster.cascades.only()
        self._spec, self._options = self._cascade.spec, self._cascade.options
        self._windows = DispatchWindows(cluster)
        self._placement = RolePlacement(cluster)
        self._now_ns = 0
        self._cascade.on_bound = self._bound

    # -------------------------------------------------------------- what a policy says itself

    def _bound(self) -> None:
        """The cascade is served on new instances."""

    def _arrived(self, request: Request, now_ns: int) -> None:
        """A request of the light stage, which came now or came back from a failed action."""
        raise NotImplementedError

    def _deferred(self, request: Request, now_ns: int) -> None:
        """A request goes on to the heavy stage, or came back to it."""
        raise NotImplementedError

    def _expire(self, now_ns: int) -> None:
        """Answer what waits in vain."""
        raise NotImplementedError

    def _replan(self, now_ns: int) -> None:
        """Make the plan that is due."""
        raise NotImplementedError

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        """Send the next action of `gpu`, which is open and can start at `start_ns`."""
        raise NotImplementedError

    def _can_serve(self) -> bool:
        """Whether some open GPU may yet be given something."""
        return self._waits

    def _next_ns(self) -> int | None:
        """When something of these is due although nothing happens."""
        raise NotImplementedError

    def forget(self, request: Request) -> None:
        raise NotImplementedError

    @property
    def _waits(self) -> bool:
        """A request waits in a queue."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        if request.queue is not self._cascade.light and request.queue is not self._cascade.heavy:
            kind = self._cluster.config.policy
            self._refusals.refuse(request, Code.INVALID_REQUEST, f"{kind} {_ONE_ALONE}")
        elif not is_offered(self._cluster, request.instance):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
        elif request.queue is self._cascade.heavy:
            self._deferred(request, now_ns)
        else:
            self._arrived(request, now_ns)

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        self._placement.model_loaded(model, gpus)

    def settled(self, model: Instance) -> bool:
        return self._placement.settled(model)

    def gpu_added(self, gpu: Gpu) -> None:
        """Roles are planned anew in any case."""

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)
        self._cluster.slices.begin(self._answer_unoffered())

    def _answer_unoffered(self) -> Work:
        """A GPU was lost: answer what no other one offers."""
        for queue in (self._cascade.heavy, self._cascade.light):
            while queue is not None and queue.requests:
                if is_offered(self._cluster, queue.instance):
                    break
                request = queue.requests[0]
                self.forget(request)
                self._refusals.refuse(request, Code.CANCELLED, LAST_ONE_LOST)
                yield ANSWER

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._placement.plan(now_ns=now_ns)
        self._expire(now_ns)
        if self._cascade.light is None:
            return
        self._replan(now_ns)
        if self._waits:
            for start_ns, _, gpu in self._windows.open_gpus(now_ns):
                if not self._can_serve():
                    break
                self._serve(gpu, start_ns, now_ns)

    def next_wakeup_ns(self) -> int | None:
        opens_ns = self._windows.next_opening_ns(self._now_ns) if self._waits else None
        return soonest(opens_ns, self._next_ns(), self._placement.next_wakeup_ns())

    def _fit_together(self, gpu: Gpu) -> bool:
        """True if `gpu` has room for the weights of both programs."""
        light, heavy = self._queues()
        return gpu.pages >= light.instance.pages + heavy.instance.pages

    def _weights_for(self, gpu: Gpu, *, heavy: bool) -> list[Instance]:
        """What `gpu` holds in its role: both programs where they fit, and nothing that is being unloaded."""
        both = [queue.instance for queue in self._queues()]
        wanted = both if self._fit_together(gpu) else [both[heavy]]
        return [each for each in wanted if each.clients and not each.taken]

    def _queues(self) -> tuple[Queue, Queue]:
        light, heavy = self._cascade.light, self._cascade.heavy
        assert light is not None and heavy is not None
        return light, heavy

    def _send(
        self,
        gpu: Gpu,
        requests: list[Request],
        *,
        start_ns: int,
        now_ns: int,
        latest_ns: int,
        priority: int = 0,
    ) -> None:
        """Commit `requests` of one stage, which have left their queue, as one batch.

        With a `priority` above 0 it interrupts what runs.
        """
        table = gpu.exec_table(requests[0].queue)
        batch_class = table.class_for(len(requests))
        self._cluster.send_infer(
            gpu,
            requests,
            batch_class,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=table.estimators[batch_class].expected_ns,
            latest_ns=latest_ns,
            priority=priority,
        )

    def _made_plan(self, record: PlanRecord) -> None:
        """Have telemetry write of a plan."""
        self._cluster.emit(PlanMade(record))
