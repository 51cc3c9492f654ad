"""The two brains on a minimal event loop, each call timed: what scheduler and workers cost by themselves.

The loop is a heap of (time, sequence) and nothing else, so that what the simulator, the sockets and the
telemetry add is left out. Arrivals are Poisson, seeded; virtual times are ns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate
from time import perf_counter_ns, process_time_ns

from slosched.config import EmulationNoise, GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.invariants import InvariantChecker
from slosched.core.scheduler.interface import (
    ActionDone,
    FromClient,
    FromWorker,
    RequestDone,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.interface import Event as SchedulerEvent
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.emulated import EmulatedGpu, prepare_emulated
from slosched.core.worker.interface import Effect, FromController, PrepareModel, ToController
from slosched.core.worker.stepping import Stepper
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHeartbeat,
    ClientHello,
    GpuInfo,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
    WorkerToController,
)
from slosched.units import NS_PER_MS, NS_PER_S

_CLIENT = b"client"
_START_NS = 10**18
_WAY_NS = 200_000  # each way between controller and workers


def zoo(names: int, *, weights_bytes: int, cache_bytes: int, seed: int = 1) -> GpuProfile:
    """A profile with `names` models of 1.2 to 9 ms, batches to 16 as efficient as ResNet-50's."""
    chance = random.Random(seed)
    models = {}
    for number in range(names):
        single_ns = chance.uniform(1.2, 9.0) * NS_PER_MS
        shape = {1: 1.0, 2: 1.46, 4: 2.15, 8: 3.5, 16: 6.04}
        exec_ns = {batch: round(single_ns * times) for batch, times in shape.items()}
        name = f"model{number:03d}"
        models[name] = ModelProfile(name, exec_ns, 8_330_000, weights_bytes)
    return GpuProfile("zoo", models, weights_cache_bytes=cache_bytes)


#: Requests between two looks at the process's CPU time.
_WINDOW = 256


@dataclass
class Parts:
    """CPU time by part and what was done in it.

    Neighbours slow a core down, by its caches and its other thread, and never speed it up. So the CPU
    time of a request is that of the tenth quickest of a hundred windows, shared out as the parts' real
    times were over the whole.
    """

    spent_ns: dict[str, int] = field(default_factory=dict)  # real time
    real_ns: int = 0
    cpu_ns: int = 0
    windows_ns: list[float] = field(default_factory=list)  # CPU time per request
    requests: int = 0
    actions: int = 0
    met: int = 0
    virtual_ns: int = 0
    by_code: dict[int, int] = field(default_factory=dict)

    @property
    def undisturbed(self) -> float:
        """CPU time of the quick windows as a share of the mean."""
        return self._quick_ns() * self.requests / self.cpu_ns

    def _quick_ns(self) -> float:
        ordered = sorted(self.windows_ns)
        return ordered[len(ordered) // 10]

    def us(self, *parts: str) -> float:
        """CPU time of `parts` (of everything if none is named), us."""
        cpu_us = self._quick_ns() * self.requests / 1e3
        if not parts:
            return cpu_us
        return cpu_us * sum(self.spent_ns.get(p, 0) for p in parts) / self.real_ns

    def us_per_request(self, *parts: str) -> float:
        return self.us(*parts) / max(1, self.requests)

    def us_per_action(self, *parts: str) -> float:
        return self.us(*parts) / max(1, self.actions)


SCHEDULER = ("handle request", "handle result", "schedule", "next wakeup")
WORKER = ("worker handle", "worker step", "worker due")


class _Node:
    """One worker's brain with its emulated GPUs."""

    def __init__(
        self, profile: GpuProfile, gpus: int, incarnation: int, noise: EmulationNoise
    ) -> None:
        self._profile = profile
        self.sent: list[WorkerToController] = []
        brain = WorkerBrain(
            [GpuInfo(g, profile.name, profile.pages, profile.page_bytes) for g in range(gpus)],
            list(profile.models),
            incarnation=incarnation,
            version="bench",
            host="bench",
            pid=1,
            device="emulated",
        )
        devices = {g: EmulatedGpu(profile, noise, gpu_id=g) for g in range(gpus)}
        self.stepper = Stepper(brain, devices, self._perform)

    def _perform(self, effect: Effect, now_ns: int) -> None:
        if isinstance(effect, ToController):
            self.sent.append(effect.message)
        elif isinstance(effect, PrepareModel):
            self.stepper.handle(
                prepare_emulated(self._profile, effect, now_ns=now_ns), now_ns=now_ns
            )


class Rig:
    """A scheduler and its workers. `gpus_per_worker` as in the simulator; `way_jitter_ns` is uniform."""

    def __init__(
        self,
        config: SchedulerConfig,
        profile: GpuProfile,
        *,
        gpus_per_worker: Sequence[int],
        way_jitter_ns: int = 0,
        exec_sigma: float = 0.0,
        check: bool = False,
        seed: int = 1,
    ) -> None:
        self.now_ns = _START_NS
        self.scheduler = Scheduler(
            config, worker_count=len(gpus_per_worker), incarnation=1, version="bench"
        )
        self._checker = InvariantChecker(self.scheduler) if check else None
        self.nodes = [
            _Node(profile, gpus, 100 + w, EmulationNoise(seed=seed + w, exec_sigma=exec_sigma))
            for w, gpus in enumerate(gpus_per_worker)
        ]
        self.parts = Parts()
        self._chance = random.Random(seed)
        self._jitter_ns = way_jitter_ns
        self._heap: list[tuple[int, int, int, object]] = []  # time, sequence, worker or kind, what
        self._seq = 0
        self._schedule_ns = 2**63
        self._node_due: list[int] = [2**63] * len(self.nodes)
        self._replies: dict[int, LoadModelReply] = {}
        self._request_id = 0
        self._to_scheduler(FromClient(_CLIENT, ClientHello(PROTOCOL_VERSION, 7, "bench")))
        self._push(self.now_ns, _BEAT, None)

    # ------------------------------------------------------------------------------- driving

    def load(self, name: str, copies: int, *, within_ns: int = 600 * NS_PER_S) -> list[int]:
        """Load instances until the reply; returns their ids. Raises RuntimeError if it fails."""
        self._request_id += 1
        wanted = self._request_id
        self._to_scheduler(FromClient(_CLIENT, LoadModelRequest(wanted, name, copies)))
        limit_ns = self.now_ns + within_ns
        while wanted not in self._replies and self.now_ns < limit_ns:
            self._advance()
        reply = self._replies.get(wanted)
        if reply is None or reply.code:
            raise RuntimeError(f"{name} was not loaded: {reply.reason if reply else 'no reply'}")
        return [model.model_id for model in reply.models]

    def offer(
        self,
        arrivals: Iterator[tuple[int, InferRequest]],
        seconds: float,
        into: Parts | None = None,
    ) -> Parts:
        """Offer `arrivals` (ns after now, in order) for `seconds`.

        Returns the costs of that time, added to those of `into` if that is given.
        """
        self.parts = parts = into if into is not None else Parts()
        start_ns = self.now_ns
        end_ns = start_ns + round(seconds * NS_PER_S)
        parts.virtual_ns += end_ns - start_ns
        following = next(arrivals, None)
        first = parts.requests
        cpu, real = process_time_ns(), perf_counter_ns()
        while following is not None:
            at_ns, message = start_ns + following[0], following[1]
            if at_ns >= end_ns:
                break
            while self._heap and self._heap[0][0] <= at_ns:
                self._advance()
            self.now_ns = at_ns
            begin = perf_counter_ns()
            self._to_scheduler(FromClient(_CLIENT, message))
            self._spent("handle request", begin)
            parts.requests += 1
            following = next(arrivals, None)
            if (parts.requests - first) % _WINDOW == 0:
                spent = process_time_ns() - cpu
                parts.windows_ns.append(spent / _WINDOW)
                parts.cpu_ns += spent
                cpu += spent
        while self._heap and self._heap[0][0] <= end_ns:
            self._advance()
        parts.cpu_ns += process_time_ns() - cpu
        parts.real_ns += perf_counter_ns() - real
        self.now_ns = end_ns
        return parts

    def _spent(self, part: str, begin: int) -> None:
        spent = self.parts.spent_ns
        spent[part] = spent.get(part, 0) + perf_counter_ns() - begin

    def _push(self, at_ns: int, kind: int, what: object) -> None:
        self._seq += 1
        heappush(self._heap, (at_ns, self._seq, kind, what))

    def _advance(self) -> None:
        self.now_ns, _seq, kind, what = heappop(self._heap)
        if kind == _SCHEDULE:
            if self._schedule_ns == self.now_ns:
                self._schedule()
        elif kind == _BEAT:
            self._to_scheduler(FromClient(_CLIENT, ClientHeartbeat(self.now_ns)))
            self._push(self.now_ns + NS_PER_S, _BEAT, None)
        elif kind == _RESULT:
            begin = perf_counter_ns()
            self._to_scheduler(what)  # type: ignore[arg-type]
            self._spent("handle result", begin)
        elif what is None:
            if self._node_due[kind] == self.now_ns:
                self._node_due[kind] = 2**63
                self._step(kind)
        else:
            begin = perf_counter_ns()
            event = FromController(b"controller", what)  # type: ignore[arg-type]
            self.nodes[kind].stepper.handle(event, now_ns=self.now_ns)
            self._spent("worker handle", begin)
            self._step(kind)

    # ---------------------------------------------------------------------------------- parts

    def _to_scheduler(self, event: SchedulerEvent) -> None:
        if self._checker is not None:
            self._checker.saw(event, now_ns=self.now_ns)
        self.scheduler.handle(event, now_ns=self.now_ns)
        self._arm(self.now_ns)

    def _arm(self, when_ns: int) -> None:
        when_ns = max(when_ns, self.now_ns)
        if when_ns < self._schedule_ns:
            self._schedule_ns = when_ns
            self._push(when_ns, _SCHEDULE, None)

    def _schedule(self) -> None:
        self._schedule_ns = 2**63
        begin = perf_counter_ns()
        effects = self.scheduler.schedule(now_ns=self.now_ns)
        self._spent("schedule", begin)
        if self._checker is not None:
            begin = perf_counter_ns()
            self._checker.check(effects, now_ns=self.now_ns)
            self._spent("check", begin)
        parts = self.parts
        for effect in effects:
            if isinstance(effect, ToWorker):
                self._push(self.now_ns + self._way_ns(), effect.worker_id, effect.message)
            elif isinstance(effect, RequestDone):
                record = effect.record
                parts.met += record.deadline_met
                parts.by_code[record.code] = parts.by_code.get(record.code, 0) + 1
            elif isinstance(effect, ActionDone):
                parts.actions += 1
            elif isinstance(effect, ToClient) and isinstance(effect.message, LoadModelReply):
                self._replies[effect.message.request_id] = effect.message
        begin = perf_counter_ns()
        wake_ns = self.scheduler.next_wakeup_ns()
        self._spent("next wakeup", begin)
        if wake_ns is not None:
            self._arm(wake_ns)

    def _way_ns(self) -> int:
        if not self._jitter_ns:
            return _WAY_NS
        return _WAY_NS + self._chance.randrange(self._jitter_ns)

    def _step(self, number: int) -> None:
        node = self.nodes[number]
        begin = perf_counter_ns()
        node.stepper.step(self.now_ns)
        self._spent("worker step", begin)
        for message in node.sent:
            self._push(self.now_ns + self._way_ns(), _RESULT, FromWorker(number, message))
        node.sent.clear()
        begin = perf_counter_ns()
        due_ns = node.stepper.next_due_ns()
        self._spent("worker due", begin)
        if due_ns is not None and due_ns < self._node_due[number]:
            self._node_due[number] = due_ns
            self._push(due_ns, number, None)


_SCHEDULE, _BEAT, _RESULT = -1, -2, -3


def poisson(
    models: Sequence[int], weights: Sequence[float], rate: float, slo_ns: int, *, seed: int = 1
) -> Iterator[tuple[int, InferRequest]]:
    """Endless Poisson arrivals at `rate`/s over `models` in proportion to `weights`.

    Their ids differ from those of every other seed.
    """
    chance = random.Random(seed)
    totals = list(accumulate(weights))
    at_ns, number = 0.0, seed * 10**9
    while True:
        batch = chance.choices(models, cum_weights=totals, k=256)
        for model in batch:
            at_ns += chance.expovariate(rate) * NS_PER_S
            number += 1
            yield round(at_ns), InferRequest(request_id=number, model_id=model, slo_ns=slo_ns)
