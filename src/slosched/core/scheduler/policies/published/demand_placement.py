"""`demand`: Clockwork's rule (loads.py) under one of our policies, for comparison.

Each request that waits asks for exec time, and for loads until it is sent, as published: b1 x capacity /
SLO each, where the capacity is the default SLO. The model with the most demand that no GPU serves is
loaded over the least recently used one, idle ones first. A request that our policy has refused goes on
asking until its deadline, as it would in the published queue.
"""

from __future__ import annotations

from heapq import heappop, heappush

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import Placement
from slosched.core.scheduler.policies.published.deadlines import internal_slos_ns
from slosched.core.scheduler.policies.published.loads import PaperLoads
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request


class _Asked:
    """What one request still asks for."""

    __slots__ = ("exec_ns", "model", "weights_ns")

    def __init__(self, model: Instance, exec_ns: int, weights_ns: int) -> None:
        self.model = model
        self.exec_ns = exec_ns
        self.weights_ns = weights_ns


class DemandPlacement(Placement):
    """See the head of this file."""

    unloads_unused = False  # the published loads keep what they know about each instance

    def __init__(self, cluster: Cluster, *, heeds_deadlines: bool = True) -> None:
        super().__init__(cluster, heeds_deadlines=heeds_deadlines)
        self._loads = PaperLoads(cluster, ahead_ns=self._ahead_ns)
        self._gpus: dict[int, Gpu] = {}  # those that `_loads` knows
        self._asked: dict[int, _Asked] = {}  # by request key
        self._deadlines: list[tuple[int, int]] = []  # a heap of (deadline, request key)
        self._sent: dict[int, dict[int, ActionState]] = {}  # GPU index -> Infers that run there
        self._changed = cluster.changes.follow_execs()

    # -------------------------------------------------------------------------------- facts

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        model, key = request.instance, request.key
        if key in self._asked:
            return  # it came back from an action that failed
        exec_slo_ns, weights_slo_ns = internal_slos_ns(
            request.slo_ns,
            single_ns=model.b1_ns,
            transfer_ns=self._loads.transfer_ns(model),
            ahead_ns=self._ahead_ns,
        )
        work_ns = model.b1_ns * self._cluster.config.default_slo_ns
        asked = _Asked(model, work_ns // exec_slo_ns, work_ns // weights_slo_ns)
        self._asked[key] = asked
        self._loads.add(model, asked.exec_ns, asked.weights_ns)
        heappush(self._deadlines, (request.deadline_ns, key))

    def _load_done(self, action: ActionState, *, ok: bool, end_ns: int, duration_ns: int) -> None:
        if action.gpu.index in self._gpus:
            self._loads.load_done(
                action.gpu, action.instance, action.action_id, end_ns, duration_ns, ok=ok
            )

    def _gpu_removed(self, gpu: Gpu) -> None:
        if self._gpus.pop(gpu.index, None) is not None:
            self._loads.gpu_removed(gpu)

    def _follow(self, now_ns: int) -> None:
        """Take out what requests no longer ask for: loads when they are sent, exec when it ended."""
        for index, gpu in self._changed.items():
            running = {a.action_id: a for a in gpu.exec.outstanding if a.requests}
            before = self._sent.get(index, {})
            for action_id, action in running.items():
                if action_id not in before:
                    self._is_sent(action)
            for action_id, action in before.items():
                if action_id not in running:
                    for request in action.requests:
                        self._forget(request.key)
            self._sent[index] = running
        self._changed.clear()
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            self._forget(heappop(self._deadlines)[1])

    def _is_sent(self, action: ActionState) -> None:
        self._loads.used(action.instance)
        for request in action.requests:
            asked = self._asked.get(request.key)
            if asked is not None and asked.weights_ns:
                self._loads.add(asked.model, 0, -asked.weights_ns)
                asked.weights_ns = 0

    def _forget(self, key: int) -> None:
        asked = self._asked.pop(key, None)
        if asked is not None:
            self._loads.add(asked.model, -asked.exec_ns, -asked.weights_ns)

    # ----------------------------------------------------------------------------- decisions

    def _plan_loads(self, now_ns: int) -> None:
        for index, gpu in self._cluster.gpus.items():
            if self._gpus.get(index) is not gpu:
                self._gpus[index] = gpu
                self._loads.gpu_added(gpu)
        self._follow(now_ns)
        self._loads.plan(now_ns=now_ns)

    def next_wakeup_ns(self) -> int | None:
        return self._loads.next_wakeup_ns()
