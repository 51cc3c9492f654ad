"""INFER4: the published predecessor of INFER5 (reference code, ConcurrentInferAndLoadScheduler).

Each request puts one *strategy* for each batch size of its model into the heap of every GPU that has
the weights: "run me first in a batch of b". Its priority is the latest start, internal deadline less
the estimate of b. A GPU pops strategies as long as its window is open (work for less than
schedule_ahead is outstanding). One that is popped runs if

1. its request is still queued and would be done in time;
2. b requests stand in the queue from this one on; else the b newest run, if all would be in time;
3. no larger batch could be filled from this request on. If one could and still ends before the
   deadline, that one runs; if it does not, the strategy is given up, since a later request may get
   the larger batch.

What runs are the first requests of the queue; those older than the strategy's that the batch is too
long for leave the queue with code 7. Requests that could not even start in time leave it
with code 8. Both kinds are answered at their internal deadline; all others that are still queued then get code
4.

Deadlines, estimates, trackers and demand are those of the published INFER5 (deadlines.py, tracker.py,
loads.py), with its habit of copying a model that is asked for to every GPU. At most two loads are outstanding
per GPU, and 100 us pass between any two.

One plain mistake of the published code is not kept: rule 2 looked for the b newest by a comparison
that is inverted, and so never found them.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import About, Defaults
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.published.loads import PaperLoads, _ModelDemand
from slosched.core.scheduler.policies.published.tracked import Tracked, estimators_of
from slosched.core.scheduler.policies.published.tracker import (
    DEFAULT_CLOCK_MHZ,
    FUTURE_NS,
)
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.state import Gpu, Instance, Request
from slosched.units import NS_PER_MS, NS_PER_US, format_duration

_MAX_LOADS = 2  # outstanding per GPU
_BETWEEN_LOADS_NS = 100 * NS_PER_US

_WHY = {
    Code.TIMED_OUT: "no GPU came free in time",
    Code.SKIPPED: "given up in favour of a larger batch",
    Code.COULD_NOT_START_IN_TIME: "could not have started in time any more",
}


class _Entry:
    """One request with its internal deadline. `queued`: in its model's queue, so not skipped yet."""

    __slots__ = ("code", "deadline_ns", "exec_ns", "queued", "request", "weights_ns")

    def __init__(self, request: Request, deadline_ns: int, exec_ns: int, weights_ns: int) -> None:
        self.request = request
        self.deadline_ns = deadline_ns
        self.exec_ns = exec_ns  # demand on the GPUs' exec time, and on loads
        self.weights_ns = weights_ns
        self.queued = True
        self.code = Code.TIMED_OUT  # its answer if it never runs


class _Strategy:
    """Run `anchor` first in a batch of `batch`. Valid while `owner` is queued."""

    __slots__ = ("anchor", "batch", "owner")

    def __init__(self, owner: _Entry, batch: int) -> None:
        self.owner = self.anchor = owner
        self.batch = batch


class _ModelQueue:
    """The queued entries of one model, oldest first, and how long its batches take."""

    __slots__ = ("batches", "entries", "estimators")

    def __init__(self, model: Instance) -> None:
        self.estimators = estimators_of(model)
        self.batches = tuple(self.estimators)
        self.entries: list[_Entry] = []

    def offered_by(self, gpu: Gpu, model: Instance) -> tuple[int, ...]:
        """The batch sizes that `gpu` can run, ascending."""
        offered = gpu.exec_table(model.queue).batches
        return tuple(b for b in self.batches if b in offered)

    def position(self, entry: _Entry) -> int:
        return bisect_left(self.entries, entry.request.key, key=lambda e: e.request.key)

    def remove(self, entry: _Entry) -> None:
        place = self.position(entry)
        assert self.entries[place] is entry, "a queued entry stands in its queue"
        del self.entries[place]

    def drop_first(self, code: Code) -> None:
        entry = self.entries.pop(0)
        entry.queued, entry.code = False, code

    def dequeue(
        self, strategy: _Strategy, batches: tuple[int, ...], start_ns: int, clock_mhz: int
    ) -> tuple[int, list[_Entry]] | None:
        """The batch that `strategy` runs at `start_ns`, by rules 1 to 3; None if it runs none."""
        entries, batch = self.entries, strategy.batch
        if not strategy.anchor.queued:
            strategy.anchor = strategy.owner
        ends_ns = start_ns + self.estimators[batch].estimate_ns(clock_mhz)
        if strategy.anchor.deadline_ns <= ends_ns:
            return None
        while entries and entries[0].deadline_ns < start_ns:
            self.drop_first(Code.COULD_NOT_START_IN_TIME)
        behind = len(entries) - self.position(strategy.anchor)
        if behind < batch:
            newest = entries[-batch:]
            if len(newest) < batch or any(e.deadline_ns < ends_ns for e in newest):
                return None
            strategy.anchor, behind = newest[0], batch
        anchor = strategy.anchor
        larger = max(b for b in batches if b <= behind)
        if larger > batch:
            batch, ends_ns = larger, start_ns + self.estimators[larger].estimate_ns(clock_mhz)
            if ends_ns > anchor.deadline_ns:
                return None
        while entries[0] is not anchor and entries[0].deadline_ns < ends_ns:
            self.drop_first(Code.SKIPPED)
        taken = entries[:batch]
        del entries[:batch]
        for entry in taken:
            entry.queued = False
        return batch, taken


class _Loads(PaperLoads):
    """The published loads, with a limit on what is outstanding and a pause after each."""

    def __init__(self, cluster: Cluster, *, ahead_ns: int) -> None:
        super().__init__(cluster, ahead_ns=ahead_ns)
        self._not_before_ns: dict[int, int] = {}  # by GPU index

    def gpu_removed(self, gpu: Gpu) -> None:
        super().gpu_removed(gpu)
        self._not_before_ns.pop(gpu.index, None)

    def _load_one(self, gpu: Gpu, wanting: list[_ModelDemand], now_ns: int) -> bool:
        if len(gpu.loading) >= _MAX_LOADS or now_ns < self._not_before_ns.get(gpu.index, 0):
            return False
        sent = super()._load_one(gpu, wanting, now_ns)
        if sent:
            self._not_before_ns[gpu.index] = now_ns + _BETWEEN_LOADS_NS
        return sent

    def next_wakeup_ns(self) -> int | None:
        times = [super().next_wakeup_ns()]
        if any(d.loadweights_ns > 0 for d in self._demands.values()):
            times += [t for t in self._not_before_ns.values() if t > self._now_ns]
        return min((t for t in times if t is not None), default=None)


class Infer4(Tracked[_ModelQueue]):
    """See the head of this file."""

    about = About(
        type="INFER4",
        rank=30,
        summary="Clockwork's scheduler before INFER5; max_exec defaults to 250ms, max_batch to 16",
        defaults=Defaults(max_exec_ns=250 * NS_PER_MS),
        least_ahead_ns=FUTURE_NS,
        takes_placement=False,
        unloads_unused=False,
        published=True,
        length_classes=False,
    )

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._entries: dict[int, _Entry] = {}  # by request key; queued, skipped or in flight
        # By GPU index, so that a lost GPU takes its own with it: (priority, sequence, strategy).
        self._strategies: dict[int, list[tuple[int, int, _Strategy]]] = {}
        self._sequence = 0
        self._turn = 0

    def _make_loads(self) -> PaperLoads:
        return _Loads(self._cluster, ahead_ns=self._ahead_ns)

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.instance
        queue = self._queues.get(model.model_id)
        if queue is None:
            queue = self._queues[model.model_id] = _ModelQueue(model)
        entry = _Entry(request, *self._terms(request, queue))
        self._entries[request.key] = entry
        self._loads.add(model, entry.exec_ns, entry.weights_ns)
        self._timeouts.push(entry.deadline_ns, request)
        append(model.queue.requests, request)
        queue.entries.append(entry)
        strategies = [_Strategy(entry, batch) for batch in queue.batches]
        for gpu in model.resident_on.values():
            for strategy in strategies:
                self._push(gpu, queue, strategy)

    def _push(self, gpu: Gpu, queue: _ModelQueue, strategy: _Strategy) -> None:
        self._sequence += 1
        priority = strategy.owner.deadline_ns - queue.estimators[strategy.batch].estimate_ns()
        heappush(self._strategies[gpu.index], (priority, self._sequence, strategy))

    def forget(self, request: Request) -> None:
        self._leave(request)

    def _leave(self, request: Request) -> _Entry:
        """Take a queued or skipped request out of everything."""
        take_appended(request.queue.requests, request)
        entry = self._entries.pop(request.key)
        self._loads.add(request.instance, -entry.exec_ns, -entry.weights_ns)
        if entry.queued:
            self._queues[request.instance.model_id].remove(entry)
            entry.queued = False
        return entry

    def gpu_added(self, gpu: Gpu) -> None:
        super().gpu_added(gpu)
        self._strategies[gpu.index] = []

    def gpu_removed(self, gpu: Gpu) -> None:
        super().gpu_removed(gpu)
        self._strategies.pop(gpu.index, None)

    def _demand_left(self, request: Request) -> int | None:
        entry = self._entries.pop(request.key, None)
        return None if entry is None else entry.exec_ns

    def _weights_arrived(self, gpu: Gpu, model: Instance) -> None:
        queue = self._queues[model.model_id]
        for entry in queue.entries:
            for batch in queue.batches:
                self._push(gpu, queue, _Strategy(entry, batch))

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        while (request := self._timeouts.pop_before(now_ns + 1)) is not None:
            code = self._leave(request).code
            waited = format_duration(now_ns - request.arrival_ns)
            self._refusals.refuse(request, code, f"{_WHY[code]}: waited {waited} in the queue")
        self._loads.plan(now_ns=now_ns)
        gpus = list(self._cluster.gpus.values())
        self._turn += 1
        for offset in range(len(gpus)):
            self._drain(gpus[(self._turn + offset) % len(gpus)], now_ns)

    def _drain(self, gpu: Gpu, now_ns: int) -> None:
        """Pop the strategies of `gpu` until it has work up to the end of its window."""
        strategies, tracker = self._strategies[gpu.index], self._trackers[gpu.index]
        while strategies:
            strategy = strategies[0][2]
            if not strategy.owner.queued:
                heappop(strategies)
                continue
            start_ns = tracker.available_ns(now_ns)
            if start_ns >= now_ns + self._ahead_ns:
                return
            heappop(strategies)
            model = strategy.owner.request.instance
            if model.model_id not in gpu.resident:
                continue
            queue = self._queues[model.model_id]
            batches = queue.offered_by(gpu, model)
            if strategy.batch not in batches:
                continue
            clock_mhz = gpu.clock_mhz or DEFAULT_CLOCK_MHZ
            choice = queue.dequeue(strategy, batches, start_ns, clock_mhz)
            if choice is not None:
                self._send(gpu, model, choice, start_ns, now_ns)

    def _send(
        self,
        gpu: Gpu,
        model: Instance,
        choice: tuple[int, list[_Entry]],
        start_ns: int,
        now_ns: int,
    ) -> None:
        batch, entries = choice
        for entry in entries:
            take_appended(model.queue.requests, entry.request)
            self._loads.add(model, 0, -entry.weights_ns)
        requests = [entry.request for entry in entries]
        self._commit(gpu, model, requests, batch, start_ns=start_ns, now_ns=now_ns)

    def next_wakeup_ns(self) -> int | None:
        return self._next_ns({index: bool(each) for index, each in self._strategies.items()})
