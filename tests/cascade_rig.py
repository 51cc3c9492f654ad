"""A scheduler that serves a cascade "pair" of the programs "small" and "large", driven by hand."""

from __future__ import annotations

from typing import Any

from made_messages import a_heartbeat, a_welcome, an_error, an_infer_result
from scheduler_rig import EXEC_MS, MS, T0, Rig
from slosched.cascade_spec import CascadeOptions, CascadeSpec, QualityCurve, ScoreCurve, StageSpec
from slosched.codes import Code, Verdict
from slosched.config import SchedulerConfig
from slosched.core.scheduler.cascades import Cascade
from slosched.core.scheduler.interface import FromClient, StageDone, StageRecord
from slosched.messages import (
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
    ModelInfo,
    Span,
)

LIGHT_MS = EXEC_MS
HEAVY_MS = {1: 20.0, 2: 30.0, 4: 50.0, 8: 90.0}
SLO_MS = 200


def pair(**changes: Any) -> CascadeSpec:
    """The cascade: live scores, threshold 0.5, 2 ms before 20 ms, SLO 200 ms."""
    values: dict[str, Any] = {
        "name": "pair",
        "light": StageSpec("small", {b: round(ms * MS) for b, ms in LIGHT_MS.items()}),
        "heavy": StageSpec("large", {b: round(ms * MS) for b, ms in HEAVY_MS.items()}),
        "slo_ns": SLO_MS * MS,
        "scores": ScoreCurve((0.0, 1.0), (0.0, 1.0)),
        "quality": QualityCurve((0.0, 0.5, 1.0), (18.0, 16.0, 22.0)),
        "live_scores": True,
    }
    return CascadeSpec(**{**values, **changes})


class CascadeRig(Rig):
    """`gpus` of one worker each; both programs fit. With `load` the cascade is loaded by client c."""

    def __init__(
        self,
        policy: str = "INFER5",
        spec: CascadeSpec | None = None,
        *,
        workers: int = 1,
        load: bool = True,
        options: CascadeOptions | None = None,
        more: tuple[CascadeSpec, ...] = (),
        **config: Any,
    ) -> None:
        super().__init__(
            SchedulerConfig(
                policy=policy,
                cascades=(spec or pair(), *more),
                cascade=options or CascadeOptions(fixed_threshold=0.5),
                **config,
            ),
            workers=workers,
        )
        self._prepared: set[int] = set()  # actions that were answered
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.broken: dict[str, str] = {}  # what LoadModel of a program fails with
        #: With `preempt` the large program stops every so often, and the small one may interrupt it.
        self.boundary_ms = 5.0 if config.get("preempt") else 0.0
        self.hello()
        for worker_id in range(workers):
            self.join_pair(worker_id, session=50 + worker_id)
        if load:
            self.pair = self.load_named("pair")

    @property
    def cascade(self) -> Cascade:
        return self.scheduler.cluster.cascades.by_name["pair"]

    def join_pair(
        self, worker_id: int = 0, *, session: int, loadable: tuple[str, ...] = ("small", "large")
    ) -> None:
        self._sessions[worker_id] = session
        infos = (GpuInfo(0, "gpu", 100, 2**24, ()),)
        self.from_worker(a_welcome(session, infos, loadable=loadable), worker_id)
        self.step()

    def prepare_all(self) -> None:
        """Answer every LoadModel and LoadWeights that waits at a worker."""
        self.steps()
        for worker_id, session in self._sessions.items():
            for action in self.to_worker(LoadModel, worker_id):
                if action.session == session and action.action_id not in self._prepared:
                    self._prepared.add(action.action_id)
                    self._prepare(action, worker_id)
        self.steps()
        for worker_id, session in self._sessions.items():
            for load in self.to_worker(LoadWeights, worker_id):
                if load.session == session and load.action_id in self.scheduler.cluster.actions:
                    span = Span(self.now_ns - 8 * MS, self.now_ns, 8 * MS)
                    result = LoadWeightsResult(
                        session,
                        load.action_id,
                        span=span,
                        received_ns=self.now_ns,
                        sent_ns=self.now_ns,
                    )
                    self.from_worker(result, worker_id)
        self.steps()

    def beat(self) -> None:
        """Every worker gives a sign of life."""
        for worker_id, session in self._sessions.items():
            self.from_worker(a_heartbeat(session, self.now_ns), worker_id)

    def evict_all(self) -> None:
        """Report every EvictWeights that waits at a worker."""
        for worker_id, session in self._sessions.items():
            for each in self.to_worker(EvictWeights, worker_id):
                if each.action_id in self.scheduler.cluster.actions:
                    span = Span(self.now_ns, self.now_ns, 0)
                    done = EvictWeightsResult(
                        session,
                        each.action_id,
                        span=span,
                        received_ns=span.end_ns,
                        sent_ns=span.end_ns,
                    )
                    self.from_worker(done, worker_id)

    def _prepare(self, action: LoadModel, worker_id: int) -> None:
        if action.name in self.broken:
            reason = self.broken[action.name]
            error = an_error(action.session, action.action_id, Code.RUNTIME_ERROR, reason)
            self.from_worker(error, worker_id)
            return
        large = action.name == "large"
        times = HEAVY_MS if large else LIGHT_MS
        boundary_ns = round(self.boundary_ms * MS)
        self.from_worker(
            LoadModelResult(
                session=action.session,
                action_id=action.action_id,
                span=Span(0, 0, 0),
                copies=action.copies,
                batch_sizes=tuple(times),
                exec_ns=tuple(round(ms * MS) for ms in times.values()),
                weights_ns=8 * MS,
                weights_bytes=2**24,
                pages=1,
                input_shape=self.inputs.get(action.name, (4,)),
                input_dtype="float32",
                output_shape=self.outputs.get(action.name, (2,)),
                output_dtype="float32",
                random_weights=True,
                received_ns=self.now_ns,
                sent_ns=self.now_ns,
                boundaries_ns=(boundary_ns,) * len(times) if boundary_ns and large else (),
                urgent_ns=0 if large or not boundary_ns else round(max(times.values()) * MS),
            ),
            worker_id,
        )

    def ask_to_load(self, name: str, copies: int = 1, client: bytes = b"c") -> LoadModelReply:
        """Load `name` to its end; returns the one reply."""
        self._request_id += 1
        request_id = self._request_id
        self.handle(FromClient(client, LoadModelRequest(request_id, name, copies)))
        for _ in range(4):
            self.prepare_all()
        replies = [r for r in self.to_client(LoadModelReply) if r.request_id == request_id]
        assert len(replies) == 1, f"one load was answered {len(replies)} times"
        return replies[0]

    def load_named(self, name: str, client: bytes = b"c") -> ModelInfo:
        reply = self.ask_to_load(name, client=client)
        assert reply.code == Code.OK, reply.reason
        return reply.models[0]

    def ask(self, *, slo_ms: float = 0, user_id: int = 0, client: bytes = b"c") -> int:
        """A request for the cascade, sent on at once if that can be."""
        self._request_id += 1
        message = InferRequest(
            request_id=self._request_id,
            model_id=self.pair.model_id,
            slo_ns=round(slo_ms * MS),
            user_id=user_id,
        )
        self.handle(FromClient(client, message))
        self.step()
        return self._request_id

    def waiting(self, program: str, worker_id: int | None = None) -> list[Infer]:
        """The Infers of `program` that no worker has reported yet."""
        return [
            each
            for each in self.to_worker(Infer, worker_id)
            if each.action_id in self.scheduler.cluster.actions
            and self.scheduler.cluster.actions[each.action_id].instance.name == program
        ]

    def run(self, program: str, *scores: float, until_ms: float | None = None) -> None:
        """Report the first waiting Infer of `program` as run; time moves to its end, or to `until_ms`."""
        infer = self.waiting(program)[0]
        action = self.scheduler.cluster.actions[infer.action_id]
        times = HEAVY_MS if program == "large" else LIGHT_MS
        duration_ns = round(times[infer.batch_size] * MS)
        begin_ns = max(self.now_ns, infer.earliest_ns)
        self.now_ns = begin_ns + duration_ns
        if until_ms is not None:
            self.now_ns = T0 + round(until_ms * MS)
        span = Span(begin_ns, begin_ns + duration_ns, duration_ns)
        result = an_infer_result(
            infer.session,
            infer.action_id,
            span,
            received_ns=begin_ns,
            sent_ns=span.end_ns,
            scores=scores,
        )
        self.from_worker(result, action.gpu.worker.worker_id)
        self.step()

    def verdicts(self, request_id: int) -> list[Verdict]:
        """Those of the stages that the answer tells of."""
        return [Verdict(stage.verdict) for stage in self.reply(request_id).stages]

    def stage_records(self) -> list[StageRecord]:
        return [each.record for each in self.effects if isinstance(each, StageDone)]
