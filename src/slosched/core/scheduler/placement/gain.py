"""`gain`: the load that lets the most requests be in time for each millisecond of PCIe (our rule).

Weights on a GPU are worth having for two reasons. A request that waits for them now, and would be in time if
the load were sent now, counts one. Future requests count by their model's `need` (popularity.py): each by the
share of its SLO that loading first would take, because a request with time for a load can be served either way.

1. A model is *wished for* when it is asked for and resident nowhere; and once more (`more`) when its requests
   are lost although GPUs hold it, or more of them wait than one batch takes. Wishes are tried in the order of

       key = first deadline that a load can make - load - exec - credit * load * (waiting + to come)

   which is earliest deadline first with credit for the requests that the same load serves. A wish for which no
   deadline is left comes behind those that can still be met.
2. A wish is tried on the GPUs that can take a load now. It goes where waiting requests can be in time, into
   free pages if there are any, else where the most is gained: these requests, less what the victims lose.
   Victims have no Infer outstanding; those without waiting requests go first, among these the ones that no
   client uses, then the least needed for each page. A victim loses the requests that wait for it, and those
   that will come before it could be back: in the time of this load, one exec and its own load.
3. A model whose requests no load could serve in time, even on an idle GPU, is worth only its future, and so is
   one more copy: it is loaded over models that are needed clearly less and have no waiting requests; one more
   copy only on an idle GPU. Every other wish that helps no waiting request is forgotten until the model is
   asked for again.
4. A wish that is worth a load and found no room is tried again after a part of a load's time, and as soon as
   an Infer ends on a GPU that was full.

So two models in use never evict each other for nothing: each load over another model serves a waiting request,
or raises the worth of the GPU by a margin. A request with time for a load does not wait in vain beside an idle
GPU: there, every model is a victim. A copy that other GPUs hold too is worth as much of the model's need as
keeps the others busy, or the requests lost lately for want of one (`Score.shortage`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import Placement
from slosched.core.scheduler.placement.popularity import Popularity, cold_ns
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request

#: A model loaded for its future alone must be needed more than its victims by this factor.
_CLEARLY = 1.25
#: The credit of each request served by the same load, in load times.
_CREDIT = 1.0
#: A wish that found no room waits this share of its load's time.
_AGAIN = 0.25
#: Limits of one step: wishes tried, GPUs tried for each, and victims examined on each.
_WISHES_TRIED = 8
_GPUS_TRIED = 8
_VICTIMS_LOOKED_AT = 64
_NEVER_NS = 2**62


@dataclass(slots=True, eq=False)
class _Wish:
    """A model that should be loaded; `more`: although GPUs hold it already."""

    model: Instance
    more: bool
    slo_ns: int = _NEVER_NS  # the shortest that it was asked for with
    entry: int = 0  # its entry in a heap that holds; older ones are skipped


@dataclass(slots=True, eq=False)
class _Victims:
    """Models that would be evicted, the number of requests that wait for them, and their need (a score)."""

    models: list[Instance]
    waiting: int
    need: float
    lost: float  # requests that wait and will come before they are back


class GainPlacement(Placement):
    """See the head of this file."""

    def __init__(self, cluster: Cluster, *, heeds_deadlines: bool = True) -> None:
        super().__init__(cluster, heeds_deadlines=heeds_deadlines)
        self._popularity = Popularity(cluster)
        assert cluster.config.max_batch is not None
        self._max_batch = cluster.config.max_batch
        self._wishes: dict[int, _Wish] = {}  # by model id
        self._fresh: dict[int, _Wish] = {}  # those of them without a key
        self._due: list[tuple[float, int, int, _Wish]] = []  # a heap of (key, model id, entry)
        self._later: list[
            tuple[int, int, int, _Wish]
        ] = []  # a heap of (not before, model id, entry)
        self._entries = 0
        #: Wishes that found too many pages in use, and where: GPU -> the action that ran there.
        self._held: dict[int, _Wish] = {}
        self._full: dict[int, tuple[Gpu, ActionState]] = {}
        #: The cost of decisions: wishes tried, and models examined as victims.
        self.wishes_tried = 0
        self.victims_looked_at = 0
        self._order: dict[int, list[Instance]] = {}  # GPU index -> victims, until anything is sent
        self._goes_on_ns: int | None = None  # there is more to try, in the next step

    # -------------------------------------------------------------------------------- facts

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        self._popularity.asked(request, now_ns=now_ns)
        model = request.instance
        if not model.resident_on:
            self._want(model, more=False, slo_ns=request.slo_ns)
        elif len(request.queue.requests) >= self._max_batch and len(model.resident_on) < len(
            self._cluster.gpus
        ):
            self._want(model, more=True)

    def short_of(self, model: Instance, *, now_ns: int) -> None:
        if len(model.resident_on) < len(self._cluster.gpus):
            self._popularity.short(model)
            self._want(model, more=True)

    def _want(self, model: Instance, *, more: bool, slo_ns: int = _NEVER_NS) -> None:
        model_id = model.model_id
        wish = self._wishes.get(model_id)
        if wish is None:
            wish = self._wishes[model_id] = _Wish(model, more)
        wish.more = more
        wish.slo_ns = min(wish.slo_ns, slo_ns)
        wish.entry = 0
        self._fresh[model_id] = wish

    def _load_done(self, action: ActionState, *, ok: bool, end_ns: int, duration_ns: int) -> None:
        model = action.instance
        if not ok and model.waits and not model.resident_on:
            self._want(model, more=False)

    def _gpu_removed(self, gpu: Gpu) -> None:
        for model in self._cluster.models.values():
            if model.waits and not model.resident_on:
                self._want(model, more=False)

    # ----------------------------------------------------------------------------- decisions

    def next_wakeup_ns(self) -> int | None:
        if not self._wishes:
            return None
        later = self._later
        while later and later[0][3].entry != later[0][2]:
            heappop(later)
        times = (
            self._goes_on_ns,
            self._loaders.next_ns(self._now_ns),
            later[0][0] if later else None,
        )
        return min((ns for ns in times if ns is not None), default=None)

    def _plan_loads(self, now_ns: int) -> None:
        later = self._later
        while later and later[0][0] <= now_ns:
            _, model_id, entry, again = heappop(later)
            if again.entry == entry:
                self._fresh[model_id] = again
        if self._full:
            self._look_for_room()
        self._goes_on_ns = None
        if not self._wishes or not self._loaders.able(now_ns):
            return
        self._order.clear()
        for _ in range(_WISHES_TRIED):
            wish = self._next_wish(now_ns)
            if wish is None:
                return
            if self._try(wish, now_ns):
                del self._wishes[wish.model.model_id]
                wish.entry = 0
                if not self._loaders.able(now_ns):
                    return
            else:
                again_ns = now_ns + int(_AGAIN * wish.model.weights_ns) + 1
                heappush(later, (again_ns, wish.model.model_id, self._entry(wish), wish))
        self._goes_on_ns = now_ns + 1

    def _look_for_room(self) -> None:
        """Try wishes again that found too many pages in use, if an Infer ended there."""
        for gpu, action in self._full.values():
            outstanding = gpu.exec.outstanding
            if not outstanding or outstanding[0] is not action:
                break
        else:
            return
        for model_id, wish in self._held.items():
            if self._wishes.get(model_id) is wish:
                wish.entry = 0
                self._fresh[model_id] = wish
        self._held.clear()
        self._full.clear()

    def _next_wish(self, now_ns: int) -> _Wish | None:
        """Take out the wish with the smallest key."""
        due = self._due
        for model_id, wish in self._fresh.items():
            heappush(due, (self._key(wish, now_ns), model_id, self._entry(wish), wish))
        self._fresh.clear()
        while due:
            _, _, entry, wish = heappop(due)
            if wish.entry == entry:
                return wish
        return None

    def _entry(self, wish: _Wish) -> int:
        self._entries += 1
        wish.entry = self._entries
        return self._entries

    def _key(self, wish: _Wish, now_ns: int) -> float:
        model = wish.model
        waiting, queue = 0, model.waiting()
        first_ns = now_ns + 2 * model.weights_ns
        if queue and not wish.more:
            if not self._heeds_deadlines:
                waiting, first_ns = len(queue), queue[0].arrival_ns
            else:
                needs_ns = cold_ns(model)
                left = bisect_left(queue, now_ns + needs_ns, key=_deadline_ns)
                if left < len(queue):
                    waiting = len(queue) - left
                    first_ns = queue[left].deadline_ns - needs_ns
        worth = self._worth(model, len(model.resident_on), now_ns)
        to_come = self._popularity.per_ns(worth, now_ns) * model.weights_ns
        return first_ns - _CREDIT * model.weights_ns * (waiting + to_come)

    def _try(self, wish: _Wish, now_ns: int) -> bool:
        """Load `wish.model` where that gains the most. False if it should be tried again."""
        model = wish.model
        self.wishes_tried += 1
        if (model.resident_on and not wish.more) or (model.loading_on and not model.resident_on):
            return True  # it is resident, or being loaded
        best: tuple[bool, bool, float, int, int] | None = None
        choice: tuple[Gpu, list[Instance]] | None = None
        for ready_ns, index, gpu in self._able_for(model, now_ns)[:_GPUS_TRIED]:
            if wish.more and gpu.exec.outstanding:
                continue  # it would only bring the next GPU that is busy
            served = 0 if wish.more else self._served(model, gpu, ready_ns)
            if not served and not wish.more and wish.slo_ns >= self._takes_ns(gpu, model):
                continue  # what can be loaded in time need not be there before it is asked for
            victims = None
            if gpu.free_pages < model.pages:
                victims = self._victims(gpu, model, now_ns)
                if victims is None:
                    if gpu.exec.outstanding:
                        self._full[index] = (gpu, gpu.exec.outstanding[0])
                        self._held[model.model_id] = wish
                    continue
                if not self._pays(model, served, victims, now_ns):
                    continue
            rank = (
                served == 0,
                victims is not None,
                victims.lost - served if victims is not None else 0.0,
                ready_ns,
                index,
            )
            if best is None or rank < best:
                best, choice = rank, (gpu, victims.models if victims is not None else [])
        if choice is None:
            return wish.more or not self._hopes(model, now_ns)
        self._swap(*choice, model, now_ns)
        self._order.clear()
        for victim in choice[1]:
            if victim.waits and not victim.resident_on:
                self._want(victim, more=False)
        return True

    def _served(self, model: Instance, gpu: Gpu, ready_ns: int) -> int:
        """Requests that wait for `model` and could be in time on `gpu`, starting at `ready_ns`."""
        queue = model.waiting()
        if not queue or not self._heeds_deadlines:
            return len(queue)
        needs_ns = gpu.exec_table(model.queue).single.expected_ns + gpu.worker.returns.expected_ns
        return len(queue) - bisect_left(queue, ready_ns + needs_ns, key=_deadline_ns)

    def _hopes(self, model: Instance, now_ns: int) -> bool:
        """Whether some waiting request could be in time on an idle GPU."""
        queue = model.waiting()
        if not queue or not self._heeds_deadlines:
            return bool(queue)
        return queue[-1].deadline_ns >= now_ns + cold_ns(model)

    def _takes_ns(self, gpu: Gpu, model: Instance) -> int:
        """Time until an answer of `model` would be here if `gpu` were idle and loaded it now."""
        worker = gpu.worker
        latencies_ns = (
            2 * worker.transit.margin_ns + worker.returns.margin_ns + worker.returns.expected_ns
        )
        return (
            latencies_ns
            + gpu.transfer(model).margin_ns
            + gpu.exec_table(model.queue).single.expected_ns
        )

    def _pays(self, model: Instance, served: int, victims: _Victims, now_ns: int) -> bool:
        if served > victims.lost:
            return True
        worth = self._worth(model, len(model.resident_on), now_ns)
        return not victims.waiting and worth > _CLEARLY * victims.need

    def _worth(self, model: Instance, others: int, now_ns: int) -> float:
        """The score of what would be lost without one copy of `model` if `others` GPUs hold it."""
        if not model.clients:
            return 0.0
        score = self._popularity.score(model)
        if others == 0:
            return score.need
        busy = self._popularity.per_ns(score.asked, now_ns) * model.b1_ns
        return max(score.need * min(1.0, busy / others), score.shortage / others)

    def _victims(self, gpu: Gpu, model: Instance, now_ns: int) -> _Victims | None:
        """The models that make room for `model` on `gpu`; None if those that may go free too few pages."""
        order = self._order.get(gpu.index)
        if order is None:
            order = self._order[gpu.index] = self._in_order(gpu, now_ns)
        free_pages = gpu.free_pages
        found = _Victims([], 0, 0.0, 0.0)
        away_ns = cold_ns(model)
        for victim in order:
            worth = self._worth(victim, len(victim.resident_on) - 1, now_ns)
            waiting = victim.queued if len(victim.resident_on) == 1 else 0
            found.models.append(victim)
            found.need += worth
            found.waiting += waiting
            per_ns = self._popularity.per_ns(worth, now_ns)
            found.lost += waiting + per_ns * (away_ns + victim.weights_ns)
            free_pages += victim.pages
            if free_pages >= model.pages:
                return found
        return None

    def _in_order(self, gpu: Gpu, now_ns: int) -> list[Instance]:
        ranked = []
        for place, model in enumerate(islice(gpu.resident.values(), _VICTIMS_LOOKED_AT)):
            self.victims_looked_at += 1
            if not model.pages or self._cluster.in_use(gpu, model):
                continue
            waits = model.waits and len(model.resident_on) == 1
            worth = self._worth(model, len(model.resident_on) - 1, now_ns) / model.pages
            ranked.append((waits, bool(model.clients), worth, place, model))
        ranked.sort(key=lambda entry: entry[:4])
        return [entry[4] for entry in ranked]


def _deadline_ns(request: Request) -> int:
    return request.deadline_ns
