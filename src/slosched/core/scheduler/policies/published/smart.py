"""SMART: all queued requests are planned anew every millisecond (reference code, SmartScheduler).

In each epoch of 1 ms in which anything is queued:

1. a model with queued requests that is neither on a GPU nor being loaded is loaded onto the GPU
   with the least load: when it will be idle, and the batch-1 time of what is queued for its models.
   The most asked-for model comes first, and the least recently used ones that are not running go;
2. a request that could not be in time even if its weights were loaded now is answered with code 4;
3. each model's requests are dealt out to the GPUs that hold it in turn. For each GPU, a request that
   cannot be in time alone is answered with code 4; the others form the largest batches that the queue allows
   and the first deadline leaves time for; the batches are given times as smart_timetable.py says;
4. those without a place wait for the next epoch, or are answered with code 4 if that is too late;
5. what starts within 5 ms is sent. It must start within 1.5 ms of its time.

A deadline is taken 5 ms early, or 4 ms if the SLO is 20 ms or less. Estimates are the 99th percentile
of the last 100 durations x clock; until there are 100, the longest. schedule_ahead is not used, as in
the published code, which also has a routine that would replicate models and never calls it. So a model
is on one GPU at a time. A failed action fails its requests.

Plain mistakes of the published code are not kept: the test of rule 2 is inverted; replicas
are dealt out by their position instead of their GPU; the sort of the batches runs against the search
for conflicts, and the loop over the stash ends after one round; batches are formed by number alone and
may be planned past their deadline; the window of rule 5 moves on with each action sent, so that it
never closes; a failed load leaves the model marked as loaded; inputs are thrown away. Weights that are
still being loaded get no Infer yet. At most 64 batches are placed on a GPU in one epoch, the most
urgent ones: more could not be sent in it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from math import ceil

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import least_recently_used
from slosched.core.scheduler.policies.about import About, Defaults
from slosched.core.scheduler.policies.base import LAST_ONE_LOST, NOT_OFFERED, Refusals, is_offered
from slosched.core.scheduler.policies.published.smart_timetable import Batch, timetable
from slosched.core.scheduler.queues import take_by_due
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request
from slosched.units import NS_PER_MS, NS_PER_US, format_duration

_EPOCH_NS = NS_PER_MS
_NETWORK_NS = 2 * NS_PER_MS  # nothing starts sooner than this after it was decided
_AHEAD_NS = 5 * NS_PER_MS
_SLACK_NS = 1_500 * NS_PER_US  # how late an action may start
_EVICT_NS = NS_PER_MS
_BUFFER_NS = 5 * NS_PER_MS
_SHORT_SLO_NS = 20 * NS_PER_MS
_WINDOW = 100
_PERCENTILE = 0.99
_CLOCK_MHZ = 1380
_MOST_PLACED = 64


class _Durations:
    """The last 100 durations of one batch size, as ns x MHz. The first replaces the profile's."""

    __slots__ = ("_ordered", "_samples", "work")

    def __init__(self, seed_ns: int) -> None:
        self._samples: deque[int] = deque()
        self._ordered: list[int] = []
        self.work = seed_ns * _CLOCK_MHZ

    def add(self, duration_ns: int, clock_mhz: int) -> None:
        if len(self._samples) == _WINDOW:
            del self._ordered[bisect_left(self._ordered, self._samples.popleft())]
        work = duration_ns * clock_mhz
        self._samples.append(work)
        insort(self._ordered, work)
        full = len(self._ordered) == _WINDOW
        self.work = self._ordered[ceil(_WINDOW * _PERCENTILE) - 1 if full else -1]


class Smart:
    """See the head of this file."""

    about = About(
        type="SMART",
        rank=31,
        summary="Clockwork's other scheduler: plans all requests anew every 1ms; same defaults",
        defaults=Defaults(max_exec_ns=250 * NS_PER_MS),
        takes_placement=False,
        unloads_unused=False,
        published=True,
        ignored_options=("action_telemetry_file",),  # the published code does not heed it either
        length_classes=False,
    )

    replans = False

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._waiting: dict[int, Instance] = {}  # models with queued requests
        self._deadlines_ns: dict[int, int] = {}  # by request key: internal
        self._durations: dict[int, dict[int, _Durations]] = {}  # model id -> batch
        self._arriving: dict[int, dict[int, int]] = {}  # model id -> GPU index -> weights there, ns
        self._pci_idle_ns: dict[int, int] = {}  # by GPU index
        self._epoch_ns = 0  # the next one

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        model = request.instance
        if not is_offered(self._cluster, model):
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, NOT_OFFERED)
            return
        early_ns = _BUFFER_NS if request.slo_ns > _SHORT_SLO_NS else 2 * _NETWORK_NS
        self._deadlines_ns[request.key] = request.deadline_ns - early_ns
        if not self._waiting:
            self._epoch_ns = max(self._epoch_ns, (now_ns // _EPOCH_NS + 1) * _EPOCH_NS)
        insort(model.queue.requests, request)
        self._waiting[model.model_id] = model

    def forget(self, request: Request) -> None:
        model = request.instance
        take_by_due(model.queue.requests, request)
        del self._deadlines_ns[request.key]
        if not model.queue.requests:
            del self._waiting[model.model_id]

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        gpu, model = action.gpu, action.instance
        if not action.requests:
            self._arrived(gpu, model)
        elif code == Code.OK:
            durations = self._durations_of(model).get(action.batch_class)
            if durations is not None:
                durations.add(duration_ns, gpu.clock_mhz or _CLOCK_MHZ)

    def _arrived(self, gpu: Gpu, model: Instance) -> None:
        """The load of `model` ended, well or badly; nothing if it was an eviction."""
        if model.model_id not in gpu.loading:
            self._expect_no_more(model.model_id, gpu)

    def _expect_no_more(self, model_id: int, gpu: Gpu) -> None:
        arriving = self._arriving.get(model_id, {})
        arriving.pop(gpu.index, None)
        if not arriving:
            self._arriving.pop(model_id, None)

    def gpu_added(self, gpu: Gpu) -> None:
        self._pci_idle_ns[gpu.index] = 0

    def gpu_removed(self, gpu: Gpu) -> None:
        self._pci_idle_ns.pop(gpu.index, None)
        for model_id in list(self._arriving):
            self._expect_no_more(model_id, gpu)
        for model in list(self._waiting.values()):
            if is_offered(self._cluster, model):
                continue
            for request in list(model.queue.requests):
                self.forget(request)
                self._refusals.refuse(request, Code.CANCELLED, LAST_ONE_LOST)

    def model_loaded(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None:
        """Weights move only by demand."""

    def settled(self, model: Instance) -> bool:
        return True

    def next_wakeup_ns(self) -> int | None:
        return self._epoch_ns if self._waiting else None

    # ---------------------------------------------------------------------------- estimates

    def _durations_of(self, model: Instance) -> dict[int, _Durations]:
        durations = self._durations.get(model.model_id)
        if durations is None:
            assert model.result is not None
            seeds = zip(model.result.batch_sizes, model.result.exec_ns, strict=True)
            durations = self._durations[model.model_id] = {b: _Durations(ns) for b, ns in seeds}
        return durations

    def _exec_ns(self, gpu: Gpu, model: Instance, batch: int = 1) -> int:
        return self._durations_of(model)[batch].work // (gpu.clock_mhz or _CLOCK_MHZ)

    @staticmethod
    def _weights_ns(model: Instance) -> int:
        assert model.result is not None
        return model.result.weights_ns

    def _idle_ns(self, gpu: Gpu, now_ns: int) -> int:
        return max(gpu.exec.busy_until_ns, now_ns + _NETWORK_NS)

    def _holders(self, model: Instance) -> list[Gpu]:
        """GPUs that have the model's weights or are getting them, by index."""
        arriving = self._arriving.get(model.model_id, {})
        indices = sorted({**model.resident_on, **arriving})
        return [self._cluster.gpus[i] for i in indices if i in self._cluster.gpus]

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        if not self._waiting or now_ns < self._epoch_ns:
            return
        self._epoch_ns = (now_ns // _EPOCH_NS + 1) * _EPOCH_NS
        for index, models in self._loads_by_gpu(now_ns).items():
            for model in models:
                if not self._load(self._cluster.gpus[index], model, now_ns):
                    break
        for index, queues in self._deal_out(now_ns).items():
            self._schedule_gpu(self._cluster.gpus[index], queues, now_ns)

    def _loads_by_gpu(self, now_ns: int) -> dict[int, list[Instance]]:
        """Which models should be loaded onto which GPU, by GPU index: the most asked-for first."""
        gpus = self._cluster.gpus
        load_ns = {index: self._idle_ns(gpu, now_ns) for index, gpu in gpus.items()}
        absent = []
        for model in self._waiting.values():
            holders = self._holders(model)
            if not holders:
                absent.append(model)
            for gpu in holders:
                load_ns[gpu.index] += (
                    self._exec_ns(gpu, model) * len(model.queue.requests) // len(holders)
                )
        chosen: dict[int, list[Instance]] = {}
        for model in sorted(absent, key=lambda m: (-len(m.queue.requests), m.model_id)):
            takers = [gpu for gpu in gpus.values() if gpu.can_load(model, now_ns)]
            if takers:
                gpu = min(takers, key=lambda g: (load_ns[g.index], g.index))
                queued_ns = self._exec_ns(gpu, model) * len(model.queue.requests)
                load_ns[gpu.index] += self._weights_ns(model) + queued_ns
                chosen.setdefault(gpu.index, []).append(model)
        return chosen

    def _load(self, gpu: Gpu, model: Instance, now_ns: int) -> bool:
        """Evict what must go and load `model`. False if no more fits into this epoch's window."""
        victims = least_recently_used(self._cluster, gpu, model)
        if victims is None:
            return True  # all are running; the next model may be smaller
        for victim in victims:
            if not self._pci_open(gpu, now_ns):
                return False
            self._cluster.send_evict(gpu, victim, now_ns=now_ns)
            self._pci_idle_ns[gpu.index] += _EVICT_NS + _SLACK_NS
        if not self._pci_open(gpu, now_ns):
            return False
        start_ns = self._pci_idle_ns[gpu.index]
        self._cluster.send_load(
            gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=start_ns + _SLACK_NS
        )
        ready_ns = start_ns + self._weights_ns(model) + _SLACK_NS
        self._pci_idle_ns[gpu.index] = ready_ns
        self._arriving.setdefault(model.model_id, {})[gpu.index] = ready_ns
        return True

    def _pci_open(self, gpu: Gpu, now_ns: int) -> bool:
        idle_ns = max(self._pci_idle_ns[gpu.index], now_ns + _NETWORK_NS)
        self._pci_idle_ns[gpu.index] = idle_ns
        return idle_ns <= now_ns + _AHEAD_NS - _NETWORK_NS

    def _deal_out(self, now_ns: int) -> dict[int, list[tuple[Instance, list[Request]]]]:
        """Each model's requests to its GPUs in turn, by GPU index; drops whom no load can help."""
        dealt: dict[int, list[tuple[Instance, list[Request]]]] = {}
        for model in list(self._waiting.values()):
            holders = self._holders(model)
            for turn, gpu in enumerate(holders):
                requests = model.queue.requests[turn :: len(holders)]
                if requests:
                    dealt.setdefault(gpu.index, []).append((model, requests))
            if not holders:
                fastest_ns = min(self._exec_ns(g, model) for g in self._cluster.gpus.values())
                ready_ns = now_ns + _NETWORK_NS + _SLACK_NS + self._weights_ns(model)
                for request in list(model.queue.requests):
                    if ready_ns + fastest_ns > self._deadlines_ns[request.key]:
                        self._drop(request, ready_ns, fastest_ns, now_ns)
        return dealt

    def _drop(self, request: Request, start_ns: int, exec_ns: int, now_ns: int) -> None:
        self.forget(request)
        reason = (
            f"no place was found: waited {format_duration(now_ns - request.arrival_ns)}, could start in "
            f"{format_duration(start_ns - now_ns)}, takes {format_duration(exec_ns)}, "
            f"{format_duration(request.deadline_ns - now_ns)} were left"
        )
        self._refusals.refuse(request, Code.TIMED_OUT, reason, start_ns=start_ns, exec_ns=exec_ns)

    def _schedule_gpu(
        self, gpu: Gpu, queues: list[tuple[Instance, list[Request]]], now_ns: int
    ) -> None:
        """Form batches, give them times, send what is due, and drop what has no hope."""
        idle_ns = self._idle_ns(gpu, now_ns)
        batches: list[Batch] = []
        for model, requests in queues:
            arrives_ns = self._arriving.get(model.model_id, {}).get(gpu.index, 0)
            batches += self._batches(gpu, model, requests, max(idle_ns, arrives_ns), now_ns)
        if len(batches) > _MOST_PLACED:
            batches.sort(key=lambda b: b.deadline_ns)
            del batches[_MOST_PLACED:]
        placed, stash = timetable(batches)
        for batch in placed:
            if batch.start_ns > now_ns + _NETWORK_NS + _AHEAD_NS:
                break
            if batch.model.model_id in gpu.resident:
                self._send(gpu, batch, now_ns)
        for batch in stash:
            single_ns = self._exec_ns(gpu, batch.model)
            for request in batch.requests:
                if self._deadlines_ns[request.key] - single_ns <= idle_ns + _EPOCH_NS:
                    self._drop(request, batch.earliest_ns, single_ns, now_ns)

    def _batches(
        self, gpu: Gpu, model: Instance, requests: list[Request], earliest_ns: int, now_ns: int
    ) -> list[Batch]:
        """The largest batches that `requests` (by deadline) fill, each in time if started first."""
        single_ns = self._exec_ns(gpu, model)
        in_time = []
        for request in requests:
            if earliest_ns + single_ns > self._deadlines_ns[request.key]:
                self._drop(request, earliest_ns, single_ns, now_ns)
            else:
                in_time.append(request)
        offered = [b for b in gpu.exec_table(model.queue).batches if b in self._durations_of(model)]
        classes = [(b, self._exec_ns(gpu, model, b)) for b in offered]
        batches = []
        first = 0
        while first < len(in_time):
            size, duration_ns, deadline_ns = 1, single_ns, self._deadlines_ns[in_time[first].key]
            for batch, exec_ns in classes[1:]:
                if first + batch > len(in_time):
                    break
                taken = in_time[first : first + batch]
                until_ns = min(self._deadlines_ns[r.key] for r in taken)
                if earliest_ns + exec_ns <= until_ns:
                    size, duration_ns, deadline_ns = batch, exec_ns, until_ns
            taken = in_time[first : first + size]
            batches.append(Batch(model, taken, duration_ns, earliest_ns, deadline_ns))
            first += size
        return batches

    def _send(self, gpu: Gpu, batch: Batch, now_ns: int) -> None:
        for request in batch.requests:
            self.forget(request)
        self._cluster.send_infer(
            gpu,
            batch.requests,
            len(batch.requests),
            now_ns=now_ns,
            start_ns=batch.start_ns,
            duration_ns=batch.duration_ns,
            latest_ns=batch.start_ns + _SLACK_NS,
        )
