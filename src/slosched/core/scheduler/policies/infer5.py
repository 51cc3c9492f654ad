"""INFER5, our form: the GPU time that is about to be free goes to the most urgent *batch*.

It decides when a request arrives or a GPU opens (dispatch_windows.py), and at no other time. For the open GPU
that can start soonest, at s:

1. every request that cannot be in time even alone, starting at s, is answered at once;
2. for each model and batch class b, the i oldest requests that are too old for b are skipped; the k
   that follow are a candidate if k is more than the next smaller class holds, and if a padded batch
   (k < b) costs no more GPU time for each request than that class does when full (batch_choice.py);
3. the smallest key goes, where e is the exec time of b, and everything is in units of the model's b1:

       key = d_first + d_head / 4 - g k + (l - 1) e + delta i
       g = 1.9 + 3.45 x      l = 3.3 + 4 x      delta = 0.24 - 0.17 x

   d_first is the first deadline of the batch, d_head that of the model's oldest request, and k counts each
   request as its weight once requests are lost (weights.py): a batch takes the most valuable ones;
4. skipped requests stay for smaller classes, until rule 1 answers them, with code 7;
5. a request that arrives is refused at once if a forecast of its queue gives it no chance (forecast.py).

This is earliest virtual deadline first with credit for serving many at once. x is the share of requests
lost lately (losses.py): the more requests are lost, the more efficiency counts against urgency. A model that
was starved has a turn before all this (anti_starvation.py).

A promise leaves the exec estimator's margin and the margin of the worker's return latency before the deadline;
behind another inference also that one's margin, the two as independent errors add up (root of the squares). A
single request on an idle GPU needs no promise: it is sent when it is likely to be in time, and refused
only when it is not. The worker gets the latest start at which half the batch would still be in time,
and refuses the action after it.

Nothing is rescanned: GPUs are kept in the order in which they become free (gpus_by_free_time.py), waiting
models in the order of a bound on their keys (urgency.py), and a GPU for which no batch was found is asked again
only when something changed for it (dispatch_windows.py). The decisions are those of a full scan.
"""

from __future__ import annotations

from bisect import insort

from slosched.codes import Code
from slosched.core.scheduler.anti_starvation import AntiStarvation
from slosched.core.scheduler.batch_choice import BatchChoice, Choice
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.dispatch_windows import DispatchWindows
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.forecast import Forecast, why_refused_early
from slosched.core.scheduler.joint_batches import Joint, by_queue, joint_batch
from slosched.core.scheduler.length_classes import programs
from slosched.core.scheduler.losses import Losses
from slosched.core.scheduler.near_calls import CALM, NearCalls, first_due
from slosched.core.scheduler.overtaking import Overtaking
from slosched.core.scheduler.plans import (
    NEVER_NS,
    Plan,
    loading_plan,
    resident_plan,
    why_given_up,
    why_nowhere,
    why_refused,
)
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.placements import make_placement
from slosched.core.scheduler.queues import take_by_due
from slosched.core.scheduler.shares import Shares
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Queue, Request
from slosched.core.scheduler.urgency import (
    Urgency,
)
from slosched.core.scheduler.weights import (
    standing_of,
    value_of,
    was_stepped_over,
)

#: Above this loss rate, prefer batches whose answers still leave time for the client's network latency.
_FLOODED = 0.3


class Infer5:
    """The default policy. See the head of this file."""

    about = About(
        type="INFER5",
        rank=0,
        fidelities=("best",),
        summary="deadlines, batching, loading and eviction of weights: what you usually want",
        serves_functions=True,
    )

    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._windows = DispatchWindows(cluster)
        self._placement = make_placement(cluster)
        self._urgency = Urgency()
        self._waiting = self._urgency.waiting  # queues with requests
        self._fresh: dict[int, Queue] = {}  # queues with requests that no GPU was offered yet
        self._expiry = ExpiryHeap()  # by the latest start that is likely in time
        self._anti_starvation = AntiStarvation()
        self._unloaded = cluster.changes.follow_unloaded()
        self._shares = Shares() if cluster.config.client_weights == "shares" else None
        early = cluster.config.early_refusal
        self._forecast = Forecast(early) if early else None
        self._mixes_lengths = cluster.config.mix_lengths
        preempts = cluster.config.preempt
        self._overtaking = Overtaking(cluster, self._waiting) if preempts else None
        self._near = NearCalls(cluster, self._urgency, commit=self._commit)
        self._losses = Losses()
        self.batches = BatchChoice(self._urgency, self._losses)
        self._now_ns = 0
        #: The cost of decisions: GPUs examined for a request, GPUs asked for a batch.
        self.gpus_looked_at = 0
        self.gpus_asked = 0

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        queue = request.queue
        self._placement.asked_for(request, now_ns=now_ns)
        latest_ns, start_ns, exec_ns = self._best_plan(request, now_ns)
        if start_ns > latest_ns:
            if not self._near.trials.sent(request, now_ns):
                self._refuse_at_once(request, start_ns, exec_ns, now_ns)
            return
        weight = request.weight
        if self._shares is not None:
            weight = self._shares.value(request, self._losses.share)
        value = weight / self._losses.unit
        if value != 1.0 or request.policy_data is not None:
            standing_of(request).value = value
        forecast = self._forecast
        # A request that is worth more than lost ones goes before them: then the forecast does not apply.
        if (
            forecast is not None
            and not forecast.idle
            and value <= 1.0
            and self._can_be_forecast(request)
        ):
            start_ns = forecast.hopeless_start_ns(request, latest_ns, now_ns=now_ns)
            if start_ns:
                self._refuse_early(request, start_ns, exec_ns, now_ns)
                return
        requests = queue.requests
        if requests and request < requests[-1]:
            insort(requests, request)
        else:
            requests.append(request)
        if value != 1.0:
            self._urgency.weighs(queue, value)
        self._urgency.grew(queue)
        self._fresh[queue.queue_id] = queue
        if self._overtaking is not None:
            self._overtaking.queued(request)
        if request.call is not None:
            self._near.queued(request)
        self._expiry.push(latest_ns, request)

    def forget(self, request: Request) -> None:
        queue = request.queue
        take_by_due(queue.requests, request)
        if request.policy_data is not None and value_of(request) != 1.0:
            self._urgency.weighs_no_more(queue, 1)
        self._urgency.shrank(queue)

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        """The cluster's own predictions are enough; the bounds on keys must hold for them."""
        if duration_ns and action.requests:
            batch, program = action.batch_class, action.queue.program
            expected_ns = action.gpu.tables[program].estimators[batch].expected_ns
            self._urgency.measured(program, batch, expected_ns)
            self._near.trials.measured(action, duration_ns, end_ns)
        else:
            self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)

    def gpu_added(self, gpu: Gpu) -> None:
        """DispatchWindows learns it from the cluster."""
        if gpu.brought and self._forecast is not None:
            self._forecast.forget()

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        if gpus:
            prepared = gpus[0].worker.prepared[model.name]
            for program, exec_ns in programs(prepared, model.name).items():
                for batch, batch_ns in exec_ns.items():
                    self._urgency.measured(program, batch, batch_ns)
        self._placement.model_loaded(model, gpus)

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        self._placement.asked_for(request, now_ns=now_ns)

    def settled(self, model: Instance) -> bool:
        return self._placement.settled(model)

    def next_wakeup_ns(self) -> int | None:
        if not self._waiting:
            return None
        wakeup_ns = self._windows.next_opening_ns(self._now_ns)
        loads_ns = self._placement.next_wakeup_ns()
        if loads_ns is not None and (wakeup_ns is None or loads_ns < wakeup_ns):
            wakeup_ns = loads_ns
        expiry_ns = self._expiry.next_ns()
        if expiry_ns is not None and self._cluster.gpus:
            expiry_ns -= self._cluster.paths.least_transit_ns
            expiry_ns = (expiry_ns if expiry_ns > self._now_ns else self._now_ns) + 1
            if wakeup_ns is None or expiry_ns < wakeup_ns:
                return expiry_ns
        return wakeup_ns

    # ------------------------------------------------------------------------------ feasibility

    def _best_plan(self, request: Request, now_ns: int) -> Plan:
        if not request.instance.resident_on:
            return self._loading_plan(request, now_ns)
        latest_ns, start_ns, exec_ns = self._resident_plan(request, now_ns)
        if start_ns > latest_ns and self._overtaking is not None:
            urgent_ns = self._overtaking.start_ns(request, now_ns)
            if urgent_ns is not None and urgent_ns < start_ns:
                start_ns = urgent_ns
        return latest_ns, start_ns, exec_ns

    def _loading_plan(self, request: Request, now_ns: int) -> Plan:
        return loading_plan(self._cluster, self._placement, request, now_ns)

    def _resident_plan(self, request: Request, now_ns: int) -> Plan:
        plan, looked_at = resident_plan(self._cluster, self._urgency, request, now_ns)
        self.gpus_looked_at += looked_at
        return plan

    def _refuse_at_once(self, request: Request, start_ns: int, exec_ns: int, now_ns: int) -> None:
        if start_ns >= NEVER_NS or not self._cluster.gpus:
            reason, start_ns = why_nowhere(self._cluster, request), -1
        else:
            reason = why_refused(request, start_ns, exec_ns, now_ns)
        self._lost(request, now_ns)
        code = Code.COULD_NOT_START_IN_TIME
        if request.attempts > request.excused or (request.attempts and not request.stage):
            code, reason = Code.TIMED_OUT, f"no second try fits: {reason}"
        self._refusals.refuse(request, code, reason, start_ns=start_ns, exec_ns=exec_ns)

    def _can_be_forecast(self, request: Request) -> bool:
        """False where the recent past does not apply: weights must be loaded first, or an action failed."""
        failed = request.attempts > request.excused if request.stage else request.attempts
        return bool(request.instance.resident_on) and not failed

    def _refuse_early(self, request: Request, start_ns: int, exec_ns: int, now_ns: int) -> None:
        reason = why_refused_early(request, start_ns, exec_ns, now_ns)
        self._lost(request, now_ns)
        self._anti_starvation.lost(request.queue, now_ns=now_ns)
        code = Code.COULD_NOT_START_IN_TIME
        self._refusals.refuse(request, code, reason, start_ns=start_ns, exec_ns=exec_ns)

    def _lost(self, request: Request, now_ns: int) -> None:
        self._losses.lost(request)
        if request.instance.resident_on:
            self._placement.short_of(request.instance, now_ns=now_ns)

    def _answer_hopeless(self, now_ns: int) -> None:
        """Rule 1: answer requests that cannot start in time anywhere; as many as one step may answer."""
        self.batches.hopeless_ns = 0
        first_ns, order = self._expiry.first_ns(), self._cluster.free_order.entries
        soonest_ns = NEVER_NS
        if order:  # no GPU can start a new action before this
            soonest_ns = now_ns + self._cluster.paths.least_transit_ns
            if order[0][0] > soonest_ns and self._overtaking is None:
                soonest_ns = order[0][0]
        if first_ns is None or first_ns >= soonest_ns:
            return
        for request in self._expiry.pop_some(soonest_ns, self._cluster.slices):
            latest_ns, start_ns, exec_ns = self._best_plan(request, now_ns)
            if start_ns <= latest_ns and latest_ns >= soonest_ns:
                # Estimates have moved since it was queued: it may be in time again.
                self._expiry.push(latest_ns, request)
                continue
            self.forget(request)
            self._lost(request, now_ns)
            self._anti_starvation.lost(request.queue, now_ns=now_ns)
            if self._forecast is not None:
                self._forecast.lost(request.queue, now_ns=now_ns)
            code, reason = why_given_up(
                request, start_ns, exec_ns, now_ns, stepped_over=was_stepped_over(request)
            )
            best_ns = start_ns if start_ns < NEVER_NS else -1
            self._refusals.refuse(request, code, reason, start_ns=best_ns, exec_ns=exec_ns)
        due_ns = self._expiry.next_ns()
        if due_ns is not None and due_ns < soonest_ns:
            self.batches.hopeless_ns = soonest_ns

    # ------------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._placement.plan(now_ns=now_ns)
        if not self._waiting:
            return
        self._answer_hopeless(now_ns)
        if self._near:
            self._near.plan(now_ns)
        windows = self._windows
        windows.refresh(now_ns)
        if not windows.open:
            self._fresh.clear()  # each GPU is asked when it opens
        elif self._waiting and (self._fresh or windows.to_ask):
            sent = self._give_work(now_ns)
            self._fresh.clear()
            if sent and self._cluster.hosts:
                self._fill_slots(now_ns)
            if sent and self._waiting:
                self._answer_hopeless(now_ns)
        if self._overtaking is not None and self._waiting:
            self._send_urgent(self._overtaking, now_ns)

    def _give_work(self, now_ns: int) -> bool:
        """Find work for each open GPU that may have some, soonest first. True if anything was sent."""
        windows, waiting = self._windows, self._waiting
        widely_held: dict[int, Queue] = {}  # fresh queues whose instances many GPUs hold
        for queue_id, queue in self._fresh.items():
            if queue_id not in waiting:
                continue
            if not windows.ask_holders(queue.instance.resident_on):
                widely_held[queue_id] = queue
        sent = False
        if widely_held:
            for start_ns, index, gpu in windows.in_order(now_ns):
                held = any(q.instance.model_id in gpu.resident for q in widely_held.values())
                if held or index in windows.to_ask:
                    sent |= self._ask(gpu, start_ns, now_ns)
                    widely_held = {i: q for i, q in widely_held.items() if i in waiting}
                    if not widely_held:
                        break
        if waiting and windows.to_ask:
            for start_ns, _, gpu in windows.to_ask_in_order(now_ns):
                sent |= self._ask(gpu, start_ns, now_ns)
                if not waiting:
                    break
        return sent

    def _fill_slots(self, now_ns: int) -> None:
        """Each host was given one call: go on while one more can be given."""
        sent = True
        while sent and self._waiting:
            self._windows.refresh(now_ns)
            to_ask = self._windows.to_ask_in_order(now_ns)
            given = [self._ask(gpu, start_ns, now_ns) for start_ns, _, gpu in to_ask if gpu.host]
            sent = any(given)

    def _send_urgent(self, overtaking: Overtaking, now_ns: int) -> None:
        """Have urgent batches interrupt what runs, while that gains."""
        while (urgent := overtaking.best(now_ns)) is not None:
            choice = (urgent.queue, urgent.first, urgent.taken, urgent.batch)
            self._commit(urgent.gpu, choice, urgent.start_ns, now_ns, priority=1)
            self._anti_starvation.served(urgent.queue, urgent.expected_ns, turn=False)

    def _ask(self, gpu: Gpu, start_ns: int, now_ns: int) -> bool:
        """Send what should run next on `gpu`, from `start_ns`; False if nothing that waits can."""
        self.gpus_asked += 1
        turn = self._turn(gpu, start_ns, now_ns)
        choice, all_late = turn, False
        if choice is None:
            if gpu.host and self._losses.share < CALM:
                choice, all_late = first_due(gpu, self._waiting.values(), start_ns)
            else:
                choice, all_late = self.batches.best(gpu, start_ns, now_ns)
            if choice is not None and self._losses.share > _FLOODED:
                choice = self.batches.with_time_to_spare(gpu, choice, start_ns, now_ns)
        self._windows.asked(gpu, retry_when_faster=all_late)
        if self._near and turn is None:
            choice = self._near.instead_of(choice, gpu, start_ns)
        if choice is None:
            return False
        expected_ns = self._commit(gpu, choice, start_ns, now_ns)
        self._anti_starvation.served(choice[0], expected_ns, turn=turn is not None)
        return True

    def _turn(self, gpu: Gpu, start_ns: int, now_ns: int) -> Choice | None:
        """A batch of a starved model that must run next on `gpu`; None: decide as usual."""
        while self._unloaded:
            for queue in self._unloaded.popitem()[1].queues:
                self._anti_starvation.gone(queue)
        due = self._anti_starvation.due(now_ns)
        if not due:
            return None
        for queue in due:
            if queue.requests:
                choice, _ = self.batches.best(gpu, start_ns, now_ns, only=queue)
                if choice is not None:
                    return choice
        self._anti_starvation.none_fits(due)
        return None

    def _commit(
        self, gpu: Gpu, choice: Choice, start_ns: int, now_ns: int, *, priority: int = 0
    ) -> int:
        """Send the batch. Returns its expected exec time, ns."""
        queue, _, taken, batch = choice
        requests = self.batches.take(gpu, choice)
        expected_ns = gpu.tables[queue.program].estimators[batch].expected_ns
        if queue.length and self._mixes_lengths and not priority:
            weighted = self._urgency.weighted
            joint = joint_batch(gpu, queue, requests, batch, start_ns, weighted)
            if joint.riders:
                requests = self._take_riders(requests, joint)
                queue, batch, expected_ns = joint.queue, joint.batch, joint.expected_ns
                taken = len(requests)
        # After this start, half the batch would be late; it is better to plan the rest anew.
        middle_ns = requests[(taken - 1) // 2].deadline_ns
        latest_ns = max(start_ns, middle_ns - expected_ns - gpu.worker.returns.expected_ns)
        self._cluster.send_infer(
            gpu,
            requests,
            batch,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=expected_ns,
            latest_ns=latest_ns,
            queue=queue,
            priority=priority,
        )
        if self._forecast is not None and not self._forecast.idle:
            for part in by_queue(requests) if queue.length else (requests,):
                part_ns = expected_ns * len(part) // len(requests)
                table = gpu.tables[part[0].queue.program]
                self._forecast.served(part, table, part_ns, now_ns=now_ns)
        if self._shares is not None:
            self._shares.given(requests, expected_ns, now_ns=now_ns)
        return expected_ns

    def _take_riders(self, requests: list[Request], joint: Joint) -> list[Request]:
        """Take those that join out of their queues. Returns all aboard, in the order of their due dates."""
        aboard = list(requests)
        for other, first, count in joint.riders:
            riders = other.requests[first : first + count]
            del other.requests[first : first + count]
            self._urgency.shrank(other)
            self._anti_starvation.served(other, 0, turn=False)
            aboard += riders
        self._losses.served(len(aboard) - len(requests))
        return sorted(aboard)
