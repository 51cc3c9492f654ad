"""DIRECT: each request goes straight to the GPU that its request id selects (reference code, DirectController).

A test of workers and the wire, not a scheduler: worker 0 alone is used; even request ids go to its
second GPU, odd ones to its first (all of them, if it has no other). A request whose weights are not
there has them loaded; every request is an Infer of its own, with ten seconds to start in. Nothing is
batched, refused for lateness or evicted, and a failed action fails its request.

A load is taken to last 7 ms: no Infer starts sooner after its LoadWeights was sent. The published code
sends both at once, and the Infer fails if the load does not end in time. Here an Infer waits until its
weights were reported, since nothing is ever sent to weights that are not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request
from slosched.units import NS_PER_MS, NS_PER_S

_WORKER = 0
_ASSUMED_LOAD_NS = 7 * NS_PER_MS
_START_WITHIN_NS = 10 * NS_PER_S


@dataclass(slots=True, eq=False)
class _Group:
    """The requests that wait for one model on one GPU, by key: the first to come first."""

    gpu: Gpu
    model: Instance
    requests: dict[int, Request] = field(default_factory=dict)

    @property
    def place(self) -> tuple[int, int]:
        return self.gpu.index, self.model.model_id


def _by_arrival(groups: Iterable[_Group]) -> Iterator[Request]:
    """The requests of all `groups` in order of arrival. The caller takes each out before the next one."""
    heads = [(next(iter(g.requests)), place, g) for place, g in enumerate(groups) if g.requests]
    heapify(heads)
    while heads:
        key, place, group = heads[0]
        request = group.requests.get(key)  # the caller may have taken it out
        if request is not None:
            yield request
        following = next(iter(group.requests), None)
        if following is None:
            heappop(heads)
        else:
            heapreplace(heads, (following, place, group))


class Direct:
    """See the head of this file."""

    about = About(
        type="DIRECT",
        rank=32,
        summary="one Infer per request on worker 0, by request id: tests a worker and the wire",
        takes_placement=False,
        unloads_unused=False,
        published=True,
        not_planned="is a test of workers, and uses only the first",
        length_classes=False,
    )

    replans = False

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._groups: dict[tuple[int, int], _Group] = {}  # by (GPU index, model id)
        self._group_of: dict[int, _Group] = {}  # by request key
        self._there: dict[tuple[int, int], _Group] = {}  # those whose weights are reported
        self._available_ns: dict[tuple[int, int], int] = {}  # (GPU index, model id)
        self._becomes_available: list[int] = []  # a heap of these times
        self._now_ns = 0
        self.groups_looked_at = 0  # what decisions cost

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        worker = self._cluster.workers.get(_WORKER)
        gpus = worker.gpus if worker is not None and not worker.retired else []
        if not gpus:
            reason = f"DIRECT uses worker {_WORKER} alone, and it is not connected"
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, reason)
            return
        gpu = gpus[1] if request.request_id % 2 == 0 and len(gpus) > 1 else gpus[0]
        model = request.instance
        if model.model_id not in gpu.worker.instances:
            reason = f"worker {_WORKER}, which alone DIRECT uses, has not prepared this model"
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, reason)
            return
        resident = model.model_id in gpu.resident
        present = resident or model.model_id in gpu.loading
        if not present and gpu.free_pages < model.pages:
            reason = (
                f"{gpu.name} has {gpu.free_pages} free page(s), the weights take {model.pages}, and "
                "DIRECT evicts nothing"
            )
            self._refusals.refuse(request, Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE, reason)
            return
        if not present:
            self._load(gpu, model, now_ns)
        append(model.queue.requests, request)
        group = self._groups.setdefault((gpu.index, model.model_id), _Group(gpu, model))
        group.requests[request.key] = request
        self._group_of[request.key] = group
        if resident:
            self._there[group.place] = group

    def _load(self, gpu: Gpu, model: Instance, now_ns: int) -> None:
        start_ns = max(now_ns + gpu.worker.transit.expected_ns, gpu.load.busy_until_ns)
        latest_ns = now_ns + _START_WITHIN_NS
        self._cluster.send_load(gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=latest_ns)
        self._available_ns[gpu.index, model.model_id] = now_ns + _ASSUMED_LOAD_NS
        heappush(self._becomes_available, now_ns + _ASSUMED_LOAD_NS)

    def forget(self, request: Request) -> None:
        take_appended(request.queue.requests, request)
        group = self._group_of.pop(request.key)
        del group.requests[request.key]
        if not group.requests and self._groups.get(group.place) is group:
            del self._groups[group.place]
            self._there.pop(group.place, None)

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        if action.requests:
            return
        place = action.gpu.index, action.instance.model_id
        group = self._groups.get(place)
        if group is None:
            return
        if code == Code.OK:
            self._there[place] = group
        else:
            reason = f"its weights could not be loaded on {action.gpu.name}"
            self._fail([group], code, reason)

    def gpu_added(self, gpu: Gpu) -> None:
        """Nothing is kept per GPU."""

    def gpu_removed(self, gpu: Gpu) -> None:
        reason = f"worker {gpu.worker.worker_id} was lost, and DIRECT uses no other"
        its = [group for group in self._groups.values() if group.gpu is gpu]
        self._fail(its, Code.CANCELLED, reason)
        for place in [p for p in self._available_ns if p[0] == gpu.index]:
            del self._available_ns[place]

    def _fail(self, groups: list[_Group], code: int, reason: str) -> None:
        """Nothing joins `groups` any more; their requests are answered in slices."""
        for group in groups:
            del self._groups[group.place]
            self._there.pop(group.place, None)
        self._cluster.slices.begin(self._answer(groups, code, reason))

    def _answer(self, groups: list[_Group], code: int, reason: str) -> Work:
        for request in _by_arrival(groups):
            self.forget(request)
            self._refusals.refuse(request, code, reason)
            yield ANSWER

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        """Weights move only by demand."""

    def settled(self, model: Instance) -> bool:
        return True

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        due = []
        for group in list(self._there.values()):
            self.groups_looked_at += 1
            if group.model.model_id not in group.gpu.resident:
                del self._there[group.place]  # until it is loaded again
            elif self._available_ns.get(group.place, 0) <= now_ns:
                due.append(group)
        for request in _by_arrival(due):
            if not self._cluster.slices.spend(ANSWER):
                return
            self._send(request, self._group_of[request.key].gpu, now_ns)

    def _send(self, request: Request, gpu: Gpu, now_ns: int) -> None:
        self.forget(request)
        self._cluster.send_infer(
            gpu,
            [request],
            1,
            now_ns=now_ns,
            start_ns=self._cluster.likely_start_ns(gpu, now_ns),
            duration_ns=gpu.exec_table(request.queue).single.expected_ns,
            latest_ns=now_ns + _START_WITHIN_NS,
        )

    def next_wakeup_ns(self) -> int | None:
        times = self._becomes_available
        while times and times[0] <= self._now_ns:
            heappop(times)
        return times[0] if times and self._groups else None
