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
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals, soonest
from slosched.core.scheduler.policies.baselines.assigned import AssignedToGpus
from slosched.core.scheduler.policies.baselines.queued import send_batch
from slosched.core.scheduler.policies.baselines.turns import Turns
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.state import ActionState, Gpu, Queue, Request

STEP = 1.0
BACKOFF = 0.9


class _Replicas:
    """The replicas on one GPU."""

    __slots__ = ("limits", "queues", "waiting")

    def __init__(self) -> None:
        #: Queue id -> its requests here by key, the oldest first; only queues that have any, the next
        #: in turn first.
        self.queues: dict[int, OrderedDict[int, Request]] = {}
        self.limits: dict[int, float] = {}
        self.waiting = 0

    def first(self) -> Request | None:
        queue = next(iter(self.queues.values()), None)
        return None if queue is None else next(iter(queue.values()))

    def add(self, request: Request) -> None:
        self.queues.setdefault(request.queue.queue_id, OrderedDict())[request.key] = request
        self.waiting += 1

    def remove(self, request: Request) -> None:
        queue_id = request.queue.queue_id
        queue = self.queues[queue_id]
        del queue[request.key]
        self.waiting -= 1
        if not queue:
            del self.queues[queue_id]


class Aimd(AssignedToGpus[_Replicas]):
    """See the head of this file."""

    about = About(
        type="AIMD",
        rank=13,
        summary="batches that grow until the SLO is broken, as Clipper's, no deadlines: a baseline",
    )
    heeds_deadlines = False

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._turns = Turns(cluster)

    def _new_queue(self) -> _Replicas:
        return _Replicas()

    # -------------------------------------------------------------------------------- queues

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        if self._takes(request, now_ns):
            append(request.queue.requests, request)
            self._assign(request)

    def _assign(self, request: Request) -> None:
        model = request.instance
        if not model.resident_on:
            self._unassigned.add(request)
            return
        holders = model.resident_on.values()
        gpu = min(holders, key=lambda gpu: (gpu.held, self._load(gpu), gpu.index))
        self._queues[gpu.index].add(request)
        self._assigned[request.key] = gpu.index

    def _load(self, gpu: Gpu) -> int:
        """Requests that wait for `gpu` or run there."""
        running = sum(len(action.requests) for action in gpu.exec.outstanding)
        return self._queues[gpu.index].waiting + running

    def _replica_gone(self, replicas: _Replicas, queue_id: int) -> None:
        """The GPU holds the model no more: the replica's requests wait for another one."""
        requests = replicas.queues.pop(queue_id)
        replicas.waiting -= len(requests)
        for request in requests.values():
            del self._assigned[request.key]
            self._unassigned.add(request)

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._assign_ready()
        self._serve_open(now_ns)
        if self._assign_ready():  # a GPU gave a model up, and others hold it
            self._serve_open(now_ns)
        self._turns.plan(self._unassigned.oldest(), now_ns=now_ns)
        self._placement.plan(now_ns=now_ns)

    def _assign_ready(self) -> bool:
        ready = self._unassigned.take_ready(self._cluster.slices)
        for request in ready:
            self._assign(request)
        return bool(ready)

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        replicas = self._queues[gpu.index]
        kept_for = self._turns.kept_for(gpu)
        for queue_id, requests in list(replicas.queues.items()):
            queue = next(iter(requests.values())).queue
            if queue.instance.model_id not in gpu.resident:
                self._replica_gone(replicas, queue_id)
            elif kept_for is None or kept_for is queue.instance:
                self._send(gpu, replicas, queue, start_ns, now_ns)
                return

    def _send(
        self, gpu: Gpu, replicas: _Replicas, queue: Queue, start_ns: int, now_ns: int
    ) -> None:
        table = gpu.exec_table(queue)
        waiting = replicas.queues.pop(queue.queue_id)
        limit = int(replicas.limits.get(queue.queue_id, 1.0))
        taken = min(len(waiting), limit, table.batches[-1])
        requests = [waiting.popitem(last=False)[1] for _ in range(taken)]
        replicas.waiting -= len(requests)
        if waiting:
            replicas.queues[queue.queue_id] = waiting  # behind the others
        for request in requests:
            del self._assigned[request.key]
            take_appended(request.queue.requests, request)
        send_batch(self._cluster, gpu, requests, start_ns=start_ns, now_ns=now_ns)

    def next_wakeup_ns(self) -> int | None:
        if not self._assigned and not self._unassigned:
            return None
        return soonest(
            self._windows.next_opening_ns(self._now_ns), self._placement.next_wakeup_ns()
        )

    # -------------------------------------------------------------------------------- facts

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        super().action_done(
            action, code=code, end_ns=end_ns, duration_ns=duration_ns, clock_mhz=clock_mhz
        )
        if not action.requests or code != Code.OK:
            return
        gpu, queue_id = action.gpu, action.queue.queue_id
        if gpu.retired:
            return
        limits = self._queues[gpu.index].limits
        limit = limits.get(queue_id, 1.0)
        took_ns = end_ns + gpu.worker.returns.expected_ns - action.sent_ns
        if took_ns > min(request.slo_ns for request in action.requests):
            limits[queue_id] = max(1.0, limit * BACKOFF)
        elif len(action.requests) >= int(limit):
            largest = gpu.exec_table(action.queue).batches[-1]
            limits[queue_id] = min(float(largest), limit + STEP)
