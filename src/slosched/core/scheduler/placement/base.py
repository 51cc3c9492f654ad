"""What every placement rule has in common: sending loads and evictions, and first copies.

A model that was just loaded into host memory is copied into free pages before its first request, so that
first requests are warm. This never evicts anything, and every load that a rule wants goes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush

from slosched.codes import ActionType, Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request
from slosched.units import NS_PER_MS, NS_PER_S

#: The next load of a GPU is sent this long before the running one ends.
_LOAD_LEAD_NS = NS_PER_MS


class Loaders:
    """GPUs that a load can be sent to: no load runs there, or the only one is about to end."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._able: dict[int, Gpu] = {}  # by index
        self._ending: list[tuple[int, int, Gpu]] = []  # one load: (when it is about to end, index)
        self._ends_ns: dict[int, int] = {}  # which entry of each index holds
        self._changed = cluster.changes.follow_loads()

    def _place(self, gpu: Gpu) -> None:
        index = gpu.index
        self._able.pop(index, None)
        self._ends_ns.pop(index, None)
        if index not in self._cluster.gpus:
            return
        if not gpu.loading:
            self._able[index] = gpu
        elif len(gpu.loading) == 1:
            ends_ns = self._ends_ns[index] = gpu.load.busy_until_ns - _LOAD_LEAD_NS
            heappush(self._ending, (ends_ns, index, gpu))

    def able(self, now_ns: int) -> dict[int, Gpu]:
        """By index; the order has no meaning."""
        if self._changed:
            for gpu in self._changed.values():
                self._place(gpu)
            self._changed.clear()
        ending = self._ending
        while ending and ending[0][0] <= now_ns:
            ends_ns, index, gpu = heappop(ending)
            if self._ends_ns.get(index) == ends_ns:
                del self._ends_ns[index]
                self._able[index] = gpu
        return self._able

    def next_ns(self, now_ns: int) -> int | None:
        """When the next GPU becomes able by the passing of time."""
        self.able(now_ns)
        ending = self._ending
        while ending and self._ends_ns.get(ending[0][1]) != ending[0][0]:
            heappop(ending)
        return ending[0][0] if ending else None


class Placement:
    """Loads and evictions of one cluster. A rule is a subclass that says what to load over what.

    `heeds_deadlines` is False under a policy that serves a request however late. Times are ns on the
    controller's clock.
    """

    #: Whether instances that no client uses may be unloaded: the rule forgets one that is.
    unloads_unused = True

    def __init__(self, cluster: Cluster, *, heeds_deadlines: bool = True) -> None:
        self._cluster = cluster
        self._heeds_deadlines = heeds_deadlines
        assert cluster.config.schedule_ahead_ns is not None
        self._ahead_ns = cluster.config.schedule_ahead_ns
        self._loaders = Loaders(cluster)
        self._now_ns = 0  # of the last `plan`
        self._first: dict[int, deque[Instance]] = {}  # GPU index -> models to copy into free pages
        self._unsettled: dict[int, dict[int, bool]] = {}  # model id -> GPU index -> still queued
        self._unloaded = cluster.changes.follow_unloaded()

    # --------------------------------------------------------------------------- what a rule is

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        """`request` arrived (it may be refused later), or came back from a failed action."""
        raise NotImplementedError

    def short_of(self, model: Instance, *, now_ns: int) -> None:
        """A request of `model` was lost although GPUs hold it: more of them could have served it."""

    def _load_done(self, action: ActionState, *, ok: bool, end_ns: int, duration_ns: int) -> None:
        """A load was reported, or lost with its worker."""

    def _plan_loads(self, now_ns: int) -> None:
        """Send the loads and evictions that should be sent by now."""
        raise NotImplementedError

    def next_wakeup_ns(self) -> int | None:
        """When `plan` should run although nothing happens."""
        raise NotImplementedError

    def _gpu_removed(self, gpu: Gpu) -> None:
        """`gpu` is gone, with what was resident there."""

    # -------------------------------------------------------------------------------- facts

    def model_loaded(self, model: Instance, gpus: list[Gpu]) -> None:
        """`model` is in the host memory of the worker of `gpus`."""
        for gpu in gpus:
            if model.model_id not in gpu.resident and model.model_id not in gpu.loading:
                self._first.setdefault(gpu.index, deque()).append(model)
                self._unsettled.setdefault(model.model_id, {})[gpu.index] = True

    def action_done(self, action: ActionState, *, code: int, end_ns: int, duration_ns: int) -> None:
        """An action was reported, or lost with its worker; only loads matter here."""
        if action.action_type is ActionType.LOAD_WEIGHTS:
            self._load_done(action, ok=code == Code.OK, end_ns=end_ns, duration_ns=duration_ns)

    def gpu_removed(self, gpu: Gpu) -> None:
        """`gpu` left the cluster; what was resident there is so no more."""
        for model in self._first.pop(gpu.index, ()):
            self._unsettled.get(model.model_id, {}).pop(gpu.index, None)
        self._gpu_removed(gpu)

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
        if model.model_id not in gpu.worker.instances or gpu.host is not model.on_host:
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
        self._now_ns = now_ns
        while self._unloaded:
            self._unsettled.pop(self._unloaded.popitem()[0], None)
        self._plan_loads(now_ns)
        if self._first:
            self._fill_free_pages(now_ns)

    def _fill_free_pages(self, now_ns: int) -> None:
        able = self._loaders.able(now_ns)
        for index in sorted(able.keys() & self._first.keys()):
            models, gpu = self._first[index], able[index]
            while models:
                if not self._cluster.slices.spend(1):
                    return  # the next step goes on
                model = models[0]
                fits = gpu.free_pages >= model.pages and model.model_id in gpu.worker.instances
                is_held = model.model_id in gpu.resident or model.model_id in gpu.loading
                if fits and not is_held:
                    if index not in self._loaders.able(now_ns):
                        break  # by the loads that were just sent
                    self._load(gpu, model, now_ns)
                models.popleft()
                self._unsettled.get(model.model_id, {})[index] = False
            if not models:
                del self._first[index]

    def _able_for(self, model: Instance, now_ns: int) -> list[tuple[int, int, Gpu]]:
        """GPUs that a load of `model` may be sent to as (when it could start, index, GPU), soonest first."""
        options = []
        for index, gpu in self._loaders.able(now_ns).items():
            if index in model.loading_on or index in model.resident_on:
                continue
            if gpu.pages < model.pages or not gpu.may_load(model, now_ns):
                continue
            ready_ns = self.load_ready_ns(gpu, model, now_ns)
            if ready_ns is not None:
                options.append((ready_ns, index, gpu))
        options.sort()
        return options

    def _swap(self, gpu: Gpu, victims: Iterable[Instance], model: Instance, now_ns: int) -> None:
        """Load `model` over `victims`."""
        for victim in victims:
            self._cluster.send_evict(gpu, victim, now_ns=now_ns)
        self._load(gpu, model, now_ns)

    def _load(self, gpu: Gpu, model: Instance, now_ns: int) -> None:
        start_ns = max(now_ns + gpu.worker.transit.margin_ns, gpu.load.busy_until_ns)
        # No plan depends on the exact start of a load; the window only drops loads that are long stale.
        latest_ns = start_ns + self._ahead_ns + NS_PER_S
        self._cluster.send_load(gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=latest_ns)


def least_recently_used(cluster: Cluster, gpu: Gpu, model: Instance) -> list[Instance] | None:
    """Models to evict from `gpu` so that `model` fits, least recently used first and none that runs.

    None if too few pages would become free.
    """
    free_pages, victims = gpu.free_pages, []
    for victim in gpu.resident.values():
        if free_pages >= model.pages:
            break
        if victim.pages and not cluster.in_use(gpu, victim):
            victims.append(victim)
            free_pages += victim.pages
    return victims if free_pages >= model.pages else None
