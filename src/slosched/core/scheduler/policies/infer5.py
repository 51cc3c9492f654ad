"""INFER5, our form: the GPU time that is about to be free goes to the most urgent *batch*.

Decided when a request arrives or a GPU opens (openings.py), and at no other time. For the open GPU
that can start soonest, at s:

1. every request that cannot be in time even alone, starting at s, is answered at once;
2. for each model and batch class b, step over the i oldest requests that are too old for b; the k
   that follow are a candidate if k is more than the next smaller class holds, and if a padded batch
   (k < b) costs no more GPU time for each request than that class does when full;
3. the smallest key goes, where e is the exec time of b, and everything is in units of the model's b1:

       key = d_first + d_head / 4 - g k + (l - 1) e + delta i
       g = 1.9 + 3.45 x      l = 3.3 + 4 x      delta = 0.24 - 0.17 x

   d_first is the first deadline of the batch, d_head that of the model's oldest request;
4. those stepped over stay for smaller classes, until rule 1 answers them, with code 7.

It is earliest virtual deadline first with credit for serving many at once. x is the share of requests
lost lately: the more is lost, the more efficiency counts against urgency.

A promise leaves the exec estimator's margin and the worker's return margin before the deadline. A
single request on an idle GPU needs no promise: it is sent when it is likely to be in time, and refused
only when it is not. The worker gets the latest start at which half the batch would still be in time,
and refuses the action after it.

Nothing is rescanned: GPUs stand in the order in which they are free (free_order.py), waiting models in
that of a bound on their keys (urgency.py), and a GPU that nothing could go to is asked again when
something changed for it (openings.py). The decisions are those of a full scan.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.openings import Openings
from slosched.core.scheduler.placement import make_placement
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request
from slosched.core.scheduler.urgency import (
    CREDIT,
    CREDIT_SLOPE,
    PENALTY,
    PENALTY_SLOPE,
    ROUNDING_NS,
    WEIGHT,
    WEIGHT_SLOPE,
    Entry,
    Urgency,
)
from slosched.units import format_duration

#: Later than everything: where no GPU can start a request at all.
_NEVER_NS = 2**62
#: Weight of one request in the moving average of losses.
_LOSS_WEIGHT = 0.012
#: With nothing else waiting, those a smaller class leaves over are served right behind it, sooner than
#: the larger class would be done: a padded one must then be this much more efficient.
_PADDING_GAIN = 1.07
#: At most so many GPUs are looked at for the one that would be the least late.
_LOOKED_AT = 8
#: So few waiting models are looked at without putting them in order.
_FEW_MODELS = 3
_NO_KEY = math.inf

#: A batch: model, requests stepped over, requests taken, class.
_Choice = tuple[Model, int, int, int]
#: What one request can expect: latest start that is likely in time, earliest start there is, exec.
_Plan = tuple[int, int, int]


class Infer5:
    """The default policy. See the head of this file."""

    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._openings = Openings(cluster)
        self._placement = make_placement(cluster)
        self._urgency = Urgency()
        self._waiting = self._urgency.waiting  # models with queued requests
        self._fresh: dict[int, Model] = {}  # with requests that no GPU was asked about yet
        self._expiry = ExpiryHeap()  # by the latest start that is likely in time
        self._loss = 0.0
        self._now_ns = 0
        #: What decisions cost: GPUs looked at when a request arrives or may be hopeless, GPUs asked for a
        #: batch, and waiting models looked at for that.
        self.gpus_looked_at = 0
        self.gpus_asked = 0
        self.models_looked_at = 0

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.model
        self._placement.asked_for(request, now_ns=now_ns)
        plan = self._resident_plan if model.resident_on else self._loading_plan
        latest_ns, start_ns, exec_ns = plan(request, now_ns)
        if start_ns > latest_ns:
            self._refuse_at_once(request, start_ns, exec_ns, now_ns)
            return
        queue = model.queue
        if queue and request < queue[-1]:
            insort(queue, request)
        else:
            queue.append(request)
        self._urgency.grew(model)
        self._fresh[model.model_id] = model
        self._expiry.push(latest_ns, request)

    def forget(self, request: Request) -> None:
        request.model.queue.remove(request)
        self._urgency.shrank(request.model)

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        """The cluster's own predictions are enough; the bounds on keys must hold for them."""
        if duration_ns and action.requests:
            batch, name = action.batch_class, action.model.name
            expected_ns = action.gpu.tables[name].estimators[batch].expected_ns
            self._urgency.measured(name, batch, expected_ns)
        else:
            self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)

    def gpu_added(self, gpu: Gpu) -> None:
        """Openings hears of it."""

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)

    def model_loaded(self, model: Model, gpus: list[Gpu], *, now_ns: int) -> None:
        if gpus:
            loaded = gpus[0].worker.prepared[model.name]
            exec_ns = dict(zip(loaded.batch_sizes, loaded.exec_ns, strict=True))
            for batch, batch_ns in exec_ns.items():
                self._urgency.measured(model.name, batch, batch_ns)
        self._placement.model_loaded(model, gpus)

    def settled(self, model: Model) -> bool:
        return self._placement.settled(model)

    def next_wakeup_ns(self) -> int | None:
        if not self._waiting:
            return None
        wakeup_ns = self._openings.next_opening_ns(self._now_ns)
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

    def _best_plan(self, request: Request, now_ns: int) -> _Plan:
        if request.model.resident_on:
            return self._resident_plan(request, now_ns)
        return self._loading_plan(request, now_ns)

    def _loading_plan(self, request: Request, now_ns: int) -> _Plan:
        """The plan on a GPU that could load the model, in order of their numbers: the first that will
        do, else the least late. With no GPU at all the start lies beyond every deadline.
        """
        model = request.model
        best = (request.deadline_ns, _NEVER_NS, model.b1_ns)
        for gpu in self._cluster.gpus.values():
            start_ns = self._placement.load_ready_ns(gpu, model, now_ns)
            if start_ns is None:
                continue
            single_ns = gpu.exec_table(model).single.expected_ns
            latest_ns = request.deadline_ns - single_ns - gpu.worker.returns.expected_ns
            if start_ns <= latest_ns:
                return latest_ns, start_ns, single_ns
            if start_ns - latest_ns < best[1] - best[0]:
                best = (latest_ns, start_ns, single_ns)
        return best

    def _resident_plan(self, request: Request, now_ns: int) -> _Plan:
        """The plan on a GPU that holds the model, in the order in which they are free: the first that
        will do, else the least late of the first few.
        """
        model = request.model
        holders, name = model.resident_on, model.name
        deadline_ns = request.deadline_ns
        order = self._cluster.free_order.entries
        if len(holders) * 4 < len(order):
            order = sorted((g.exec.busy_until_ns, i, g) for i, g in holders.items())
        best = (0, _NEVER_NS, 0)
        seen = 0
        looked_at = 0
        for busy_ns, index, gpu in order:
            looked_at += 1
            if index not in holders:
                continue
            worker = gpu.worker
            start_ns = now_ns + worker.transit.expected_ns
            if busy_ns > start_ns:
                start_ns = busy_ns
            single_ns = gpu.tables[name].single.expected_ns
            latest_ns = deadline_ns - single_ns - worker.returns.expected_ns
            if start_ns <= latest_ns:
                self.gpus_looked_at += looked_at
                return latest_ns, start_ns, single_ns
            if seen < _LOOKED_AT:
                seen += 1
                if start_ns - latest_ns < best[1] - best[0]:
                    best = (latest_ns, start_ns, single_ns)
            else:
                paths = self._cluster.paths
                soonest_ns = max(busy_ns, now_ns + paths.least_transit_ns)
                needs_ns = self._urgency.least_single_ns(name) + paths.least_returns_ns
                if soonest_ns + needs_ns > deadline_ns:
                    self.gpus_looked_at += looked_at
                    return best  # nor will any that is free later
        self.gpus_looked_at += len(order)
        return best

    def _refuse_at_once(self, request: Request, start_ns: int, exec_ns: int, now_ns: int) -> None:
        if not self._cluster.gpus:
            reason, start_ns = "no GPU is connected to the controller", -1
        elif start_ns >= _NEVER_NS:
            reason, start_ns = "no connected GPU has this model ready", -1
        else:
            state = "" if request.model.resident_on else " after loading its weights"
            reason = (
                f"could start in {format_duration(start_ns - now_ns)} at the earliest{state} and takes "
                f"{format_duration(exec_ns)}; the deadline is in {format_duration(request.slo_ns)}"
            )
        self._lost(request.model, now_ns)
        code = Code.COULD_NOT_START_IN_TIME
        if request.attempts:  # it came back from an action that failed
            code, reason = Code.TIMED_OUT, f"no second try fits: {reason}"
        self._refusals.refuse(request, code, reason, start_ns=start_ns, exec_ns=exec_ns)

    def _lost(self, model: Model, now_ns: int) -> None:
        self._loss += _LOSS_WEIGHT * (1.0 - self._loss)
        if model.resident_on:
            self._placement.short_of(model, now_ns=now_ns)

    def _answer_hopeless(self, now_ns: int) -> None:
        """Rule 1, over all models: who cannot start in time anywhere is answered now."""
        entries, order = self._expiry.entries, self._cluster.free_order.entries
        soonest_ns = _NEVER_NS
        if order:  # no GPU starts anything decided from now on before this
            soonest_ns = now_ns + self._cluster.paths.least_transit_ns
            if order[0][0] > soonest_ns:
                soonest_ns = order[0][0]
        if not entries or entries[0][0] >= soonest_ns:
            return
        while (request := self._expiry.pop_before(soonest_ns)) is not None:
            latest_ns, start_ns, exec_ns = self._best_plan(request, now_ns)
            if start_ns <= latest_ns and latest_ns >= soonest_ns:
                # The estimates moved since it was queued: it has hope again.
                self._expiry.push(latest_ns, request)
                continue
            self.forget(request)
            self._lost(request.model, now_ns)
            if request.stepped_over:
                code, why = Code.SKIPPED, "given up in favour of a better batch"
            else:
                code, why = Code.TIMED_OUT, "no GPU came free in time"
            reason = (
                f"{why}: waited {format_duration(now_ns - request.arrival_ns)}, needs "
                f"{format_duration(exec_ns)}, {format_duration(request.deadline_ns - now_ns)} were left"
            )
            best_ns = start_ns if start_ns < _NEVER_NS else -1
            self._refusals.refuse(request, code, reason, start_ns=best_ns, exec_ns=exec_ns)

    # ------------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._placement.plan(now_ns=now_ns)
        if not self._waiting:
            return
        self._answer_hopeless(now_ns)
        openings = self._openings
        openings.refresh(now_ns)
        if not openings.open:
            self._fresh.clear()  # each GPU is asked when it opens
        elif self._waiting and (self._fresh or openings.unasked):
            sent = self._give_work(now_ns)
            self._fresh.clear()
            if sent and self._waiting:
                self._answer_hopeless(now_ns)

    def _give_work(self, now_ns: int) -> bool:
        """Ask every open GPU that something may go to, soonest first. True if anything was sent."""
        openings, waiting = self._openings, self._waiting
        wide: dict[int, Model] = {}  # fresh ones on many GPUs, each of which may have one for it
        for model_id, model in self._fresh.items():
            if model_id not in waiting:
                continue
            if not openings.ask_holders(model.resident_on):
                wide[model_id] = model
        sent = False
        if wide:
            for start_ns, index, gpu in openings.in_order(now_ns):
                if index in openings.unasked or any(i in gpu.resident for i in wide):
                    sent |= self._ask(gpu, start_ns, now_ns)
                    wide = {i: m for i, m in wide.items() if i in waiting}
                    if not wide:
                        break
        if waiting and openings.unasked:
            for start_ns, _, gpu in openings.unasked_in_order(now_ns):
                sent |= self._ask(gpu, start_ns, now_ns)
                if not waiting:
                    break
        return sent

    def _ask(self, gpu: Gpu, start_ns: int, now_ns: int) -> bool:
        """Send what should run next on `gpu`, from `start_ns`; False if nothing that waits can."""
        self.gpus_asked += 1
        choice, hindered = self._best_batch(gpu, start_ns)
        self._openings.asked(gpu, hindered=hindered)
        if choice is None:
            return False
        self._commit(gpu, choice, start_ns, now_ns)
        return True

    def _in_order(self, gpu: Gpu) -> Iterable[Entry]:
        """Waiting models that `gpu` may hold, by the bound on their keys."""
        waiting, urgency = self._waiting, self._urgency
        if len(waiting) <= _FEW_MODELS:
            return [(0.0, urgency.since[i], m) for i, m in waiting.items()]
        if len(gpu.resident) * 4 < len(waiting):
            return urgency.among(gpu.resident.values(), self._loss)
        return urgency.in_order(self._loss)

    def _best_batch(self, gpu: Gpu, start_ns: int) -> tuple[_Choice | None, bool]:
        """The batch of the smallest key; whether some model is here whose requests all are too old."""
        best: _Choice | None = None
        best_key, best_since, hindered, looked_at = _NO_KEY, 0, False, 0
        loss = self._loss
        credit = CREDIT + CREDIT_SLOPE * loss
        weight = WEIGHT + WEIGHT_SLOPE * loss
        penalty = PENALTY + PENALTY_SLOPE * loss
        returns = gpu.worker.returns
        floor_ns = start_ns + returns.margin_ns
        resident, tables = gpu.resident, gpu.tables
        dearer = _PADDING_GAIN if len(self._waiting) == 1 else 1.0
        # An idle GPU loses nothing by trying what is only likely to be in time, and learns by it.
        likely_floor_ns = 0
        if not gpu.exec.outstanding:
            likely_floor_ns = self._now_ns + gpu.worker.transit.expected_ns + returns.expected_ns
        for bound, since, model in self._in_order(gpu):
            if bound > best_key + ROUNDING_NS:
                break
            looked_at += 1
            if model.model_id not in resident:
                continue
            queue = model.queue
            waiting = len(queue)
            first_ns = head_ns = queue[0].deadline_ns
            table = tables[model.name]
            single_ns = table.single.expected_ns
            left, over, smaller, smaller_ns = waiting, 0, 0, 0
            for batch, estimator in table.classes:
                if left <= smaller:
                    break
                expected_ns = estimator.expected_ns
                if likely_floor_ns and smaller == 0:
                    needs_ns = likely_floor_ns + expected_ns
                else:
                    needs_ns = floor_ns + estimator.margin_ns
                while first_ns < needs_ns:
                    over += 1
                    if over == waiting:
                        break
                    first_ns = queue[over].deadline_ns
                left = waiting - over
                taken = left if left < batch else batch
                # Padding must pay: at least as much served per millisecond as the full smaller class.
                if taken > smaller and (
                    taken == batch or taken * smaller_ns >= expected_ns * smaller * dearer
                ):
                    key = (
                        first_ns
                        + head_ns / 4
                        + weight * expected_ns
                        + (penalty * over - credit * taken) * single_ns
                    )
                    if key < best_key or (key == best_key and since < best_since):
                        best, best_key, best_since = (model, over, taken, batch), key, since
                smaller, smaller_ns = batch, expected_ns
            hindered |= over == waiting
        self.models_looked_at += looked_at
        return best, hindered

    def _commit(self, gpu: Gpu, choice: _Choice, start_ns: int, now_ns: int) -> None:
        model, over, taken, batch = choice
        queue = model.queue
        requests = queue[over : over + taken]
        del queue[over : over + taken]
        for request in queue[:over]:
            request.stepped_over = True
        self._urgency.shrank(model)
        self._loss *= (1.0 - _LOSS_WEIGHT) ** taken
        expected_ns = gpu.tables[model.name].estimators[batch].expected_ns
        # Half the batch would be late if it started after this; the others are worth replanning.
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
        )
