"""`gain` as its law reads: scores fade at each request, and everything is looked at each time.

See naive_infer5.py. Written from the head of placement/gain.py, and shares with it only what sends loads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import _LOAD_LEAD_NS
from slosched.core.scheduler.placement.gain import (
    _AGAIN,
    _CLEARLY,
    _CREDIT,
    _GPUS_TRIED,
    _VICTIMS_LOOKED_AT,
    _WISHES_TRIED,
)
from slosched.core.scheduler.placement.popularity import _LEAST_MEMORY, _SAMPLES
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request
from slosched.units import NS_PER_S


@dataclass(slots=True, eq=False)
class _Wish:
    model: Instance
    more: bool = False
    slo_ns: int = 2**62
    key: float | None = None  # None: to be found when a GPU can take a load
    not_before_ns: int = 0


@dataclass(slots=True, eq=False)
class _Score:
    """One model's score, faded to the time of the last request of any model."""

    asked: float = 0.0
    need: float = 0.0
    short: float = 0.0


class NaivePlacement:
    """Loads and evictions for one cluster, shared by the policies that load by demand."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        assert cluster.config.schedule_ahead_ns is not None
        assert cluster.config.max_batch is not None
        self._ahead_ns = cluster.config.schedule_ahead_ns
        self._max_batch = cluster.config.max_batch
        self._scores: dict[int, _Score] = {}
        self._elapsed_ns = 0.0
        self._last_ns: int | None = None
        self._wishes: dict[int, _Wish] = {}
        self._goes_on_ns: int | None = None
        self._held: list[_Wish] = []  # found too many pages in use,
        self._full: list[tuple[Gpu, ActionState]] = []  # there, when this action ran
        self._first: dict[int, deque[Instance]] = {}  # GPU index -> models to copy into free pages
        self._unsettled: dict[int, dict[int, bool]] = {}  # model id -> GPU index -> still queued

    # -------------------------------------------------------------------------------- facts

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        model = request.instance
        cold_ns = model.weights_ns + model.b1_ns
        fade = 1 / (1 + 1 / max(_LEAST_MEMORY, _SAMPLES * len(self._cluster.models)))
        for score in self._scores.values():
            score.asked *= fade
            score.need *= fade
            score.short *= fade
        if self._last_ns is None:
            self._elapsed_ns = cold_ns
        else:
            self._elapsed_ns = self._elapsed_ns * fade + now_ns - self._last_ns
        self._last_ns = now_ns
        score = self._score(model)
        score.asked += 1
        score.need += min(1.0, cold_ns / request.slo_ns)
        if not model.resident_on:
            self._want(model, more=False, slo_ns=request.slo_ns)
        elif len(model.queue.requests) >= self._max_batch:
            self._want_more(model)

    def short_of(self, model: Instance, *, now_ns: int) -> None:
        if len(model.resident_on) < len(self._cluster.gpus):
            self._score(model).short += 1
        self._want_more(model)

    def _score(self, model: Instance) -> _Score:
        return self._scores.setdefault(model.model_id, _Score())

    def _want_more(self, model: Instance) -> None:
        if len(model.resident_on) < len(self._cluster.gpus):
            self._want(model, more=True)

    def _want(self, model: Instance, *, more: bool, slo_ns: int = 2**62) -> None:
        wish = self._wishes.setdefault(model.model_id, _Wish(model))
        wish.more, wish.slo_ns = more, min(wish.slo_ns, slo_ns)
        wish.key, wish.not_before_ns = None, 0

    def action_done(self, action: ActionState, *, code: int, end_ns: int, duration_ns: int) -> None:
        if code != 0:
            self._want_those_without(action.instance)

    def _want_those_without(self, model: Instance) -> None:
        if model.queue.requests and not model.resident_on:
            self._want(model, more=False)

    def model_loaded(self, model: Instance, gpus: list[Gpu]) -> None:
        for gpu in gpus:
            if model.model_id not in gpu.resident and model.model_id not in gpu.loading:
                self._first.setdefault(gpu.index, deque()).append(model)
                self._unsettled.setdefault(model.model_id, {})[gpu.index] = True

    def gpu_removed(self, gpu: Gpu) -> None:
        for model in self._first.pop(gpu.index, ()):
            self._unsettled.get(model.model_id, {}).pop(gpu.index, None)
        for model in self._cluster.models.values():
            self._want_those_without(model)

    def settled(self, model: Instance) -> bool:
        """True when the first copies of `model` have arrived, or cannot."""
        awaited = self._unsettled.get(model.model_id)
        if not awaited:
            return True
        for index, queued in list(awaited.items()):
            gpu = self._cluster.gpus.get(index)
            if gpu is None or not (queued or model.model_id in gpu.loading):
                del awaited[index]
        if not awaited:
            del self._unsettled[model.model_id]
        return not awaited

    def load_ready_ns(self, gpu: Gpu, model: Instance, now_ns: int) -> int | None:
        """When `model` could start on `gpu` if its load were sent now; None if it is not prepared."""
        if model.model_id not in gpu.worker.instances:
            return None
        worker = gpu.worker
        transit_ns = worker.transit.margin_ns
        if model.model_id in gpu.loading:
            loaded_ns = gpu.load.busy_until_ns
        else:
            begin_ns = max(now_ns + transit_ns, gpu.load.busy_until_ns)
            loaded_ns = begin_ns + gpu.transfer(model).margin_ns
        # The Infer is sent when the load was reported.
        return max(loaded_ns + worker.returns.margin_ns + transit_ns, gpu.exec.busy_until_ns)

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        """Send every load and eviction that should be sent by now."""
        self._plan_wishes(now_ns)
        if self._first:
            self._fill_free_pages(now_ns)

    def next_wakeup_ns(self, now_ns: int) -> int | None:
        if not self._wishes:
            return None
        times = [wish.not_before_ns for wish in self._wishes.values() if wish.not_before_ns]
        for gpu in self._cluster.gpus.values():
            ends_ns = gpu.load.busy_until_ns - _LOAD_LEAD_NS
            if len(gpu.loading) == 1 and ends_ns > now_ns:
                times.append(ends_ns)
        if self._goes_on_ns is not None:
            times.append(self._goes_on_ns)
        return min(times, default=None)

    def _can_load(self, gpu: Gpu, now_ns: int) -> bool:
        """One load runs; the next may be sent when that is about to end."""
        loads = len(gpu.loading)
        return loads == 0 or (loads == 1 and gpu.load.busy_until_ns - _LOAD_LEAD_NS <= now_ns)

    def _any_can_load(self, now_ns: int) -> bool:
        return any(self._can_load(gpu, now_ns) for gpu in self._cluster.gpus.values())

    def _plan_wishes(self, now_ns: int) -> None:
        self._goes_on_ns = None
        if any(action is not next(iter(g.exec.outstanding), None) for g, action in self._full):
            for wish in self._held:
                wish.key, wish.not_before_ns = None, 0
            self._held, self._full = [], []
        for wish in self._wishes.values():
            if wish.not_before_ns <= now_ns:
                wish.not_before_ns = 0
        for _ in range(_WISHES_TRIED):
            if not self._any_can_load(now_ns):
                return
            for wish in self._wishes.values():
                if not wish.not_before_ns and wish.key is None:
                    wish.key = self._key(wish, now_ns)
            due = [(w.key, w.model.model_id, w) for w in self._wishes.values() if w.key is not None]
            if not due:
                return
            wish = min(due, key=lambda entry: entry[:2])[2]
            if self._try(wish, now_ns):
                del self._wishes[wish.model.model_id]
            else:
                wish.key = None
                wish.not_before_ns = now_ns + int(_AGAIN * wish.model.weights_ns) + 1
        if self._any_can_load(now_ns):
            self._goes_on_ns = now_ns + 1

    def _per_ns(self, score: float, now_ns: int) -> float:
        if score == 0:
            return 0.0
        assert self._last_ns is not None
        return score / (self._elapsed_ns + now_ns - self._last_ns)

    def _worth(self, model: Instance, others: int, now_ns: int) -> float:
        """What would be lost, as a score, without one copy if `others` GPUs hold it."""
        score = self._score(model)
        if not model.clients:
            return 0.0
        if others == 0:
            return score.need
        busy = self._per_ns(score.asked, now_ns) * model.b1_ns
        return max(score.need * min(1.0, busy / others), score.short / others)

    def _key(self, wish: _Wish, now_ns: int) -> float:
        model = wish.model
        cold_ns = model.weights_ns + model.b1_ns
        first_ns, waiting = now_ns + 2 * model.weights_ns, 0
        makes = [r.deadline_ns for r in model.queue.requests if r.deadline_ns >= now_ns + cold_ns]
        if makes and not wish.more:
            first_ns, waiting = makes[0] - cold_ns, len(makes)
        worth = self._worth(model, len(model.resident_on), now_ns)
        to_come = self._per_ns(worth, now_ns) * model.weights_ns
        return first_ns - _CREDIT * model.weights_ns * (waiting + to_come)

    def _try(self, wish: _Wish, now_ns: int) -> bool:
        """Load the wish's model where that gains the most. False if it should be tried again."""
        model = wish.model
        loading = any(model.model_id in gpu.loading for gpu in self._cluster.gpus.values())
        if (model.resident_on and not wish.more) or (loading and not model.resident_on):
            return True
        ready = []
        for gpu in self._cluster.gpus.values():
            ready_ns = self.load_ready_ns(gpu, model, now_ns)
            if (
                self._can_load(gpu, now_ns)
                and model.model_id not in (*gpu.resident, *gpu.loading)
                and gpu.pages >= model.pages
                and gpu.may_load(model, now_ns)
                and ready_ns is not None
            ):
                ready.append((ready_ns, gpu.index, gpu))
        options = []
        for ready_ns, index, gpu in sorted(ready, key=lambda entry: entry[:2])[:_GPUS_TRIED]:
            option = self._option(wish, gpu, ready_ns, now_ns)
            if option is not None:
                options.append((*option, ready_ns, index))
        if not options:
            cold_ns = model.weights_ns + model.b1_ns
            hopes = any(r.deadline_ns >= now_ns + cold_ns for r in model.queue.requests)
            return wish.more or not hopes
        index = min(options)[-1]
        gpu = self._cluster.gpus[index]
        for victim in self._victims(gpu, model, now_ns) or []:
            self._cluster.send_evict(gpu, victim, now_ns=now_ns)
            self._want_those_without(victim)
        self._load(gpu, model, now_ns)
        return True

    def _option(
        self, wish: _Wish, gpu: Gpu, ready_ns: int, now_ns: int
    ) -> tuple[bool, bool, float] | None:
        """(serves no waiting request, evicts, what is lost less what is served) if the load is worth it."""
        model, worker = wish.model, gpu.worker
        if wish.more and gpu.exec.outstanding:
            return None
        exec_ns = gpu.exec_table(model.queue).single.expected_ns + worker.returns.expected_ns
        served = sum(r.deadline_ns >= ready_ns + exec_ns for r in model.queue.requests)
        served = 0 if wish.more else served
        ways_ns = 2 * worker.transit.margin_ns + worker.returns.margin_ns
        load_ns = gpu.transfer(model).margin_ns
        if not served and not wish.more and wish.slo_ns >= ways_ns + load_ns + exec_ns:
            return None
        if gpu.free_pages >= model.pages:
            return served == 0, False, 0.0
        victims = self._victims(gpu, model, now_ns)
        if victims is None:
            if gpu.exec.outstanding:
                self._full = [entry for entry in self._full if entry[0] is not gpu]
                self._full.append((gpu, gpu.exec.outstanding[0]))
                self._held.append(wish)
            return None
        need, lost, waiting = 0.0, 0.0, 0
        for victim in victims:
            worth = self._worth(victim, len(victim.resident_on) - 1, now_ns)
            waits = len(victim.queue.requests) if len(victim.resident_on) == 1 else 0
            away_ns = model.weights_ns + model.b1_ns + victim.weights_ns
            need, waiting = need + worth, waiting + waits
            lost += waits + self._per_ns(worth, now_ns) * away_ns
        worth = self._worth(model, len(model.resident_on), now_ns)
        if served > lost or (not waiting and worth > _CLEARLY * need):
            return served == 0, True, lost - served
        return None

    def _victims(self, gpu: Gpu, model: Instance, now_ns: int) -> list[Instance] | None:
        """Models without waiting requests and actions if possible, the least needed for each page first."""
        ranked = []
        for place, victim in enumerate(list(gpu.resident.values())[:_VICTIMS_LOOKED_AT]):
            others = len(victim.resident_on) - 1
            worth = self._worth(victim, others, now_ns) / victim.pages
            if not self._cluster.in_use(gpu, victim):
                waits = others == 0 and bool(victim.queue.requests)
                ranked.append((waits, bool(victim.clients), worth, place, victim))
        free_pages, victims = gpu.free_pages, []
        for *_, victim in sorted(ranked, key=lambda entry: entry[:4]):
            if free_pages < model.pages:
                victims.append(victim)
                free_pages += victim.pages
        return victims if free_pages >= model.pages else None

    def _fill_free_pages(self, now_ns: int) -> None:
        for index, models in sorted(self._first.items()):
            gpu = self._cluster.gpus[index]
            if not self._can_load(gpu, now_ns):
                continue
            while models:
                model = models[0]
                fits = gpu.free_pages >= model.pages and model.model_id in gpu.worker.instances
                here = model.model_id in gpu.resident or model.model_id in gpu.loading
                if fits and not here:
                    if not self._can_load(gpu, now_ns):
                        break
                    self._load(gpu, model, now_ns)
                models.popleft()
                self._unsettled.get(model.model_id, {})[index] = False
            if not models:
                del self._first[index]

    def _load(self, gpu: Gpu, model: Instance, now_ns: int) -> None:
        start_ns = max(now_ns + gpu.worker.transit.margin_ns, gpu.load.busy_until_ns)
        # No request waits for a particular start of a load; the window only sheds loads that are long stale.
        latest_ns = start_ns + self._ahead_ns + NS_PER_S
        self._cluster.send_load(gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=latest_ns)
