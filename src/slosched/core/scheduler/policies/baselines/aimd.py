"""AIMD: reactive batching as Clipper's (Crankshaw et al., NSDI'17, §4.3.1). No deadlines.

Each replica, a model on a GPU, has a queue of its own and a limit on its batches:

1. a request joins, at arrival, the replica on the GPU with the fewest requests waiting or running;
2. a GPU serves its replicas with waiting requests in turn, each time the oldest of its queue, as many
   as the limit allows;
3. a batch as large as the limit that took no longer than the SLO raises the limit by `STEP`; any batch
   that took longer multiplies it by `BACKOFF`.

How long a batch took is counted from sending it until its answer is back, as a serving frontend sees
it; waiting in the queue is not part of it (ibid., "the latency to process a batch"), and the SLO is the
tightest of the batch's requests. `BACKOFF` is the paper's ("reducing the batch size by 10 %"). Its step
is "a fixed amount" that it does not state; here it is 1, the smallest.

Nothing is predicted or refused: what is late is answered late, and under overload queues only grow.
Weights are loaded by demand (placement/), and models that do not fit together take turns (turns.py).
"""

from __future__ import annotations

from collections import OrderedDict

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.dispatch_windows import DispatchWindows
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import NOT_OFFERED, Refusals, is_offered, soonest
from slosched.core.scheduler.policies.baselines.queued import answer_unoffered, send_batch
from slosched.core.scheduler.policies.baselines.turns import Turns
from slosched.core.scheduler.policies.baselines.unassigned_requests import (
    A_BINDING,
    UnassignedRequests,
)
from slosched.core.scheduler.policies.placements import make_placement
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.slices import Work
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request

STEP = 1.0
BACKOFF = 0.9


class _Replicas:
    """The replicas on one GPU."""

    __slots__ = ("limits", "queues", "waiting")

    def __init__(self) -> None:
        #: Model id -> its waiting requests by key, the first to come first; only models that have any,
        #: the next in turn first.
        self.queues: dict[int, OrderedDict[int, Request]] = {}
        self.limits: dict[int, float] = {}
        self.waiting = 0


class Aimd:
    """See the head of this file."""

    about = About(
        type="AIMD",
        summary="batches that grow until the SLO is broken, as Clipper's, no deadlines: a baseline",
    )

    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._windows = DispatchWindows(cluster)
        self._placement = make_placement(cluster, heeds_deadlines=False)
        self._turns = Turns(cluster)
        self._replicas: dict[int, _Replicas] = {}  # by GPU index
        self._bound: dict[int, int] = {}  # request key -> GPU index
        self._unassigned = UnassignedRequests()
        self._now_ns = 0

    # -------------------------------------------------------------------------------- queues

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.model
        if not is_offered(self._cluster, model):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
            return
        self._placement.asked_for(request, now_ns=now_ns)
        append(model.queue, request)
        self._bind(request)

    def _bind(self, request: Request) -> None:
        model = request.model
        if not model.resident_on:
            self._unassigned.add(request)
            return
        holders = model.resident_on.values()
        gpu = min(holders, key=lambda gpu: (gpu.held, self._load(gpu), gpu.index))
        replicas = self._replicas[gpu.index]
        replicas.queues.setdefault(model.model_id, OrderedDict())[request.key] = request
        replicas.waiting += 1
        self._bound[request.key] = gpu.index

    def _load(self, gpu: Gpu) -> int:
        """Requests that wait for `gpu` or run there."""
        running = sum(len(action.requests) for action in gpu.exec.outstanding)
        return self._replicas[gpu.index].waiting + running

    def forget(self, request: Request) -> None:
        take_appended(request.model.queue, request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """Take `request` off its replica, or from those without one."""
        model_id = request.model.model_id
        index = self._bound.pop(request.key, None)
        if index is None:
            self._unassigned.discard(request)
            return
        replicas = self._replicas[index]
        queue = replicas.queues[model_id]
        del queue[request.key]
        replicas.waiting -= 1
        if not queue:
            del replicas.queues[model_id]

    def _unbind(self, replicas: _Replicas, model_id: int) -> None:
        """The replica is gone: its requests wait for another one."""
        queue = replicas.queues.pop(model_id)
        replicas.waiting -= len(queue)
        for request in queue.values():
            del self._bound[request.key]
            self._unassigned.add(request)

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._bind_ready()
        self._serve_open(now_ns)
        if self._bind_ready():  # a GPU gave a model up, and others hold it
            self._serve_open(now_ns)
        self._turns.plan(self._unassigned.oldest(), now_ns=now_ns)
        self._placement.plan(now_ns=now_ns)

    def _bind_ready(self) -> bool:
        ready = self._unassigned.take_ready(self._cluster.slices)
        for request in ready:
            self._bind(request)
        return bool(ready)

    def _serve_open(self, now_ns: int) -> None:
        if self._bound:
            for start_ns, _, gpu in self._windows.open_gpus(now_ns):
                self._serve(gpu, start_ns, now_ns)

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        replicas = self._replicas[gpu.index]
        kept_for = self._turns.kept_for(gpu)
        for model_id in list(replicas.queues):
            if model_id not in gpu.resident:
                self._unbind(replicas, model_id)
            elif kept_for is None or kept_for.model_id == model_id:
                self._send(gpu, replicas, self._cluster.models[model_id], start_ns, now_ns)
                return

    def _send(
        self, gpu: Gpu, replicas: _Replicas, model: Model, start_ns: int, now_ns: int
    ) -> None:
        table = gpu.exec_table(model)
        queue = replicas.queues.pop(model.model_id)
        limit = int(replicas.limits.get(model.model_id, 1.0))
        taken = min(len(queue), limit, table.batches[-1])
        requests = [queue.popitem(last=False)[1] for _ in range(taken)]
        replicas.waiting -= len(requests)
        if queue:
            replicas.queues[model.model_id] = queue  # behind the others
        for request in requests:
            del self._bound[request.key]
            take_appended(model.queue, request)
        send_batch(self._cluster, gpu, requests, start_ns=start_ns, now_ns=now_ns)

    def next_wakeup_ns(self) -> int | None:
        if not self._bound and not self._unassigned:
            return None
        return soonest(
            self._windows.next_opening_ns(self._now_ns), self._placement.next_wakeup_ns()
        )

    # -------------------------------------------------------------------------------- facts

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        if not action.requests:
            self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)
        if not action.requests or code != Code.OK:
            return
        gpu, model_id = action.gpu, action.model.model_id
        limits = self._replicas[gpu.index].limits
        limit = limits.get(model_id, 1.0)
        took_ns = end_ns + gpu.worker.returns.expected_ns - action.sent_ns
        if took_ns > min(request.slo_ns for request in action.requests):
            limits[model_id] = max(1.0, limit * BACKOFF)
        elif len(action.requests) >= int(limit):
            largest = gpu.exec_table(action.model).batches[-1]
            limits[model_id] = min(float(largest), limit + STEP)

    def gpu_added(self, gpu: Gpu) -> None:
        self._replicas[gpu.index] = _Replicas()

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)
        self._cluster.slices.begin(self._removed(gpu.index))

    def _removed(self, index: int) -> Work:
        """What was bound to a GPU that is gone waits for another one, or is answered if there is none."""
        queues = self._replicas[index].queues
        while queues:
            request = next(iter(next(iter(queues.values())).values()))
            self._leave(request)
            self._unassigned.add(request)
            yield A_BINDING
        del self._replicas[index]
        yield from answer_unoffered(self._cluster, self, self._refusals, self._unassigned.models())

    def head(self, model: Model) -> Request | None:
        """The first request of `model` that is bound to no GPU."""
        return self._unassigned.head(model)

    def model_loaded(self, model: Model, gpus: list[Gpu], *, now_ns: int) -> None:
        self._placement.model_loaded(model, gpus)

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        self._placement.asked_for(request, now_ns=now_ns)

    def settled(self, model: Model) -> bool:
        return self._placement.settled(model)
