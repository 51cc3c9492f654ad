"""Drives a Scheduler by hand: facts in, effects out, with the workers' side spoken by the test."""

from __future__ import annotations

from typing import Any, TypeVar

from made_messages import a_welcome, an_infer_result
from slosched.config import SchedulerConfig
from slosched.core.invariants import InvariantChecker
from slosched.core.scheduler.interface import (
    Effect,
    Event,
    FromClient,
    FromWorker,
    RequestDone,
    RequestRecord,
    StatusAsked,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.values import Value
from slosched.daemon.status import status_report
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    ControllerToClient,
    ControllerToWorker,
    GpuInfo,
    Infer,
    InferReply,
    InferRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    ModelInfo,
    Span,
    StatusReply,
    WorkerToController,
)
from slosched.units import NS_PER_MS

MS = NS_PER_MS
T0 = 10**18
EXEC_MS = {1: 2.0, 2: 3.0, 4: 5.0, 8: 9.0}

C = TypeVar("C", bound=ControllerToClient)
W = TypeVar("W", bound=ControllerToWorker)


class Rig:
    """One scheduler; time moves only when the test says so. Invariants are checked all along."""

    def __init__(
        self, config: SchedulerConfig | None = None, *, workers: int = 1, **more: Any
    ) -> None:
        self.now_ns = T0
        self.scheduler = Scheduler(
            config or SchedulerConfig(),
            worker_count=workers,
            incarnation=1,
            version="test",
            **more,
        )
        self.checker = InvariantChecker(self.scheduler)
        self.effects: list[Effect] = []
        self._request_id = 0
        self._values_made = 0
        self._sessions: dict[int, int] = {}

    # --------------------------------------------------------------------------- plumbing

    def _input(self, size: int) -> Value | None:
        """An input of `size` bytes, as a shell would name it."""
        self._values_made += size > 0
        return Value(self._values_made, size) if size else None

    def handle(self, event: Event) -> None:
        self.checker.saw(event, now_ns=self.now_ns)
        self.scheduler.handle(event, now_ns=self.now_ns)

    def step(self, at_ms: float | None = None) -> list[Effect]:
        """Schedule once, at T0 + `at_ms` if given."""
        if at_ms is not None:
            self.now_ns = T0 + round(at_ms * MS)
        effects = self.scheduler.schedule(now_ns=self.now_ns)
        self.checker.check(effects, now_ns=self.now_ns)
        self.effects.extend(effects)
        for asked in effects:
            if isinstance(asked, StatusAsked):  # as the controller's shell does
                report = status_report(self.scheduler, now_ns=self.now_ns, brief=asked.brief)
                self.effects.append(ToClient(asked.client, StatusReply(asked.request_id, report)))
        return effects

    def steps(self) -> None:
        """Schedule until no work in slices is left."""
        self.step()
        for _ in range(10_000):
            if not self.scheduler.slicing:
                return
            self.step()
        raise AssertionError("the work in slices does not end")

    def to_client(self, kind: type[C]) -> list[C]:
        """Every message of `kind` sent to clients so far."""
        sent = [e.message for e in self.effects if isinstance(e, ToClient)]
        return [message for message in sent if isinstance(message, kind)]

    def to_worker(self, kind: type[W], worker_id: int | None = None) -> list[W]:
        sent = [
            e.message
            for e in self.effects
            if isinstance(e, ToWorker) and worker_id in (None, e.worker_id)
        ]
        return [message for message in sent if isinstance(message, kind)]

    def records(self) -> list[RequestRecord]:
        return [e.record for e in self.effects if isinstance(e, RequestDone)]

    # --------------------------------------------------------------------------- clients

    def hello(
        self, client: bytes = b"c", incarnation: int = 1, protocol: int = PROTOCOL_VERSION
    ) -> None:
        self.handle(FromClient(client, ClientHello(protocol, incarnation, client.decode())))

    def infer(
        self,
        model: ModelInfo | int = 0,
        *,
        slo_ms: float = 0.0,
        factor: float = 0.0,
        client: bytes = b"c",
        request_id: int | None = None,
        shape: tuple[int, ...] = (),
        dtype: str = "",
        input_bytes: int = 0,
        slo_ns: int | None = None,
    ) -> int:
        if request_id is None:
            self._request_id += 1
            request_id = self._request_id
        model_id = model if isinstance(model, int) else model.model_id
        message = InferRequest(
            request_id=request_id,
            model_id=model_id,
            slo_factor=factor,
            slo_ns=round(slo_ms * MS) if slo_ns is None else slo_ns,
            shape=shape,
            dtype=dtype,
        )
        self.handle(FromClient(client, message, self._input(input_bytes)))
        return request_id

    def reply(self, request_id: int) -> InferReply:
        found = [r for r in self.to_client(InferReply) if r.request_id == request_id]
        assert len(found) == 1, f"request {request_id} was answered {len(found)} times"
        return found[0]

    def answered(self, request_id: int) -> bool:
        return any(r.request_id == request_id for r in self.to_client(InferReply))

    # --------------------------------------------------------------------------- workers

    def from_worker(self, message: WorkerToController, worker_id: int = 0) -> None:
        self.handle(FromWorker(worker_id, message))

    def join(
        self,
        worker_id: int = 0,
        *,
        gpus: int = 1,
        pages: int = 100,
        session: int = 50,
        resident: tuple[int, ...] = (),
        put_aside: tuple[tuple[str, str], ...] = (),
    ) -> None:
        infos = tuple(GpuInfo(g, "gpu", pages, 2**24, resident) for g in range(gpus))
        self._sessions[worker_id] = session
        loadable = (
            tuple({"net", "other"} - {name for name, _ in put_aside}) if put_aside else ("net",)
        )
        self.from_worker(
            a_welcome(session, infos, loadable=loadable, put_aside=put_aside),
            worker_id,
        )
        self.step()

    def prepared(
        self, worker_id: int = 0, *, pages: int = 1, scale: float = 1.0, digest: str = ""
    ) -> None:
        """Answer every LoadModel that waits at the worker."""
        for action in self.to_worker(LoadModel, worker_id):
            self.from_worker(
                LoadModelResult(
                    session=self._sessions[worker_id],
                    action_id=action.action_id,
                    span=Span(0, 0, 0),
                    copies=action.copies,
                    batch_sizes=tuple(EXEC_MS),
                    exec_ns=tuple(round(ms * scale * MS) for ms in EXEC_MS.values()),
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
                    digest=digest,
                ),
                worker_id,
            )
        self.step()

    def weights_loaded(self, worker_id: int = 0, *, at_ms: float | None = None) -> int:
        """Report every LoadWeights that is outstanding at the worker; returns how many."""
        count = 0
        for _ in range(100):
            waiting = [
                a
                for a in self.to_worker(LoadWeights, worker_id)
                if a.action_id in self.scheduler.cluster.actions
            ]
            if not waiting:
                return count
            for action in waiting:
                end_ns = self.now_ns
                self.from_worker(
                    LoadWeightsResult(
                        action.session,
                        action.action_id,
                        span=Span(end_ns - 8 * MS, end_ns, 8 * MS),
                        received_ns=end_ns,
                        sent_ns=end_ns,
                    ),
                    worker_id,
                )
                count += 1
            self.step()
        raise AssertionError("loads never end")

    def load(
        self, copies: int = 1, *, client: bytes = b"c", pages: int = 1
    ) -> tuple[ModelInfo, ...]:
        """Load `net` through to resident weights on every joined worker; returns the instances."""
        self._request_id += 1
        request_id = self._request_id
        self.handle(FromClient(client, LoadModelRequest(request_id, "net", copies)))
        self.steps()
        for worker_id in self._sessions:
            self.prepared(worker_id, pages=pages)
        self.steps()
        for worker_id in self._sessions:
            self.weights_loaded(worker_id)
        self.steps()
        replies = [r for r in self.to_client(LoadModelReply) if r.request_id == request_id]
        assert replies, "the load was not answered"
        assert replies[0].code == 0, replies[0].reason
        return replies[0].models

    def outstanding(self, worker_id: int = 0) -> list[Infer]:
        return [
            a
            for a in self.to_worker(Infer, worker_id)
            if a.action_id in self.scheduler.cluster.actions
        ]

    def finish(self, infer: Infer, *, begin_ms: float, worker_id: int = 0) -> None:
        """Report `infer` as run for its profiled time from T0 + `begin_ms`; handled now."""
        begin_ns = T0 + round(begin_ms * MS)
        duration_ns = round(EXEC_MS[infer.batch_size] * MS)
        span = Span(begin_ns, begin_ns + duration_ns, duration_ns)
        self.from_worker(
            an_infer_result(
                infer.session,
                infer.action_id,
                span,
                gpu_id=infer.gpu_id,
                received_ns=infer.earliest_ns,
                sent_ns=begin_ns + duration_ns,
            ),
            worker_id,
        )

    @classmethod
    def ready(
        cls,
        config: SchedulerConfig | None = None,
        *,
        gpus: int = 1,
        copies: int = 1,
        workers: int = 1,
        pages: int = 100,
        model_pages: int = 1,
    ) -> tuple[Rig, tuple[ModelInfo, ...]]:
        """A rig with its workers joined, a client, and `copies` of `net` loaded and resident."""
        rig = cls(config, workers=workers)
        rig.hello()
        for worker_id in range(workers):
            rig.join(worker_id, gpus=gpus, pages=pages, session=50 + worker_id)
        models = rig.load(copies, pages=model_pages)
        for worker in rig.scheduler.cluster.workers.values():
            # Exact paths: 0.5 ms there and 0.25 ms back, learnt from many samples.
            for _ in range(100):
                worker.transit.add(MS // 2)
                worker.returns.add(MS // 4)
        rig.effects.clear()
        return rig, models

    @classmethod
    def warm(
        cls, config: SchedulerConfig, *, copies: int = 1, gpus: int = 1
    ) -> tuple[Rig, tuple[int, ...]]:
        """A rig of a published policy, whose models were loaded by the demand of one lenient request each, and
        their ids. It is idle at T0 + 200 ms.
        """
        rig, models = cls.ready(config, copies=copies, gpus=gpus)
        ids = tuple(model.model_id for model in models)
        for model_id in ids:
            rig.infer(model_id, slo_ms=10_000)
        rig.step(0)
        rig.now_ns = T0 + 100 * MS
        rig.weights_loaded()
        begin_ms = 100.5
        while rig.outstanding():
            rig.now_ns = T0 + round((begin_ms + 2.25) * MS)
            rig.finish(rig.outstanding()[0], begin_ms=begin_ms)
            rig.step()
            begin_ms += 3
        rig.step(200)
        assert rig.scheduler.idle
        rig.effects.clear()
        return rig, ids
