"""INFER5 as its law reads, with every decision made by looking at everything there is.

The product's form keeps orders and heaps so that a decision costs little; this one rescans all GPUs, all
waiting models and all wishes each time. tests/test_infer5_differential.py holds the two to the same effects.
"""

from __future__ import annotations

import math
from bisect import insort

from naive_forecast import NaiveForecast
from naive_placement import NaivePlacement
from slosched.codes import Code
from slosched.core.scheduler.actions.infer import OVERDUE_SHARE
from slosched.core.scheduler.anti_starvation import OTHERS_PER_TURN, PATIENCE_NS
from slosched.core.scheduler.batch_choice import _PADDING_GAIN, _SPARE_COST
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.dispatch_windows import _LEAD_SLACK_NS
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.losses import _LOSS_WEIGHT
from slosched.core.scheduler.plans import _LOOKED_AT, why_refused
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.infer5 import _FLOODED, Infer5
from slosched.core.scheduler.shares import Shares
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request
from slosched.core.scheduler.urgency import (
    CREDIT,
    CREDIT_SLOPE,
    PENALTY,
    PENALTY_SLOPE,
    WEIGHT,
    WEIGHT_SLOPE,
)
from slosched.core.scheduler.weights import _IN_FULL_AT
from slosched.core.scheduler.weights import _LOOKED_AT as _WORTH_LOOKED_AT
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

_NEVER_NS = 2**62

_Choice = tuple[Instance, int, int, int]


class NaiveDispatchWindows:
    """Which GPUs can be given an Infer now, and when the next one will be."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        assert cluster.config.schedule_ahead_ns is not None
        self._ahead_ns = cluster.config.schedule_ahead_ns

    def opens_ns(self, gpu: Gpu, now_ns: int) -> int | None:
        """When `gpu` opens (a past time: it is open). None: only a report can open it."""
        outstanding = gpu.exec.outstanding
        if not outstanding:
            return now_ns
        if len(outstanding) >= gpu.exec.most:
            return None
        worker = gpu.worker
        end_ns = gpu.exec.busy_until_ns
        # Its report is later than nine in ten are: something is wrong there, send nothing more.
        if (
            now_ns
            > end_ns
            + worker.returns.margin_ns
            + outstanding[0].expected_duration_ns // OVERDUE_SHARE
        ):
            return None
        return end_ns - min(worker.transit.margin_ns + _LEAD_SLACK_NS, self._ahead_ns)

    def open_gpus(self, now_ns: int) -> list[tuple[int, int, Gpu]]:
        """Open GPUs as (predicted start, index, gpu), soonest first."""
        found = []
        for gpu in self._cluster.gpus.values():
            opens_ns = self.opens_ns(gpu, now_ns)
            if opens_ns is not None and opens_ns <= now_ns:
                found.append((self._cluster.earliest_start_ns(gpu, now_ns), gpu.index, gpu))
        found.sort()
        return found

    def next_opening_ns(self, now_ns: int) -> int | None:
        """When the next GPU that is closed now opens by itself."""
        soonest: int | None = None
        for gpu in self._cluster.gpus.values():
            opens_ns = self.opens_ns(gpu, now_ns)
            if (
                opens_ns is not None
                and opens_ns > now_ns
                and (soonest is None or opens_ns < soonest)
            ):
                soonest = opens_ns
        return soonest


class NaiveInfer5:
    """The default policy. See the head of this file."""

    about = Infer5.about
    replans = True

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._windows = NaiveDispatchWindows(cluster)
        self._placement = NaivePlacement(cluster)
        self._waiting: dict[int, Instance] = {}  # models with queued requests
        self._expiry = ExpiryHeap()  # by the latest start that is likely in time
        self._loss = 0.0
        self._forecast = NaiveForecast(cluster.config.early_refusal)
        self._now_ns = 0
        self._unit = 1.0
        self._value: dict[int, float] = {}  # by request key
        self._stepped_over: dict[int, bool] = {}
        self._shares = Shares() if cluster.config.client_weights == "shares" else None
        self._anti_starvation: dict[
            int, int
        ] = {}  # model id -> when it first lost one since its last batch
        self._others_ns = _NEVER_NS  # exec time of other batches since the last turn ...
        self._others_needed_ns = 0  # ... and how much the next one needs
        #: When a request that seems hopeless may be tried again, by program and by GPU.
        self._trial_due_ns: dict[str, int] = {}
        self._gpu_due_ns: dict[int, int] = {}
        self._trials: dict[int, int] = {}  # by GPU, the key of the last one

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.instance
        self._placement.asked_for(request, now_ns=now_ns)
        latest_ns, start_ns, exec_ns = self._best_plan(request, now_ns)
        if start_ns > latest_ns:
            if not self._tried(request, now_ns):
                self._refuse_at_once(request, start_ns, exec_ns, now_ns)
            return
        weight = request.weight
        if self._shares is not None:
            weight = self._shares.value(request, self._loss)
        value = self._value[request.key] = weight / self._unit
        if model.resident_on and not request.attempts and value <= 1.0:
            late_ns = self._forecast.start_ns(request, latest_ns, now_ns)
            if late_ns is not None:
                self._refuse_early(request, late_ns, exec_ns, now_ns)
                return
        insort(model.queue.requests, request)
        self._waiting[model.model_id] = model
        self._expiry.push(latest_ns, request)

    def _tried(self, request: Request, now_ns: int) -> bool:
        """An idle GPU is given a hopeless request where nothing of its program was measured for long."""
        model, program = request.instance, request.queue.program
        if request.attempts or any(self._value[r.key] != 1.0 for r in model.queue.requests):
            return False
        for gpu in model.resident_on.values():
            transit, returns = gpu.worker.transit, gpu.worker.returns
            table = gpu.exec_table(request.queue)
            least_ns = table.profiled_ns[table.batches[0]] // 2
            back_ns = now_ns + transit.expected_ns + returns.expected_ns + least_ns
            due = now_ns >= self._gpu_due_ns.get(gpu.index, 0)
            if gpu.exec.outstanding or gpu.held or not due or back_ns >= request.deadline_ns:
                continue
            pause_ns = max(5 * NS_PER_S, 10 * table.single.expected_ns)
            if now_ns < self._trial_due_ns.setdefault(program, now_ns + pause_ns):
                return False
            self._trial_due_ns[program] = self._gpu_due_ns[gpu.index] = now_ns + pause_ns
            self._value[request.key] = 1.0
            self._trials[gpu.index] = request.key
            insort(model.queue.requests, request)
            self._waiting[model.model_id] = model
            choice = model, model.queue.requests.index(request), 1, 1
            self._commit(gpu, choice, now_ns + transit.margin_ns + 20 * NS_PER_MS, now_ns)
            return True
        return False

    def forget(self, request: Request) -> None:
        model = request.instance
        model.queue.requests.remove(request)
        if not model.queue.requests:
            del self._waiting[model.model_id]

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        if not action.requests:
            self._placement.action_done(action, code=code, end_ns=end_ns, duration_ns=duration_ns)
        elif duration_ns and action.queue.program in self._trial_due_ns:
            answered_ns = end_ns + action.gpu.worker.returns.expected_ns
            quick = 2 * duration_ns < action.expected_duration_ns
            first = action.requests[0]
            tried = self._trials.get(action.gpu.index) == first.key
            if quick or (tried and answered_ns <= first.deadline_ns):
                self._trial_due_ns[action.queue.program] = self._gpu_due_ns[action.gpu.index] = 0
            elif tried or self._trial_due_ns[action.queue.program]:
                self._trial_due_ns[action.queue.program] = end_ns + max(
                    5 * NS_PER_S, 10 * duration_ns
                )

    def gpu_added(self, gpu: Gpu) -> None:
        """Nothing is kept per GPU."""

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        self._placement.model_loaded(model, gpus)

    def settled(self, model: Instance) -> bool:
        return self._placement.settled(model)

    def next_wakeup_ns(self) -> int | None:
        if not self._waiting:
            return None
        times = (
            self._windows.next_opening_ns(self._now_ns),
            self._next_expiry_ns(),
            self._placement.next_wakeup_ns(self._now_ns),
        )
        return min((ns for ns in times if ns is not None), default=None)

    # ------------------------------------------------------------------------------ feasibility

    def _best_plan(self, request: Request, now_ns: int) -> tuple[int, int, int]:
        """(latest start that is likely in time, earliest start there is, exec) on the best GPU.

        GPUs that hold the model in the order in which they are free: the first that will do, else the
        least late of the first few. If none holds it: those that could load it, in order of their
        numbers, and if none will do the least late.
        """
        model = request.instance
        if model.resident_on:
            return self._resident_plan(request, now_ns)
        best = (request.deadline_ns, _NEVER_NS, model.b1_ns)
        for gpu in self._cluster.gpus.values():
            start_ns = self._placement.load_ready_ns(gpu, model, now_ns)
            if start_ns is None:
                continue
            single_ns = gpu.exec_table(model.queue).single.expected_ns
            latest_ns = request.deadline_ns - single_ns - gpu.worker.returns.expected_ns
            if start_ns <= latest_ns:
                return latest_ns, start_ns, single_ns
            if start_ns - latest_ns < best[1] - best[0]:
                best = (latest_ns, start_ns, single_ns)
        return best

    def _resident_plan(self, request: Request, now_ns: int) -> tuple[int, int, int]:
        plans = []
        holders = request.instance.resident_on.values()
        for gpu in sorted(holders, key=lambda g: (g.exec.busy_until_ns, g.index)):
            start_ns = self._cluster.likely_start_ns(gpu, now_ns)
            single_ns = gpu.exec_table(request.queue).single.expected_ns
            latest_ns = request.deadline_ns - single_ns - gpu.worker.returns.expected_ns
            plans.append((latest_ns, start_ns, single_ns))
        for plan in plans:
            if plan[1] <= plan[0]:
                return plan
        return min(plans[:_LOOKED_AT], key=lambda plan: plan[1] - plan[0])

    def _refuse_at_once(self, request: Request, start_ns: int, exec_ns: int, now_ns: int) -> None:
        if not self._cluster.gpus:
            reason, start_ns = "no GPU is connected to the controller", -1
        elif start_ns >= _NEVER_NS:
            reason, start_ns = "no connected GPU has this model ready", -1
        else:
            reason = why_refused(request, start_ns, exec_ns, now_ns)
        self._lost(request, now_ns)
        code = Code.COULD_NOT_START_IN_TIME
        if request.attempts:  # it came back from an action that failed
            code, reason = Code.TIMED_OUT, f"no second try fits: {reason}"
        self._refusals.refuse(request, code, reason, start_ns=start_ns, exec_ns=exec_ns)

    def _refuse_early(self, request: Request, start_ns: int, exec_ns: int, now_ns: int) -> None:
        before = sum(other < request for other in request.instance.queue.requests)
        first = f", behind {before} requests of its model" if before else ""
        reason = (
            f"refused on arrival: as the batches of its model came lately, it must expect to wait for "
            f"{format_duration(start_ns - now_ns)}{first}, and takes {format_duration(exec_ns)}; "
            f"the deadline is in {format_duration(request.slo_ns)}"
        )
        self._lost(request, now_ns)
        self._forecast.note("early", request.instance, now_ns, [])
        self._anti_starvation.setdefault(request.instance.model_id, now_ns)
        code = Code.COULD_NOT_START_IN_TIME
        self._refusals.refuse(request, code, reason, start_ns=start_ns, exec_ns=exec_ns)

    def _lost(self, request: Request, now_ns: int) -> None:
        self._loss += _LOSS_WEIGHT * (1.0 - self._loss)
        self._unit += _LOSS_WEIGHT * (request.weight - self._unit)
        if request.instance.resident_on:
            self._placement.short_of(request.instance, now_ns=now_ns)

    def _soonest_start_ns(self, now_ns: int) -> int:
        """No GPU starts anything decided from now on before this."""
        gpus = self._cluster.gpus.values()
        if not gpus:
            return _NEVER_NS
        transit_ns = min(gpu.worker.transit.expected_ns for gpu in gpus)
        return max(now_ns + transit_ns, min(gpu.exec.busy_until_ns for gpu in gpus))

    def _next_expiry_ns(self) -> int | None:
        expiry_ns = self._expiry.next_ns()
        if expiry_ns is None or not self._cluster.gpus:
            return None
        transit_ns = min(g.worker.transit.expected_ns for g in self._cluster.gpus.values())
        return max(expiry_ns - transit_ns + 1, self._now_ns + 1)

    def _answer_hopeless(self, now_ns: int) -> None:
        """Rule 1, over all models: requests that cannot start in time anywhere are answered now."""
        soonest_ns = self._soonest_start_ns(now_ns)
        while (request := self._expiry.pop_before(soonest_ns)) is not None:
            latest_ns, start_ns, exec_ns = self._best_plan(request, now_ns)
            if start_ns <= latest_ns and latest_ns >= soonest_ns:
                # The estimates moved since it was queued: it has hope again.
                self._expiry.push(latest_ns, request)
                continue
            self.forget(request)
            self._lost(request, now_ns)
            self._anti_starvation.setdefault(request.instance.model_id, now_ns)
            self._forecast.note("late", request.instance, now_ns, [])
            if request.key in self._stepped_over:
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
        sent = False
        for start_ns, _, gpu in self._windows.open_gpus(now_ns):
            if not self._waiting:
                break
            choice = turn = self._turn(gpu, start_ns)
            everybody = list(self._waiting.values())
            if choice is None:
                choice = self._best_batch(gpu, start_ns, everybody)
                ways_ns = gpu.worker.transit.expected_ns + gpu.worker.returns.expected_ns
                if choice is not None and self._loss > _FLOODED:
                    spared = self._best_batch(gpu, start_ns + ways_ns, everybody)
                    if spared is not None and self._each_ns(
                        gpu, spared
                    ) <= _SPARE_COST * self._each_ns(gpu, choice):
                        choice = spared
            if choice is not None:
                exec_ns = self._commit(gpu, choice, start_ns, now_ns)
                self._anti_starvation.pop(choice[0].model_id, None)
                self._others_ns += exec_ns
                if turn is not None:
                    self._others_ns, self._others_needed_ns = 0, OTHERS_PER_TURN * exec_ns
                sent = True
        if sent and self._waiting:
            self._answer_hopeless(now_ns)

    def _each_ns(self, gpu: Gpu, choice: _Choice) -> float:
        """Exec time for each request that the batch serves."""
        model, _, taken, batch = choice
        return gpu.exec_table(model.queue).estimators[batch].expected_ns / taken

    def _turn(self, gpu: Gpu, start_ns: int) -> _Choice | None:
        """The batch of the model that has been held back longest and can run here, if it is time."""
        if self._others_ns < self._others_needed_ns:
            return None
        for model_id, since_ns in sorted(self._anti_starvation.items(), key=lambda item: item[1]):
            if self._now_ns - since_ns >= PATIENCE_NS and model_id in self._waiting:
                choice = self._best_batch(gpu, start_ns, [self._waiting[model_id]])
                if choice is not None:
                    return choice
        return None

    def _credit(self) -> float:
        return CREDIT + CREDIT_SLOPE * self._loss

    def _heed(self) -> float:
        """Weights count in full from a tenth of losses on."""
        return min(1.0, self._loss / _IN_FULL_AT)

    def _aboard(self, gpu: Gpu, model: Instance, over: int, taken: int) -> list[Request]:
        """The requests behind the first `over` whose virtual deadline, less what they are worth, is soonest."""
        queue = model.queue.requests
        if all(self._value[request.key] == 1.0 for request in queue):
            return queue[over : over + taken]
        credit_ns = self._credit() * gpu.exec_table(model.queue).single.expected_ns * self._heed()
        some = queue[over : over + taken + _WORTH_LOOKED_AT]
        some.sort(key=lambda r: r.deadline_ns - credit_ns * self._value[r.key])
        return sorted(some[:taken])

    def _best_batch(self, gpu: Gpu, start_ns: int, models: list[Instance]) -> _Choice | None:
        """(model, requests stepped over, requests taken, class) of the smallest key."""
        best: _Choice | None = None
        best_key = 0.0
        loss = self._loss
        credit, weight = self._credit(), WEIGHT + WEIGHT_SLOPE * loss
        penalty = PENALTY + PENALTY_SLOPE * loss
        returns = gpu.worker.returns
        floor_ns = start_ns + returns.margin_ns
        resident = gpu.resident
        dearer = _PADDING_GAIN if len(self._waiting) == 1 else 1.0
        # An idle GPU loses nothing by trying what is only likely to be in time, and learns by it.
        likely_floor_ns = 0
        if not gpu.exec.outstanding:
            likely_floor_ns = self._now_ns + gpu.worker.transit.expected_ns + returns.expected_ns
        for model in models:
            if model.model_id not in resident:
                continue
            queue = model.queue.requests
            waiting = len(queue)
            head_ns = queue[0].deadline_ns
            table = gpu.exec_table(model.queue)
            single_ns = table.single.expected_ns
            over, smaller, smaller_ns = 0, 0, 0
            for batch, estimator in table.classes:
                if waiting - over <= smaller:
                    break
                spare_ns = estimator.margin_ns - estimator.expected_ns
                if gpu.exec.outstanding:  # two independent errors: what runs may end late, too
                    spare_ns = math.isqrt(spare_ns**2 + gpu.exec.outstanding[-1].spread_ns ** 2)
                needs_ns = floor_ns + estimator.expected_ns + spare_ns
                if likely_floor_ns and smaller == 0:
                    needs_ns = likely_floor_ns + estimator.expected_ns
                while over < waiting and queue[over].deadline_ns < needs_ns:
                    over += 1
                taken = min(batch, waiting - over)
                # Padding must pay: at least as much served per millisecond as the full smaller class.
                pays = (
                    taken == batch or taken * smaller_ns >= estimator.expected_ns * smaller * dearer
                )
                if taken > smaller and pays:
                    aboard = self._aboard(gpu, model, over, taken)
                    value = taken + self._heed() * (sum(self._value[r.key] for r in aboard) - taken)
                    key = (
                        aboard[0].deadline_ns
                        + head_ns / 4
                        + weight * estimator.expected_ns
                        + (penalty * over - credit * value) * single_ns
                    )
                    if best is None or key < best_key:
                        best, best_key = (model, over, taken, batch), key
                smaller, smaller_ns = batch, estimator.expected_ns
        return best

    def _commit(self, gpu: Gpu, choice: _Choice, start_ns: int, now_ns: int) -> int:
        model, over, taken, batch = choice
        queue = model.queue.requests
        requests = self._aboard(gpu, model, over, taken)
        last = queue.index(requests[-1])
        for place, request in enumerate(queue):
            if place < last and request not in requests:
                self._stepped_over[request.key] = True
        queue[:] = [request for request in queue if request not in requests]
        if not queue:
            del self._waiting[model.model_id]
        self._loss *= (1.0 - _LOSS_WEIGHT) ** taken
        expected_ns = gpu.exec_table(model.queue).estimators[batch].expected_ns
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
        self._forecast.note("batch", model, now_ns, requests, gpu)
        if self._shares is not None:
            self._shares.given(requests, expected_ns, now_ns=now_ns)
        return expected_ns
