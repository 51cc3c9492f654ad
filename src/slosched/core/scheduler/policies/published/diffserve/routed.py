"""What DiffServe and the systems that it is compared with share: each request is routed to a GPU at once.

As in the artifact: a GPU has a role, light or heavy, and a queue; it runs what waits there, the oldest first,
as soon as it is free, at most a batch of the plan's size. When a batch is formed, a request is dropped whose
time so far and the batch's time to come are above `drop_at` times its SLO. Nothing is answered with an earlier
stage.

Three things differ from the artifact, and docs/cascades.md says so: a plan moves as few GPUs as it can; what
waits at a GPU that changes its role moves to another one, in place of running in the wrong program; and
requests go to the least loaded GPU unless `routing` says random.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from slosched.codes import Code
from slosched.core.scheduler.after import Judgement
from slosched.core.scheduler.arrival_rate import ALPHA, ArrivalRate
from slosched.core.scheduler.cascades import uniform
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import PlanRecord
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.baselines.queued import NEVER_NS
from slosched.core.scheduler.policies.one_cascade import ServesOneCascade
from slosched.core.scheduler.policies.published.diffserve.allocator import Allocation
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import Gpu, Queue, Request
from slosched.units import NS_PER_S, format_duration

#: Waiting requests that the making of one batch looks at, those that it drops included.
_LOOKED_AT = 256


class _GpuQueue:
    """What waits at one GPU, by stage, in order of arrival there; and whether its role is heavy."""

    __slots__ = ("heavy", "waiting")

    def __init__(self, heavy: bool) -> None:
        self.heavy = heavy
        #: By: of the heavy stage. Requests by key.
        self.waiting: dict[bool, OrderedDict[int, Request]] = {
            False: OrderedDict(),
            True: OrderedDict(),
        }

    def __len__(self) -> int:
        return len(self.waiting[False]) + len(self.waiting[True])


class Routed(ServesOneCascade):
    """See the head of this file. A system says what its plan is (`_make_plan`)."""

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._cascade.decide = self._decide
        self._gpus: dict[int, _GpuQueue] = {}  # by GPU index
        self._place: dict[int, int] = {}  # request key -> GPU index; -1: no GPU can serve it now
        self._homeless: OrderedDict[int, Request] = OrderedDict()
        self._rate, self._heavy_rate = ArrivalRate(), ArrivalRate()
        self._queued = [0.0, 0.0]  # smoothed, of each stage
        self._timed_out = [False, False]  # since the last plan, of each stage
        self._drawn = 0
        self._moving = False
        self._now: Allocation | None = None
        self._second_ns = self._plan_ns = 0  # when each is due

    # ------------------------------------------------------------------------ what a system is

    def _make_plan(self, gpus: int, rate: float, now_ns: int) -> Allocation:
        """The plan for `gpus` GPUs and `rate` requests/s (as measured)."""
        raise NotImplementedError

    def _stage_of(self, request: Request) -> bool:
        """True if a request that arrives goes to the heavy program at once."""
        return False

    def _decide(self, request: Request, score: float, now_ns: int) -> Judgement:
        if score >= self._cascade.threshold:
            return self._cascade.accepted(score)
        return self._cascade.deferred(score, keeps_output=False)

    # ---------------------------------------------------------------------------------- facts

    def _arrived(self, request: Request, now_ns: int) -> None:
        if not request.attempts:
            self._rate.add(now_ns)
            if self._now is None:
                self._replan(now_ns)
            if self._stage_of(request):
                _, heavy = self._queues()
                request.queue, request.instance = heavy, heavy.instance
                self._heavy_rate.add(now_ns)
        self._wait(request)

    def _deferred(self, request: Request, now_ns: int) -> None:
        if request.queued_ns == now_ns:  # else it came back from a failed action
            self._heavy_rate.add(now_ns)
        self._wait(request)

    def _wait(self, request: Request) -> None:
        append(request.queue.requests, request)
        self._route(request)

    def _route(self, request: Request) -> None:
        """Put `request` to a GPU of its stage that has the weights; any such GPU if none has the role."""
        queue = request.queue
        heavy = queue is self._cascade.heavy
        holders = [gpu for gpu in queue.instance.resident_on.values() if gpu.index in self._gpus]
        able = [gpu for gpu in holders if self._gpus[gpu.index].heavy == heavy] or holders
        if not able:
            self._place[request.key] = -1
            self._homeless[request.key] = request
            return
        gpu = self._chosen(able)
        self._place[request.key] = gpu.index
        self._gpus[gpu.index].waiting[heavy][request.key] = request

    def _chosen(self, able: Sequence[Gpu]) -> Gpu:
        if self._options.routing == "random":
            self._drawn += 1
            return able[int(uniform(self._options.seed, self._drawn) * len(able))]
        return min(able, key=lambda gpu: (gpu.held, self._load(gpu), gpu.index))

    def _load(self, gpu: Gpu) -> int:
        """Requests that wait at `gpu` or run there."""
        running = sum(len(action.requests) for action in gpu.exec.outstanding)
        return len(self._gpus[gpu.index]) + running

    def forget(self, request: Request) -> None:
        take_appended(request.queue.requests, request)
        index = self._place.pop(request.key)
        if index < 0:
            del self._homeless[request.key]
        else:
            heavy = request.queue is self._cascade.heavy
            del self._gpus[index].waiting[heavy][request.key]

    @property
    def _waits(self) -> bool:
        return bool(self._place)

    def gpu_added(self, gpu: Gpu) -> None:
        self._gpus[gpu.index] = _GpuQueue(heavy=False)
        self._plan_ns = 0

    def gpu_removed(self, gpu: Gpu) -> None:
        self._plan_ns = 0
        self._placement.gpu_removed(gpu)
        self._cluster.slices.begin(self._removed(gpu.index))

    def _removed(self, index: int) -> Work:
        """What waits at a GPU that is gone goes to others, or is answered if there is none."""
        for waiting in self._gpus[index].waiting.values():
            while waiting:
                self._route(waiting.popitem(last=False)[1])
                yield self._routing_cost()
        del self._gpus[index]
        yield from self._answer_unoffered()

    def _routing_cost(self) -> int:
        """Units of one request's routing: it looks at each GPU (slices.py)."""
        return 1 + len(self._gpus) // 8

    def _in_use(self) -> list[int]:
        """Indexes of the GPUs that are not gone."""
        return [index for index in self._gpus if index in self._cluster.gpus]

    # ------------------------------------------------------------------------------- the plan

    def _expire(self, now_ns: int) -> None:
        """Nothing is dropped but when a batch is formed."""

    def _replan(self, now_ns: int) -> None:
        self._give_homes()
        if now_ns >= self._second_ns:
            self._second_ns = now_ns + NS_PER_S
            for stage, queue in enumerate(self._queues()):
                waiting = len(queue.requests)
                self._queued[stage] += ALPHA * (waiting - self._queued[stage])
            self._drop_stranded(now_ns)
        gpus = self._in_use()
        if now_ns < self._plan_ns or not gpus:
            return
        self._plan_ns = now_ns + self._options.plan_every_ns
        before = self._now
        plan = self._now = self._make_plan(len(gpus), self._rate.per_s(now_ns), now_ns)
        self._timed_out = [False, False]
        if self._options.fixed_threshold < 0:
            self._cascade.threshold = plan.threshold
        changes = self._give_roles(plan)
        self._move_what_waits()
        light, heavy = self._queues()
        rate = self._rate.per_s(now_ns)
        self._made_plan(
            PlanRecord(
                at_ns=now_ns,
                threshold=plan.threshold,
                light_gpus=plan.light_gpus,
                heavy_gpus=plan.heavy_gpus,
                light_batch=plan.light_batch,
                heavy_batch=plan.heavy_batch,
                demand=rate,
                heavy_demand=self._heavy_rate.per_s(now_ns),
                light_queued=len(light.requests),
                heavy_queued=len(heavy.requests),
                role_changes=changes if before else 0,
                feasible=plan.feasible,
            )
        )

    def _queue_ns(self, stage: int, rate: float) -> int:
        """How long a request waits in the queue of a stage, by Little's law; 0 while less than one waits."""
        queued = self._queued[stage]
        if not self._options.queue_term or queued < 1 or rate <= 0:
            return 0
        return round(queued / rate * NS_PER_S)

    def _give_roles(self, plan: Allocation) -> int:
        """As few GPUs as possible change. Returns how many did."""
        changes = 0
        in_use = self._in_use()
        light = [index for index in in_use if not self._gpus[index].heavy]
        others = [index for index in in_use if self._gpus[index].heavy]
        while len(light) > plan.light_gpus:
            index = light.pop()
            self._gpus[index].heavy = True
            changes += 1
        while len(light) < plan.light_gpus and others:
            index = others.pop(0)
            light.append(index)
            self._gpus[index].heavy = False
            changes += 1
        for index in in_use:
            gpu = self._cluster.gpus[index]
            self._placement.allow(gpu, self._weights_for(gpu, heavy=self._gpus[index].heavy))
        return changes

    def _move_what_waits(self) -> None:
        """What waits where its program is not the GPU's role goes to a GPU of its own, in slices."""
        if not self._moving:
            self._moving = True
            self._cluster.slices.begin(self._moved())

    def _moved(self) -> Work:
        for index in self._in_use():
            each = self._gpus.get(index)
            if each is None:
                continue
            wrong = each.waiting[not each.heavy]
            if any(self._gpus[other].heavy != each.heavy for other in self._in_use()):
                for _ in range(len(wrong)):
                    if not wrong:
                        break
                    self._route(wrong.popitem(last=False)[1])
                    yield self._routing_cost()
            yield 1
        self._moving = False

    def _give_homes(self) -> None:
        """The weights that some waited for are there."""
        if not self._homeless:
            return
        for queue in self._queues():
            if self._gpus.keys() & queue.instance.resident_on.keys():
                some = islice(self._homeless.values(), _LOOKED_AT)
                for request in [each for each in some if each.queue is queue]:
                    if not self._cluster.slices.spend(self._routing_cost()):
                        return
                    del self._homeless[request.key]
                    self._route(request)

    def _drop_stranded(self, now_ns: int) -> None:
        """No batch is formed where the weights are not: drop what waits there when it would be too late."""
        stranded = [*self._homeless.values()]
        for index, each in self._gpus.items():
            gpu = self._cluster.gpus.get(index)
            for heavy, waiting in each.waiting.items():
                instance = self._queues()[heavy].instance
                if gpu is None or instance.model_id not in gpu.resident:
                    stranded += waiting.values()
        for request in stranded:
            if self._is_dropped(request, now_ns + request.instance.b1_ns):
                if not self._cluster.slices.spend(ANSWER):
                    self._second_ns = now_ns  # the next step goes on
                    return
                self._drop(request, now_ns)

    def _next_ns(self) -> int | None:
        if self._cascade.light is None or not self._rate.per_s(self._now_ns):
            return None
        # Without a GPU there is nothing to plan: the next one that is added brings a plan.
        return min(self._second_ns, self._plan_ns) if self._gpus else self._second_ns

    # -------------------------------------------------------------------------------- serving

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        each = self._gpus.get(gpu.index)
        if each is None or self._now is None:
            return
        for heavy in (each.heavy, not each.heavy):
            queue = self._queues()[heavy]
            if each.waiting[heavy] and queue.instance.model_id in gpu.resident:
                batch = self._now.heavy_batch if heavy else self._now.light_batch
                if self._send_oldest(gpu, queue, each.waiting[heavy], batch, start_ns, now_ns):
                    return

    def _send_oldest(
        self,
        gpu: Gpu,
        queue: Queue,
        waiting: OrderedDict[int, Request],
        batch: int,
        start_ns: int,
        now_ns: int,
    ) -> bool:
        """Send the oldest of `waiting`; those that are dropped meanwhile are answered. True if any was sent."""
        table = gpu.exec_table(queue)
        batch_class = table.class_for(min(batch, len(waiting), table.batches[-1]))
        exec_ns = table.estimators[batch_class].expected_ns
        taken: list[Request] = []
        for request in [*islice(waiting.values(), _LOOKED_AT)]:
            if len(taken) == min(batch, table.batches[-1]):
                break
            if not self._is_dropped(request, start_ns + exec_ns):
                taken.append(request)
            elif self._cluster.slices.spend(ANSWER):
                self._drop(request, now_ns)
            else:
                break
        for request in taken:
            self.forget(request)
        if taken:
            self._send(gpu, taken, start_ns=start_ns, now_ns=now_ns, latest_ns=NEVER_NS)
        return bool(taken)

    def _is_dropped(self, request: Request, ends_ns: int) -> bool:
        limit = self._options.drop_at
        late = ends_ns - request.arrival_ns > request.slo_ns
        if late:
            self._timed_out[request.queue is self._cascade.heavy] = True
        return bool(limit) and ends_ns - request.arrival_ns > limit * request.slo_ns

    def _drop(self, request: Request, now_ns: int) -> None:
        self.forget(request)
        waited = format_duration(now_ns - request.arrival_ns)
        reason = f"dropped: after {waited} its batch would end too late"
        self._refusals.refuse(request, Code.TIMED_OUT, reason)
