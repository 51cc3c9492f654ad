"""INFER5 as published: `--fidelity paper`, for comparison (OSDI'20 §5.3, appendix; reference code).

What distinguishes it, on purpose and to the constant: a deadline 5 ms before the true one but never
nearer than schedule_ahead + 5 ms; a queue per batch size and model; the most urgent *request* picks
the model and the largest feasible batch runs, which abandons older requests until they time out; no
refusal at arrival; a failed action fails its requests; every GPU is given work up to schedule_ahead
early. Its two-slot network sender never fills here, since our sends complete at once.

It was published for workers that are all alike; here a GPU is given only batches that its own worker
offers, which changes nothing where all offer the same.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.published.tracked import Tracked, estimators_of
from slosched.core.scheduler.policies.published.tracker import (
    DEFAULT_CLOCK_MHZ,
    FUTURE_NS,
)
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.state import Gpu, Instance, Request
from slosched.units import format_duration


def _key(entry: tuple[int, Request]) -> int:
    return entry[1].key


class _ModelQueues:
    """One request queue per batch size over one shared list; a queue is an offset into it."""

    __slots__ = ("batches", "estimators", "offsets", "requests")

    def __init__(self, model: Instance) -> None:
        self.estimators = estimators_of(model)
        self.batches = tuple(self.estimators)
        self.offsets = dict.fromkeys(self.batches, 0)
        self.requests: list[tuple[int, Request]] = []  # (internal deadline, request)

    def offered_by(self, gpu: Gpu, model: Instance) -> tuple[int, ...]:
        """The batch sizes that `gpu` can run, ascending; none before its worker has the model."""
        if model.name not in gpu.worker.prepared:
            return ()
        offered = gpu.exec_table(model.queue).batches
        if offered == self.batches:
            return self.batches
        return tuple(b for b in self.batches if b in offered)

    def strategies(self, batches: tuple[int, ...]) -> list[tuple[int, int]]:
        """(latest start of the queue's head, batch) for each of `batches` whose queue has any."""
        found = []
        for batch in batches:
            offset = self.offsets[batch]
            if offset < len(self.requests):
                deadline_ns = self.requests[offset][0]
                found.append((deadline_ns - self.estimators[batch].estimate_ns(), batch))
        return found

    def dequeue(
        self, batches: tuple[int, ...], free_ns: int, clock_mhz: int, min_batch: int
    ) -> tuple[int, list[Request]] | None:
        """The largest of `batches` that can still run at `free_ns`, climbing sizes that are full."""
        requests, offsets = self.requests, self.offsets
        if not batches:
            return None
        for batch in batches:
            ends_ns = free_ns + self.estimators[batch].estimate_ns(clock_mhz)
            while offsets[batch] < len(requests) and requests[offsets[batch]][0] < ends_ns:
                offsets[batch] += 1
        batch, *larger_ones = batches
        for larger in larger_ones:
            if len(requests) - offsets[larger] < larger:
                break
            batch = larger
        if batch < min_batch or len(requests) - offsets[batch] < batch:
            return None
        end = offsets[batch] + batch
        taken = [request for _, request in requests[offsets[batch] : end]]
        # Everything older than the last one taken leaves every queue: abandoned, it will time out.
        del requests[:end]
        for size in self.batches:
            offsets[size] = max(0, offsets[size] - end)
        return batch, taken

    def remove(self, request: Request) -> None:
        # In the order of arrival. One that was abandoned is not here any more.
        requests = self.requests
        position = bisect_left(requests, request.key, key=_key)
        if position < len(requests) and requests[position][1] is request:
            del requests[position]
            for size in self.batches:
                if self.offsets[size] > position:
                    self.offsets[size] -= 1


class Infer5Paper(Tracked[_ModelQueues]):
    """The published policy. See the head of this file."""

    about = About(
        type="INFER5",
        rank=0,
        fidelities=("paper",),
        summary="Clockwork's scheduler as published",
        least_ahead_ns=FUTURE_NS,
        takes_placement=False,
        unloads_unused=False,
        published=True,
        length_classes=False,
    )

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        # All by GPU index, so that a lost GPU takes its own with it.
        # A heap of (latest start, batch, model id, version); stale versions are skipped.
        self._strategies: dict[int, list[tuple[int, int, int, int]]] = {}
        self._versions: dict[int, dict[int, int]] = {}  # model id -> version of its strategies
        self._active: dict[int, dict[int, bool]] = {}  # model id -> whether it has strategies
        self._visits = 0
        self._internal_ns: dict[int, tuple[int, int, int]] = {}  # key -> deadline, demands

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.instance
        queues = self._queues.get(model.model_id)
        if queues is None:
            queues = self._queues[model.model_id] = _ModelQueues(model)
        internal_ns, exec_ns, weights_ns = self._terms(request, queues)
        self._internal_ns[request.key] = (internal_ns, exec_ns, weights_ns)
        self._loads.add(model, exec_ns, weights_ns)
        queues.requests.append((internal_ns, request))
        append(model.queue.requests, request)
        self._timeouts.push(internal_ns, request)
        for gpu in self._cluster.gpus.values():
            self._activate(gpu, model)

    def _activate(self, gpu: Gpu, model: Instance) -> None:
        if not self._active[gpu.index].get(model.model_id):
            self._add_strategies(gpu, model)

    def _add_strategies(self, gpu: Gpu, model: Instance, *, below: int = 2**30) -> None:
        """Replace the instance's strategies by those for batches `below`; with none left it sleeps
        until its next request."""
        model_id, versions = model.model_id, self._versions[gpu.index]
        version = versions[model_id] = versions.get(model_id, 0) + 1
        queues = self._queues[model_id]
        batches = tuple(b for b in queues.offered_by(gpu, model) if b < below)
        found = queues.strategies(batches)
        self._active[gpu.index][model_id] = bool(found)
        for latest_ns, batch in found:
            heappush(self._strategies[gpu.index], (latest_ns, batch, model_id, version))

    def forget(self, request: Request) -> None:
        take_appended(request.queue.requests, request)
        self._queues[request.instance.model_id].remove(request)
        self._leave(request, weights_too=True)

    def _leave(self, request: Request, *, weights_too: bool) -> None:
        _, exec_ns, weights_ns = self._internal_ns.pop(request.key)
        self._loads.add(request.instance, -exec_ns, -weights_ns if weights_too else 0)

    def gpu_added(self, gpu: Gpu) -> None:
        super().gpu_added(gpu)
        self._strategies[gpu.index] = []
        self._versions[gpu.index] = {}
        self._active[gpu.index] = {}

    def gpu_removed(self, gpu: Gpu) -> None:
        super().gpu_removed(gpu)
        self._strategies.pop(gpu.index, None)
        self._versions.pop(gpu.index, None)
        self._active.pop(gpu.index, None)

    def _demand_left(self, request: Request) -> int | None:
        terms = self._internal_ns.pop(request.key, None)
        return None if terms is None else terms[1]

    def _weights_arrived(self, gpu: Gpu, model: Instance) -> None:
        self._activate(gpu, model)

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        self._time_out(now_ns)
        self._loads.plan(now_ns=now_ns)
        # The published threads share one counter over the GPUs and send at most one action a visit;
        # a whole round without a send ends the turn, and the next one goes on behind it.
        gpus = list(self._cluster.gpus.values())
        idle_visits = 0
        while gpus and idle_visits < len(gpus):
            self._visits += 1
            sent = self._visit(gpus[self._visits % len(gpus)], now_ns)
            idle_visits = 0 if sent else idle_visits + 1

    def _time_out(self, now_ns: int) -> None:
        while (request := self._timeouts.pop_before(now_ns + 1)) is not None:
            take_appended(request.queue.requests, request)
            self._queues[request.instance.model_id].remove(request)
            self._leave(request, weights_too=True)
            waited = format_duration(now_ns - request.arrival_ns)
            self._refusals.refuse(request, Code.TIMED_OUT, f"waited {waited} in the queue")

    def _visit(self, gpu: Gpu, now_ns: int) -> bool:
        """schedule_infer for one GPU. True if it sent an action."""
        strategies, versions = self._strategies[gpu.index], self._versions[gpu.index]
        if not strategies:
            return False
        start_ns = self._trackers[gpu.index].available_ns(now_ns)
        if start_ns >= now_ns + self._ahead_ns:
            return False
        while strategies:
            _, batch, model_id, version = heappop(strategies)
            if versions[model_id] != version:
                continue
            model = self._cluster.models[model_id]
            versions[model_id] += 1  # all strategies of the instance go
            if model_id not in gpu.resident:
                self._active[gpu.index][model_id] = False
                continue
            clock_mhz = gpu.clock_mhz or DEFAULT_CLOCK_MHZ
            queues = self._queues[model_id]
            batches = queues.offered_by(gpu, model)
            choice = queues.dequeue(batches, start_ns, clock_mhz, batch)
            if choice is None:
                self._add_strategies(gpu, model, below=batch)
                continue
            self._send(gpu, model, choice, start_ns, now_ns)
            self._add_strategies(gpu, model)
            return True
        return False

    def _send(
        self,
        gpu: Gpu,
        model: Instance,
        choice: tuple[int, list[Request]],
        start_ns: int,
        now_ns: int,
    ) -> None:
        batch, requests = choice
        for request in requests:
            take_appended(model.queue.requests, request)
            deadline_ns, exec_ns, weights_ns = self._internal_ns[request.key]
            self._internal_ns[request.key] = (deadline_ns, exec_ns, 0)
            self._loads.add(model, 0, -weights_ns)
        self._commit(gpu, model, requests, batch, start_ns=start_ns, now_ns=now_ns)

    def next_wakeup_ns(self) -> int | None:
        return self._next_ns({index: bool(each) for index, each in self._strategies.items()})
