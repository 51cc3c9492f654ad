"""One random cluster that two schedulers run in lockstep: the same facts, and each step's effects compared.

This file plays the workers: unequal GPUs, latencies and models, batches that fail or start too late,
workers that die and come back, requests that are cancelled. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from unittest.mock import patch

from made_messages import a_heartbeat, a_welcome, an_error, an_infer_result
from slosched.codes import Code
from slosched.config import SchedulerConfig, WeightRule
from slosched.core.invariants import InvariantChecker
from slosched.core.scheduler import policies
from slosched.core.scheduler.interface import (
    Effect,
    Event,
    FromClient,
    FromWorker,
    RequestDone,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.policies.base import Policy
from slosched.core.scheduler.scheduler import Scheduler
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    ControllerHello,
    EvictWeights,
    EvictWeightsResult,
    GpuInfo,
    Infer,
    InferRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    Span,
    WorkerToController,
)
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
T0 = 10**18


@dataclass(frozen=True)
class World:
    """What a cluster is like. `pages` per GPU; `speeds` of its workers; `slos_ms` drawn from evenly."""

    gpus: tuple[int, ...] = (2, 3)
    speeds: tuple[float, ...] = (1.0, 1.0)
    ways_us: tuple[int, ...] = (300, 300)
    jitter_us: int = 0
    sigma: float = 0.0
    names: tuple[tuple[str, float, int], ...] = (("net", 2.0, 1),)  # name, batch-1 ms, pages
    copies: int = 4
    skew: float = 0.0  # of arrivals over models: weight of the k-th is 1 / (k + 1) ** skew
    pages: int = 100
    rate: float = 1500.0
    bursts: float = 0.1  # share of arrivals that bring several at once
    slos_ms: tuple[float, ...] = (4.0, 8.0, 25.0, 60.0)
    failures: float = 0.0
    cancels: float = 0.0
    deaths_s: float = 0.0  # mean time between deaths of workers; 0: none
    max_batch: int = 16
    clients: tuple[tuple[str, float], ...] = (
        ("c", 1.0),
    )  # name, weight that it says; drawn evenly
    rules: tuple[WeightRule, ...] = ()
    client_weights: str = "value"


class Twins:
    """Runs `World` for a while under two policies and fails at the first difference."""

    def __init__(
        self,
        world: World,
        seed: int,
        first: type[Policy],
        second: type[Policy],
        *,
        check: bool = True,
    ) -> None:
        self.world = world
        self.chance = random.Random(seed)
        config = SchedulerConfig(
            max_batch=world.max_batch,
            max_exec_ns=NS_PER_S,
            schedule_ahead_ns=5 * MS,
            weights=world.rules,
            max_client_weight=100.0,
            client_weights=world.client_weights,
        )
        self.twins: list[Scheduler] = []
        for policy in (first, second):
            table: Mapping[str, Mapping[str, type[Policy]]] = {"INFER5": {"best": policy}}
            with patch.object(policies, "POLICIES", table):
                self.twins.append(
                    Scheduler(config, worker_count=len(world.gpus), incarnation=1, version="t")
                )
        self.checker = InvariantChecker(self.twins[0]) if check else None
        self.now_ns = T0
        self.codes: dict[int, int] = {}
        self.models: list[int] = []
        self.steps = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._seq = 0
        self._due_ns: int | None = None
        self._request_id = 0
        self._open: list[int] = []  # request ids that were not answered yet
        self._session = [50 + w * 1000 for w in range(len(world.gpus))]
        self._alive = [True] * len(world.gpus)
        self._free_ns: dict[tuple[int, int, str], int] = {}  # worker, GPU, lane
        self._table = {
            name: {b: round(ms * MS * b**0.72) for b in (1, 2, 4, 8, 16)}
            for name, ms, _ in world.names
        }
        self._name_of: dict[int, str] = {}
        self._clients = [name.encode() for name, _ in world.clients]
        self._sender: dict[int, bytes] = {}  # of each request, by its id
        for name, weight in world.clients:
            self.tell(FromClient(name.encode(), ClientHello(PROTOCOL_VERSION, 1, name, weight)))
        self._each_s(self._client_beats, NS_PER_S)
        self._each_s(self._workers_beat, NS_PER_S // 5)
        self._load()

    # ------------------------------------------------------------------------------ the loop

    def at(self, when_ns: int, do: Callable[[], None]) -> None:
        self._seq += 1
        heappush(self._heap, (max(when_ns, self.now_ns), self._seq, do))

    def _each_s(self, do: Callable[[], None], every_ns: int) -> None:
        def again() -> None:
            do()
            self.at(self.now_ns + every_ns, again)

        again()

    def run(self, seconds: float) -> None:
        """Offer load for `seconds`, then wait until all is answered."""
        end_ns = self.now_ns + round(seconds * NS_PER_S)
        self._arrivals(end_ns)
        if self.world.deaths_s:
            self._deaths(end_ns)
        self._until(end_ns)
        while not self.twins[0].idle and self.now_ns < end_ns + 2 * NS_PER_S:
            self._until(self.now_ns + NS_PER_S // 10)
        assert self.twins[0].idle, "requests were never answered"

    def _until(self, end_ns: int) -> None:
        while self._heap and self._heap[0][0] <= end_ns:
            self.now_ns, _, do = heappop(self._heap)
            do()
        self.now_ns = end_ns

    def tell(self, event: Event) -> None:
        """A fact reaches both schedulers; they schedule once all facts of this instant came."""
        if self.checker is not None:
            self.checker.saw(event, now_ns=self.now_ns)
        for scheduler in self.twins:
            scheduler.handle(event, now_ns=self.now_ns)
        self._arm(self.now_ns)

    def _arm(self, when_ns: int) -> None:
        if self._due_ns is None or when_ns < self._due_ns:
            self._due_ns = due_ns = max(when_ns, self.now_ns)
            self.at(due_ns, lambda: self._schedule(due_ns))

    def _schedule(self, due_ns: int) -> None:
        if self._due_ns != due_ns:
            return
        self._due_ns = None
        self.steps += 1
        ours, theirs = (s.schedule(now_ns=self.now_ns) for s in self.twins)
        assert ours == theirs, self._difference(ours, theirs)
        if self.checker is not None:
            self.checker.check(ours, now_ns=self.now_ns)
        for effect in ours:
            self._perform(effect)
        wakeups = [s.next_wakeup_ns() for s in self.twins]
        assert wakeups[0] == wakeups[1], f"step {self.steps}: wake-ups at {wakeups}"
        if wakeups[0] is not None:
            self._arm(wakeups[0])

    def _difference(self, ours: list[Effect], theirs: list[Effect]) -> str:
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
        first = f"{pairs[0][0]}\n{pairs[0][1]}" if pairs else f"{len(ours)} against {len(theirs)}"
        return f"step {self.steps} at {(self.now_ns - T0) / MS} ms:\n{first}"

    # ------------------------------------------------------------------------------ arrivals

    def _load(self) -> None:
        for name, _, _ in self.world.names:
            self._request_id += 1
            message = LoadModelRequest(self._request_id, name, self.world.copies)
            self.tell(FromClient(self._clients[0], message))
        wanted = len(self.world.names) * self.world.copies
        while len(self.models) < wanted and self.now_ns < T0 + 20 * NS_PER_S:
            self._until(self.now_ns + NS_PER_S // 10)
        assert len(self.models) == wanted

    def _arrivals(self, end_ns: int) -> None:
        weights = [1 / (k + 1) ** self.world.skew for k in range(len(self.models))]

        def arrive() -> None:
            count = self.chance.randint(2, 12) if self.chance.random() < self.world.bursts else 1
            model = self.chance.choices(self.models, weights)[0]
            for _ in range(count):
                self._request_id += 1
                slo_ns = round(self.chance.choice(self.world.slos_ms) * MS)
                message = InferRequest(request_id=self._request_id, model_id=model, slo_ns=slo_ns)
                self._open.append(self._request_id)
                self.tell(FromClient(self._sends(), message))
            if self._open and self.chance.random() < self.world.cancels:
                victim = self.chance.choice(self._open[-20:])
                self.tell(FromClient(self._sender[victim], CancelRequest(victim)))
            following_ns = self.now_ns + round(self.chance.expovariate(self.world.rate) * NS_PER_S)
            if following_ns < end_ns:
                self.at(following_ns, arrive)

        self.at(self.now_ns, arrive)

    def _sends(self) -> bytes:
        """Who sends the request that is being made."""
        clients = self._clients
        client = clients[0] if len(clients) == 1 else self.chance.choice(clients)
        self._sender[self._request_id] = client
        return client

    def _deaths(self, end_ns: int) -> None:
        def die() -> None:
            worker = self.chance.randrange(len(self._alive))
            self._alive[worker] = False
            self.at(self.now_ns + round(self.chance.uniform(0.1, 1.5) * NS_PER_S), revive(worker))
            following = self.chance.expovariate(1 / self.world.deaths_s) * NS_PER_S
            if self.now_ns + following < end_ns - NS_PER_S:
                self.at(self.now_ns + round(following), die)

        def revive(worker: int) -> Callable[[], None]:
            def back() -> None:
                if not self._alive[worker]:
                    self._alive[worker] = True
                    self._session[worker] += 1
                    self._free_ns = {k: v for k, v in self._free_ns.items() if k[0] != worker}
                    self._welcome(worker)

            return back

        self.at(self.now_ns + round(self.world.deaths_s * NS_PER_S / 2), die)

    def _client_beats(self) -> None:
        for client in self._clients:
            self.tell(FromClient(client, ClientHeartbeat(self.now_ns)))

    # ------------------------------------------------------------------------------- effects

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, ToWorker):
            worker, message = effect.worker_id, effect.message
            session = self._session[worker]
            self.at(
                self.now_ns + self._way_ns(worker),
                lambda: self._receive(worker, session, message),
            )
        elif isinstance(effect, RequestDone):
            record = effect.record
            self.codes[record.code] = self.codes.get(record.code, 0) + 1
            self._open.remove(record.request_id)
        elif isinstance(effect, ToClient) and isinstance(effect.message, LoadModelReply):
            assert effect.message.code == 0, effect.message.reason
            self.models.extend(m.model_id for m in effect.message.models)

    def _way_ns(self, worker: int) -> int:
        jitter_us = self.chance.uniform(0, self.world.jitter_us) if self.world.jitter_us else 0
        return round((self.world.ways_us[worker] + jitter_us) * 1000)

    def _answer(self, worker: int, at_ns: int, message: WorkerToController) -> None:
        """Unless the process dies before, `message` leaves at `at_ns`."""
        session = self._session[worker]

        def leave() -> None:
            if self._alive[worker] and self._session[worker] == session:
                arrival_ns = self.now_ns + self._way_ns(worker)
                self.at(arrival_ns, lambda: self.tell(FromWorker(worker, message)))

        self.at(at_ns, leave)

    # ------------------------------------------------------------------------------- workers

    def _welcome(self, worker: int) -> None:
        gpus = tuple(
            GpuInfo(g, "gpu", self.world.pages, 2**24) for g in range(self.world.gpus[worker])
        )
        names = tuple(name for name, _, _ in self.world.names)
        message = a_welcome(self._session[worker], gpus, version="t", host="host", loadable=names)
        self._answer(worker, self.now_ns, message)

    def _workers_beat(self) -> None:
        for worker in range(len(self._alive)):
            beat = a_heartbeat(self._session[worker], self.now_ns, clock_error_ns=100_000)
            self._answer(worker, self.now_ns, beat)

    def _receive(self, worker: int, session: int, message: object) -> None:
        if not self._alive[worker]:
            return
        if isinstance(message, ControllerHello):
            self._welcome(worker)
        elif session != self._session[worker]:
            return
        elif isinstance(message, LoadModel):
            self._prepare(worker, message)
        elif isinstance(message, LoadWeights):
            duration_ns = round(8 * MS * self.chance.uniform(0.9, 1.1))
            span = self._occupy((worker, message.gpu_id, "weights"), duration_ns)
            if self.chance.random() < self.world.failures:
                self._fail(worker, span.end_ns, message, Code.RUNTIME_ERROR)
                return
            result = LoadWeightsResult(
                message.session,
                message.action_id,
                span=span,
                received_ns=self.now_ns,
                sent_ns=span.end_ns,
            )
            self._answer(worker, span.end_ns, result)
        elif isinstance(message, EvictWeights):
            span = Span(self.now_ns, self.now_ns, 0)
            evicted = EvictWeightsResult(
                message.session,
                message.action_id,
                span=span,
                received_ns=self.now_ns,
                sent_ns=self.now_ns,
            )
            self._answer(worker, self.now_ns, evicted)
        elif isinstance(message, Infer):
            self._infer(worker, message)

    def _occupy(self, lane: tuple[int, int, str], duration_ns: int) -> Span:
        begin_ns = max(self.now_ns, self._free_ns.get(lane, 0))
        self._free_ns[lane] = begin_ns + duration_ns
        return Span(begin_ns, begin_ns + duration_ns, duration_ns)

    def _infer(self, worker: int, infer: Infer) -> None:
        lane = (worker, infer.gpu_id, "exec")
        begin_ns = max(self.now_ns, self._free_ns.get(lane, 0))
        if begin_ns > infer.latest_ns:
            self._fail(worker, begin_ns, infer, Code.EXEC_TOO_LATE)
            return
        if self.chance.random() < self.world.failures:
            self._fail(worker, begin_ns, infer, Code.RUNTIME_ERROR)
            return
        table = self._table[self._name_of[infer.model_id]]
        noise = max(0.5, self.chance.gauss(1.0, self.world.sigma)) if self.world.sigma else 1.0
        duration_ns = round(table[infer.batch_size] * self.world.speeds[worker] * noise)
        span = self._occupy(lane, duration_ns)
        result = an_infer_result(
            infer.session,
            infer.action_id,
            span,
            gpu_id=infer.gpu_id,
            received_ns=self.now_ns,
            sent_ns=span.end_ns,
        )
        self._answer(worker, span.end_ns, result)

    def _fail(self, worker: int, at_ns: int, action: Infer | LoadWeights, code: int) -> None:
        error = an_error(
            action.session,
            action.action_id,
            int(code),
            "made up",
            received_ns=self.now_ns,
            sent_ns=at_ns,
        )
        self._answer(worker, at_ns, error)

    def _prepare(self, worker: int, action: LoadModel) -> None:
        table = self._table[action.name]
        pages = next(pages for name, _, pages in self.world.names if name == action.name)
        for model_id in range(action.model_id, action.model_id + action.copies):
            self._name_of[model_id] = action.name
        batches = tuple(b for b in table if b <= action.max_batch)
        result = LoadModelResult(
            session=action.session,
            action_id=action.action_id,
            span=Span(0, 0, 0),
            copies=action.copies,
            batch_sizes=batches,
            exec_ns=tuple(round(table[b] * self.world.speeds[worker]) for b in batches),
            weights_ns=8 * MS,
            weights_bytes=pages * 2**24,
            pages=pages,
            input_shape=(4,),
            input_dtype="float32",
            output_shape=(2,),
            output_dtype="float32",
            random_weights=True,
            received_ns=self.now_ns,
            sent_ns=self.now_ns,
        )
        self._answer(worker, self.now_ns, result)
