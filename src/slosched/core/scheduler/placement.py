"""Which weights go to which GPU: first what is asked for, then what fits for free.

- A model that is asked for and not resident is *wanted*: it is loaded where it can start soonest,
  into free pages or over models that are asked for less (least recently used first). If no GPU has
  room for it, it is tried again after `_AGAIN_NS`.
- A model that was just loaded into host memory is copied into free pages before anybody asks, so
  that first requests are warm. This never evicts anything and waits for whatever is wanted.

Demand is exec time asked for, fading with `_MEMORY_NS`. A victim either is asked for less than half as
much as the candidate, or has been idle for several times what loading it again would cost: else two
models that are both in use would push one another out for ever.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Gpu, Model
from slosched.units import NS_PER_MS, NS_PER_S

_MEMORY_NS = 2 * NS_PER_S
_WANTED_FOR_NS = NS_PER_S
_VICTIM_SHARE = 0.5
_IDLE_TRANSFERS = 4
#: A wish that found no room waits this long: much less than a load takes.
_AGAIN_NS = 2 * NS_PER_MS
#: Room is sought on this many GPUs, the soonest ones, among so many models of each.
_GPUS_TRIED = 8
_VICTIMS_TRIED = 64
#: The next load of a GPU is sent this long before the running one ends.
_LOAD_LEAD_NS = NS_PER_MS


@dataclass(slots=True, eq=False)
class _Wish:
    """A model that should be loaded; `more`: although GPUs hold it already."""

    model: Model
    asked_ns: int
    more: bool
    not_before_ns: int = 0


class _Loaders:
    """GPUs that a load can be sent to: none runs there, or the only one is about to end."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._able: dict[int, Gpu] = {}  # by index
        self._ending: list[tuple[int, int, Gpu]] = []  # one load: (when it is about to end, index)
        self._ends_ns: dict[int, int] = {}  # which entry of each index holds
        cluster.on_load.append(self._changed)

    def _changed(self, gpu: Gpu) -> None:
        index = gpu.index
        self._able.pop(index, None)
        self._ends_ns.pop(index, None)
        if index not in self._cluster.gpus:
            return
        if not gpu.loading:
            self._able[index] = gpu
        elif len(gpu.loading) == 1:
            ends_ns = self._ends_ns[index] = gpu.weights.busy_until_ns - _LOAD_LEAD_NS
            heappush(self._ending, (ends_ns, index, gpu))

    def able(self, now_ns: int) -> dict[int, Gpu]:
        """By index, in no order that means anything."""
        ending = self._ending
        while ending and ending[0][0] <= now_ns:
            ends_ns, index, gpu = heappop(ending)
            if self._ends_ns.get(index) == ends_ns:
                del self._ends_ns[index]
                self._able[index] = gpu
        return self._able


class Placement:
    """Loads and evictions for one cluster, shared by the policies that load by demand."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        assert cluster.config.schedule_ahead_ns is not None
        self._ahead_ns = cluster.config.schedule_ahead_ns
        self._loaders = _Loaders(cluster)
        self._wanted: dict[int, _Wish] = {}  # by model id
        self._due: dict[int, _Wish] = {}  # those of them that may be tried now
        self._later: list[tuple[int, int, _Wish]] = []  # the others: (not before, model id)
        self._first: dict[int, deque[Model]] = {}  # GPU index -> models to copy into free pages
        self._unsettled: dict[int, dict[int, bool]] = {}  # model id -> GPU index -> still queued

    # -------------------------------------------------------------------------------- facts

    def asked_for(self, model: Model, *, now_ns: int) -> None:
        """A request for `model` arrived (whatever became of it)."""
        faded = math.exp((model.demand_at_ns - now_ns) / _MEMORY_NS)
        model.demand_ns = model.demand_ns * faded + model.b1_ns
        model.demand_at_ns = now_ns
        if not model.resident_on:
            self._want(model, now_ns, more=False)

    def _want(self, model: Model, asked_ns: int, *, more: bool) -> None:
        wish = self._wanted.get(model.model_id)
        if wish is None:
            wish = self._wanted[model.model_id] = _Wish(model, asked_ns, more)
            self._due[model.model_id] = wish
        else:
            wish.asked_ns, wish.more = asked_ns, more

    def short_of(self, model: Model, *, now_ns: int) -> None:
        """Requests of `model` are lost for want of GPUs that hold it: it should have more."""
        if len(model.resident_on) < len(self._cluster.gpus):
            self._want(model, now_ns, more=True)

    def model_loaded(self, model: Model, gpus: list[Gpu]) -> None:
        for gpu in gpus:
            if model.model_id not in gpu.resident and model.model_id not in gpu.loading:
                self._first.setdefault(gpu.index, deque()).append(model)
                self._unsettled.setdefault(model.model_id, {})[gpu.index] = True

    def gpu_removed(self, gpu: Gpu) -> None:
        for model in self._first.pop(gpu.index, ()):
            self._unsettled.get(model.model_id, {}).pop(gpu.index, None)
        for model in self._cluster.models.values():
            if model.queue and not model.resident_on and model.model_id not in self._wanted:
                self._want(model, model.demand_at_ns, more=False)

    def settled(self, model: Model) -> bool:
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

    def demand_ns(self, model: Model, now_ns: int) -> float:
        """Exec time asked of `model` lately, faded to `now_ns`."""
        if model.demand_ns == 0.0:
            return 0.0
        return model.demand_ns * math.exp((model.demand_at_ns - now_ns) / _MEMORY_NS)

    def load_ready_ns(self, gpu: Gpu, model: Model, now_ns: int) -> int | None:
        """When `model` could start on `gpu` if its load were sent now; None if it is not prepared."""
        if model.model_id not in gpu.worker.instances:
            return None
        worker = gpu.worker
        transit_ns = worker.transit.margin_ns
        if model.model_id in gpu.loading:
            loaded_ns = gpu.weights.busy_until_ns
        else:
            begin_ns = max(now_ns + transit_ns, gpu.weights.busy_until_ns)
            loaded_ns = begin_ns + gpu.transfer(model).margin_ns
        # The Infer is sent when the load was reported.
        return max(loaded_ns + worker.returns.margin_ns + transit_ns, gpu.exec.busy_until_ns)

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        """Send every load and eviction that should be sent by now."""
        if self._wanted:
            later = self._later
            while later and later[0][0] <= now_ns:
                _, model_id, wish = heappop(later)
                self._due[model_id] = wish
            if self._due and self._loaders.able(now_ns):
                self._load_wanted(now_ns)
        if self._first:
            self._fill_free_pages(now_ns)

    def _load_wanted(self, now_ns: int) -> None:
        def rank(wish: _Wish) -> tuple[float, int]:
            holders = 1 + len(wish.model.resident_on)
            return (-self.demand_ns(wish.model, now_ns) / holders, wish.model.model_id)

        for wish in sorted(self._due.values(), key=rank):
            if not self._loaders.able(now_ns):
                return
            model = wish.model
            if model.resident_on and not wish.more:
                fulfilled = True
            elif now_ns - wish.asked_ns > _WANTED_FOR_NS and not model.queue:
                fulfilled = True  # nobody asks any more
            else:
                # An absent model stays wanted until it is resident: a load can fail, a GPU be lost.
                fulfilled = self._load_somewhere(model, now_ns) and bool(model.resident_on)
            del self._due[model.model_id]
            if fulfilled:
                del self._wanted[model.model_id]
            else:
                wish.not_before_ns = now_ns + _AGAIN_NS
                heappush(self._later, (wish.not_before_ns, model.model_id, wish))

    def _load_somewhere(self, model: Model, now_ns: int) -> bool:
        """Load `model` on the GPU where it can start soonest. False if no GPU can take it now."""
        if model.loading_on and not model.resident_on:
            return True  # on its way
        options: list[tuple[bool, int, int, Gpu]] = []
        for index, gpu in self._loaders.able(now_ns).items():
            if index in model.loading_on or index in model.resident_on:
                continue
            if not gpu.may_load(model, now_ns):
                continue
            ready_ns = self.load_ready_ns(gpu, model, now_ns)
            if ready_ns is not None:
                options.append((gpu.free_pages < model.pages, ready_ns, index, gpu))
        options.sort()
        for evicts, _, _, gpu in options[:_GPUS_TRIED]:
            if evicts and not self._make_room(gpu, model, now_ns):
                continue
            self._load(gpu, model, now_ns)
            return True
        return False

    def _make_room(self, gpu: Gpu, model: Model, now_ns: int) -> bool:
        """Evict models that are asked for less, until `model` fits. All or nothing."""
        bound = self.demand_ns(model, now_ns) * _VICTIM_SHARE
        free_pages, victims = gpu.free_pages, []
        for unused_first in (True, False):
            for victim in islice(gpu.resident.values(), _VICTIMS_TRIED):
                if free_pages >= model.pages:
                    break
                if bool(victim.clients) == unused_first or self._cluster.in_use(gpu, victim):
                    continue
                if victim.clients and not self._expendable(gpu, victim, bound, now_ns):
                    continue
                victims.append(victim)
                free_pages += victim.pages
        if free_pages < model.pages:
            return False
        for victim in victims:
            self._cluster.send_evict(gpu, victim, now_ns=now_ns)
            if victim.queue and not victim.resident_on:
                self._want(victim, now_ns, more=False)
        return True

    def _expendable(self, gpu: Gpu, victim: Model, bound: float, now_ns: int) -> bool:
        idle_ns = now_ns - victim.last_used_ns
        if not victim.queue and idle_ns > _IDLE_TRANSFERS * gpu.transfer(victim).expected_ns:
            return True
        return self.demand_ns(victim, now_ns) <= bound

    def _fill_free_pages(self, now_ns: int) -> None:
        able = self._loaders.able(now_ns)
        for index in sorted(able.keys() & self._first.keys()):
            models, gpu = self._first[index], able[index]
            while models:
                model = models[0]
                fits = gpu.free_pages >= model.pages and model.model_id in gpu.worker.instances
                here = model.model_id in gpu.resident or model.model_id in gpu.loading
                if fits and not here:
                    if index not in able:
                        break  # by the loads that were just sent
                    self._load(gpu, model, now_ns)
                models.popleft()
                self._unsettled.get(model.model_id, {})[index] = False
            if not models:
                del self._first[index]

    def _load(self, gpu: Gpu, model: Model, now_ns: int) -> None:
        start_ns = max(now_ns + gpu.worker.transit.margin_ns, gpu.weights.busy_until_ns)
        # Nobody waits for a particular start of a load; the window only sheds what is long stale.
        latest_ns = start_ns + self._ahead_ns + NS_PER_S
        self._cluster.send_load(gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=latest_ns)
