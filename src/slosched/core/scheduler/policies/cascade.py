"""CASCADE: ours for one cascade. Every decision looks at deadlines; the threshold follows what the GPUs can do.

1. *Light first.* Light batches are as large as a share of the SLO allows, the earliest deadline first. As many
   GPUs as the arrivals need stay free of heavy batches, which would keep them for seconds; or, with `preempt`,
   none: light batches interrupt heavy ones at their boundaries (cascade_interruptions.py).
2. *Threshold.* Four times a second: the share of requests that the other GPUs can take in heavy batches, but
   never more than the share with the best quality, except to make up for minutes with less. Its quantile of the
   last scores is the threshold, so that it follows scores that drift.
3. *Heavy by score.* A GPU that opens takes the largest batch that is in time; of the deferred requests that fit
   into it, those with the lowest scores. One that waits until the heavy program no longer fits gets its light
   answer: by the judge, if all that went before it had lower scores (OUTRANKED), else by the clock (INSTEAD);
   without `rejected_answers` it is refused.
4. Otherwise a request is refused only when its light answer cannot be in time.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from math import ceil

from slosched.codes import Code, Verdict
from slosched.core.scheduler.after import Judgement
from slosched.core.scheduler.arrival_rate import ArrivalRate
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.interface import PlanRecord
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals, soonest
from slosched.core.scheduler.policies.cascade_interruptions import Interruptions
from slosched.core.scheduler.policies.one_cascade import CASCADE_DEFAULTS, ServesOneCascade
from slosched.core.scheduler.queues import first_from, take_by_due
from slosched.core.scheduler.recent_scores import RecentScores
from slosched.core.scheduler.running import Running
from slosched.core.scheduler.state import ActionState, Gpu, Queue, Request
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

_THRESHOLD_EVERY_NS = 250 * NS_PER_MS
#: Deferred requests, those with the earliest deadlines, among which a batch is chosen by score.
_LOOKED_AT = 256
#: What timers and decisions may take.
_SLACK_NS = NS_PER_MS
#: A plan is written to the log this often.
_LOGGED_EVERY_NS = NS_PER_S
#: A light batch takes at most this part of the SLO, unless one request alone takes longer.
_LIGHT_PART = 8
#: How much more light work than expected the GPUs that are kept for it can do.
_LIGHT_SPARE = 1.1
#: How much more than the best share is deferred for each point that is missing to it, over the last minutes.
_MAKES_UP = 4.0
#: An answer counts half after this number of others.
_ANSWERS_HALVED = 2_000
_ANSWERS_AT_FIRST = 200


class CascadePolicy(ServesOneCascade):
    """See the head of this file."""

    about = About(
        type="CASCADE",
        rank=50,
        summary="one cascade: a threshold that follows the load, deadlines in every decision",
        defaults=CASCADE_DEFAULTS,
        takes_placement=False,
        length_classes=False,
        one_cascade=True,
    )

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._cascade.decide = self._decide
        self._rate = ArrivalRate()
        self._scores = RecentScores(self._spec.scores)
        self._expiring = {False: ExpiryHeap(), True: ExpiryHeap()}  # by: of the heavy stage
        #: (time, score) of what was sent to the heavy program, scores descending: the greatest since a time.
        self._sent: deque[tuple[int, float]] = deque(maxlen=_LOOKED_AT)
        #: Answers of each program, those of the last minutes: light, heavy. It begins as if they had been best.
        best = 1.0 if self._spec.quality is None else 1.0 - self._spec.quality.best_light_share
        self._answers = [(1 - best) * _ANSWERS_AT_FIRST, best * _ANSWERS_AT_FIRST]
        self._running = Running(cluster)
        self._interruptions = Interruptions(cluster)
        self._light_gpus = 1
        self._threshold_ns = self._logged_ns = 0  # when each is due
        #: By GPU index: heavy. Only where both programs do not fit.
        self._roles: dict[int, bool] = {}

    # ---------------------------------------------------------------------------------- facts

    def _arrived(self, request: Request, now_ns: int) -> None:
        if not request.attempts:
            self._rate.add(now_ns)
        least_ns = self._least_ns(request.queue)
        if now_ns + least_ns > request.deadline_ns:
            left = format_duration(max(0, request.deadline_ns - now_ns))
            reason = f"its light stage takes {format_duration(least_ns)} even alone; the deadline is in {left}"
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, reason)
            return
        self._wait(request, heavy=False)

    def _deferred(self, request: Request, now_ns: int) -> None:
        self._wait(request, heavy=True)

    def _wait(self, request: Request, *, heavy: bool) -> None:
        insort(request.queue.requests, request)
        self._expiring[heavy].push(request.deadline_ns - self._least_ns(request.queue), request)

    def _least_ns(self, queue: Queue) -> int:
        """What a request of `queue` takes alone on the fastest GPU, and until its answer is back."""
        paths = self._cluster.paths
        return queue.instance.b1_ns + paths.least_transit_ns + paths.least_returns_ns + _SLACK_NS

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        super().action_done(
            action, code=code, end_ns=end_ns, duration_ns=duration_ns, clock_mhz=clock_mhz
        )
        if action.queue is self._cascade.heavy and code == Code.OK:
            self._count(heavy=len(action.requests))

    def _count(self, *, light: int = 0, heavy: int = 0) -> None:
        """Answers were given; a light one whose request goes on to the heavy program is none."""
        fades = 0.5 ** ((light + heavy) / _ANSWERS_HALVED)
        self._answers = [self._answers[0] * fades + light, self._answers[1] * fades + heavy]

    def _bound(self) -> None:
        _, heavy = self._queues()
        heavy.by_score = True

    def forget(self, request: Request) -> None:
        take_by_due(request.queue.requests, request)

    @property
    def _waits(self) -> bool:
        if self._cascade.light is None:
            return False
        light, heavy = self._queues()
        return bool(light.requests or heavy.requests)

    # ------------------------------------------------------------------------------ the judge

    def _decide(self, request: Request, score: float, now_ns: int) -> Judgement:
        """What follows the light stage of `request`."""
        cascade = self._cascade
        if score == score:
            self._scores.add(score)
        if score >= cascade.threshold:
            self._count(light=1)
            return cascade.accepted(score)
        _, heavy = self._queues()
        late = now_ns + self._least_ns(heavy) > request.deadline_ns
        judged = cascade.rejected(score, in_vain=late or not cascade.serves_heavy)
        if judged.verdict is Verdict.FORCED:
            self._count(light=1)
        return judged

    # ------------------------------------------------------------------------------- the plan

    def _replan(self, now_ns: int) -> None:
        """Follow the load: how many GPUs the light stage needs, and the threshold."""
        if now_ns < self._threshold_ns:
            return
        self._threshold_ns = now_ns + _THRESHOLD_EVERY_NS
        light, heavy = self._queues()
        gpus = [gpu for gpu in self._cluster.gpus.values() if self._serves(gpu)]
        if not gpus:
            return
        rate = self._rate.soon_per_s(now_ns)
        before = self._light_gpus
        self._light_gpus = self._needed_for_light(gpus[0], rate, len(gpus))
        busy = self._busy_part(gpus[0], rate)
        self._interruptions.replan(gpus, light, heavy)
        free = float(len(gpus) - self._light_gpus)
        if self._interruptions.possible:
            free = max(0.0, len(gpus) - busy)
        elif len(gpus) == 1:  # which both stages share
            fits = self._fit_together(gpus[0])
            free = max(0.0, 1.0 - busy) if fits else 0.0
        served, batch = self._heavy_rate(gpus[0], free)
        share = self._options.deferred_part * served / rate if rate else 1.0
        most = self._most_deferred()
        if self._options.fixed_threshold < 0:
            threshold = self._scores.threshold_for(min(share, most))
            if self._spec.quality is None:  # the file's threshold says what is good enough
                threshold = min(threshold, self._spec.threshold)
            self._cascade.threshold = threshold
        self._give_roles(gpus)
        if now_ns >= self._logged_ns:
            self._logged_ns = now_ns + _LOGGED_EVERY_NS
            self._made_plan(
                PlanRecord(
                    at_ns=now_ns,
                    threshold=self._cascade.threshold,
                    light_gpus=self._light_gpus,
                    heavy_gpus=len(gpus) - self._light_gpus,
                    light_batch=self._largest_light(gpus[0]),
                    heavy_batch=batch,
                    demand=rate,
                    heavy_demand=rate * min(share, most),
                    light_queued=len(light.requests),
                    heavy_queued=len(heavy.requests),
                    role_changes=abs(self._light_gpus - before),
                    feasible=busy <= len(gpus),
                )
            )

    def _serves(self, gpu: Gpu) -> bool:
        """Both programs are prepared on the worker of `gpu`."""
        instances = gpu.worker.instances
        return all(queue.instance.model_id in instances for queue in self._queues())

    def _most_deferred(self) -> float:
        """The share of heavy answers with the best quality; more after a time in which fewer were possible."""
        quality = self._spec.quality
        if quality is None:
            return 1.0
        best = 1.0 - quality.best_light_share
        light, heavy = self._answers
        missing = best - heavy / (light + heavy)
        return min(1.0, max(0.0, best + _MAKES_UP * missing))

    def _needed_for_light(self, gpu: Gpu, rate: float, gpus: int) -> int:
        """The number of GPUs that the light stage needs now, at least one."""
        light, _ = self._queues()
        batch = self._largest_light(gpu)
        exec_ns = gpu.exec_table(light).estimators[batch].expected_ns
        busy = self._busy_part(gpu, rate)
        part_ns = self._spec.slo_ns // _LIGHT_PART
        behind = max(0, len(light.requests) - batch) * exec_ns / batch / part_ns
        return min(gpus, max(1, ceil(busy - 0.1), ceil(behind)))

    def _busy_part(self, gpu: Gpu, rate: float) -> float:
        """The number of GPUs that `rate` requests/s keep busy with light batches, with a little to spare."""
        light, _ = self._queues()
        batch = self._largest_light(gpu)
        exec_ns = gpu.exec_table(light).estimators[batch].expected_ns
        return rate * _LIGHT_SPARE * exec_ns / (batch * NS_PER_S)

    def _largest_light(self, gpu: Gpu) -> int:
        """The largest light batch that takes no more than its part of the SLO; more where work piles up."""
        light, _ = self._queues()
        table = gpu.exec_table(light)
        behind = len(light.requests) > 2 * len(self._cluster.gpus)
        part_ns = self._spec.slo_ns // (_LIGHT_PART // 2 if behind else _LIGHT_PART)
        fitting = [b for b, each in table.classes if each.expected_ns <= part_ns]
        return max(fitting, default=table.batches[0])

    def _heavy_rate(self, gpu: Gpu, gpus: float) -> tuple[float, int]:
        """(requests/s, batch size) of `gpus` GPUs in heavy batches that follow a light one within the SLO."""
        light, heavy = self._queues()
        table, lights = gpu.exec_table(heavy), gpu.exec_table(light)
        before_ns = lights.estimators[self._largest_light(gpu)].expected_ns
        best, size = 0.0, table.batches[0]
        for batch, each in table.classes:
            # A request waits for half of the time between two GPUs that open.
            waits_ns = each.expected_ns / (2 * max(gpus, 1))
            rate = gpus * batch * NS_PER_S / each.expected_ns
            if before_ns + waits_ns + each.expected_ns <= self._spec.slo_ns and rate > best:
                best, size = rate, batch
        if not best and gpus:
            best = gpus * NS_PER_S / table.single.expected_ns
        return best, size

    def _give_roles(self, gpus: list[Gpu]) -> None:
        """Where both programs do not fit on a GPU, each GPU is for one, and changes as seldom as it can."""
        apart: list[Gpu] = []
        for gpu in gpus:
            if self._fit_together(gpu):
                self._placement.allow(gpu, self._weights_for(gpu, heavy=False))
            else:
                apart.append(gpu)
        apart.sort(key=lambda gpu: (self._roles.get(gpu.index, True), gpu.index))
        for place, gpu in enumerate(apart):
            is_heavy = self._roles[gpu.index] = place >= self._light_gpus
            self._placement.allow(gpu, self._weights_for(gpu, heavy=is_heavy))

    # -------------------------------------------------------------------------------- serving

    def plan(self, *, now_ns: int) -> None:
        super().plan(now_ns=now_ns)
        if self._interruptions.possible and self._cascade.light is not None:
            self._interrupt(now_ns)

    def _interrupt(self, now_ns: int) -> None:
        """Have light batches interrupt heavy ones; GPUs that were open have been given work.

        Full ones, and those whose oldest request has waited: small batches take more time for each request.
        """
        light, _ = self._queues()
        gpu = next(iter(light.instance.resident_on.values()), None)
        most = 0 if gpu is None else self._largest_light(gpu)
        while light.requests and (len(light.requests) >= most or self._has_waited(now_ns)):
            found = self._interruptions.best(light, most, now_ns)
            if found is None:
                return
            taken = light.requests[found.first : found.first + found.taken]
            del light.requests[found.first : found.first + found.taken]
            self._send(
                found.gpu,
                taken,
                start_ns=found.start_ns,
                now_ns=now_ns,
                latest_ns=found.start_ns + max(0, taken[0].deadline_ns - found.ends_ns),
                priority=1,
            )

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        light, heavy = self._queues()
        resident = gpu.resident
        runs_light = bool(light.requests) and light.instance.model_id in resident
        runs_heavy = bool(heavy.requests) and heavy.instance.model_id in resident
        if runs_light and (self._is_due(start_ns) or not self._may_run_heavy(gpu)):
            self._serve_light(gpu, start_ns, now_ns)
        elif runs_heavy and self._may_run_heavy(gpu):
            if not self._serve_heavy(gpu, start_ns, now_ns) and runs_light:
                self._serve_light(gpu, start_ns, now_ns)
        elif runs_light:
            self._serve_light(gpu, start_ns, now_ns)

    def _may_run_heavy(self, gpu: Gpu) -> bool:
        """A heavy batch leaves the GPUs free that the light stage needs; a single GPU serves that first."""
        light, heavy = self._queues()
        if self._interruptions.possible:
            return True
        if len(self._cluster.gpus) == 1:
            return not light.requests
        is_heavy = any(action.queue is heavy for action in gpu.exec.outstanding)
        busy = self._running.gpus_with(heavy) - is_heavy
        return busy < len(self._cluster.gpus) - self._light_gpus

    def _can_serve(self) -> bool:
        light, heavy = self._queues()
        if light.requests:
            return True
        # Some GPU that runs heavy batches may be given the next one.
        most = len(self._cluster.gpus)
        if not self._interruptions.possible:
            most -= self._light_gpus
        return bool(heavy.requests) and self._running.gpus_with(heavy) <= max(most, 1)

    def _is_due(self, start_ns: int) -> bool:
        """Light requests wait, and too few GPUs run light batches, or the oldest has waited for long."""
        light, _ = self._queues()
        return self._running.gpus_with(light) < self._light_gpus or self._has_waited(start_ns)

    def _has_waited(self, start_ns: int) -> bool:
        """The oldest light request will have waited for its part of the SLO."""
        light, _ = self._queues()
        return start_ns - light.requests[0].arrival_ns > self._spec.slo_ns // _LIGHT_PART

    def _serve_light(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        """Send the largest batch that is in time, of the requests with the earliest deadlines."""
        light, _ = self._queues()
        queue, table = light.requests, gpu.exec_table(light)
        back_ns = gpu.worker.returns.margin_ns
        most = min(len(queue), self._largest_light(gpu))
        for batch in range(most, 0, -1):
            batch_class = table.class_for(batch)
            ends_ns = start_ns + table.estimators[batch_class].margin_ns + back_ns
            first = self._first_in_time(queue, ends_ns)
            if len(queue) - first >= batch:
                taken = queue[first : first + batch]
                del queue[first : first + batch]
                latest_ns = start_ns + max(0, taken[0].deadline_ns - ends_ns)
                self._send(gpu, taken, start_ns=start_ns, now_ns=now_ns, latest_ns=latest_ns)
                return
        self._try_one(gpu, light, start_ns, now_ns)

    def _try_one(self, gpu: Gpu, queue: Queue, start_ns: int, now_ns: int) -> bool:
        """Nothing of `queue` is in time by what an idle GPU did lately: try one by its profile. True if sent.

        So a GPU that was slow for a while is noticed to have recovered.
        """
        if gpu.exec.outstanding or not queue.requests:
            return False
        request = queue.requests[-1]
        latest_ns = request.deadline_ns - queue.instance.b1_ns - gpu.worker.returns.margin_ns
        if start_ns > latest_ns:
            return False
        self.forget(request)
        self._send(gpu, [request], start_ns=start_ns, now_ns=now_ns, latest_ns=latest_ns)
        return True

    def _first_in_time(self, queue: list[Request], ends_ns: int) -> int:
        """The first place in `queue` of a request whose deadline is not before `ends_ns`."""
        rest_ns = queue[0].deadline_ns - queue[0].due_ns
        return first_from(queue, ends_ns - rest_ns)

    def _serve_heavy(self, gpu: Gpu, start_ns: int, now_ns: int) -> bool:
        """Send the largest batch that is in time, of those that fit into it the lowest scores. True if sent."""
        _, heavy = self._queues()
        queue, table = heavy.requests, gpu.exec_table(heavy)
        back_ns = gpu.worker.returns.margin_ns
        most = min(self._spread(len(queue)), table.batches[-1])
        for batch in range(most, 0, -1):
            batch_class = table.class_for(batch)
            ends_ns = start_ns + table.estimators[batch_class].margin_ns + back_ns
            first = self._first_in_time(queue, ends_ns)
            if len(queue) - first >= batch:
                soonest_due = queue[first : first + max(batch, _LOOKED_AT)]
                self._send_lowest(gpu, soonest_due, batch, start_ns, now_ns, ends_ns)
                return True
        return self._try_one(gpu, heavy, start_ns, now_ns)

    def _spread(self, waiting: int) -> int:
        """Requests for each of the GPUs that are idle now, so that none of them stays idle."""
        light, _ = self._queues()
        busy_light = min(self._light_gpus, self._running.gpus_with(light))
        return ceil(waiting / max(1, self._running.idle - self._light_gpus + busy_light))

    def _send_lowest(
        self,
        gpu: Gpu,
        fitting: list[Request],
        batch: int,
        start_ns: int,
        now_ns: int,
        ends_ns: int,
    ) -> None:
        taken = sorted(fitting, key=lambda request: (request.trail[-1].score, request.key))[:batch]
        for request in taken:
            self.forget(request)
        greatest = taken[-1].trail[-1].score
        while self._sent and self._sent[-1][1] <= greatest:
            self._sent.pop()
        self._sent.append((now_ns, greatest))
        earliest_ns = min(request.deadline_ns for request in taken)
        latest_ns = start_ns + max(0, earliest_ns - ends_ns)
        self._send(gpu, taken, start_ns=start_ns, now_ns=now_ns, latest_ns=latest_ns)

    # ------------------------------------------------------------------------------ in vain

    def _expire(self, now_ns: int) -> None:
        slices = self._cluster.slices
        for request in self._expiring[False].pop_some(now_ns + 1, slices):
            self.forget(request)
            waited = format_duration(now_ns - request.arrival_ns)
            reason = f"no GPU came free for its light stage in time: it waited {waited}"
            self._refusals.refuse(request, Code.TIMED_OUT, reason)
        for request in self._expiring[True].pop_some(now_ns + 1, slices):
            self.forget(request)
            self._count(light=self._options.rejected_answers)
            outranked = self._is_outranked(request)
            code = Code.SKIPPED if outranked else Code.TIMED_OUT
            self._refusals.refuse(request, code, "the heavy program no longer fits")

    def _is_outranked(self, request: Request) -> bool:
        """Requests were sent to the heavy program since it waits, and all had lower scores."""
        since = (score for at_ns, score in self._sent if at_ns >= request.queued_ns)
        greatest = next(since, None)
        return greatest is not None and greatest <= request.trail[-1].score

    def _next_ns(self) -> int | None:
        return soonest(
            self._expiring[False].next_ns(),
            self._expiring[True].next_ns(),
            self._threshold_ns if self._waits_for_plan else None,
            self._due_ns(),
        )

    def _due_ns(self) -> int | None:
        """When the oldest light request may interrupt something, if that is still to come."""
        if not self._interruptions.possible or self._cascade.light is None:
            return None
        light, _ = self._queues()
        if not light.requests:
            return None
        due_ns = light.requests[0].arrival_ns + self._spec.slo_ns // _LIGHT_PART + 1
        return due_ns if due_ns > self._now_ns else None

    @property
    def _waits_for_plan(self) -> bool:
        """Requests came lately, so the threshold may have to follow."""
        return self._cascade.light is not None and self._rate.per_s(self._now_ns) > 0
