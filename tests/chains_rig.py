"""A Scheduler that serves functions, driven by hand: the worker's side of each call is spoken by the test."""

from __future__ import annotations

from typing import Any, TypeVar

from made_messages import a_heartbeat, a_welcome, an_error
from scheduler_rig import MS, T0, Rig
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import (
    CallDone,
    CallPart,
    CallPartDone,
    CallRecord,
    FromClient,
    FromWorker,
    ToClient,
    ToWorker,
)
from slosched.core.values import Value
from slosched.messages import (
    NO_SPAN,
    Call,
    CallResult,
    CallResumed,
    CallSuspended,
    CancelCall,
    CancelRequest,
    ChildCancel,
    ChildReply,
    ChildRequest,
    ClientHeartbeat,
    FunctionInfo,
    GpuInfo,
    InferRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    ModelInfo,
    Prepared,
    Span,
    WorkerToController,
)

SECOND = 1000 * MS
SENT = TypeVar("SENT")


def prepared(action: LoadModel, session: int, now_ns: int, info: FunctionInfo) -> LoadModelResult:
    """A function that is expected to run for 1 ms, and to be ready after 8 ms."""
    return LoadModelResult(
        session=session,
        action_id=action.action_id,
        span=Span(0, 0, 0),
        copies=1,
        batch_sizes=(1,),
        exec_ns=(MS,),
        weights_ns=8 * MS,
        weights_bytes=0,
        pages=0,
        input_shape=(),
        input_dtype="",
        output_shape=(),
        output_dtype="",
        random_weights=False,
        received_ns=now_ns,
        sent_ns=now_ns,
        function=info,
    )


def brought(name: str, model_id: int, info: FunctionInfo) -> Prepared:
    """An instance that a worker prepared for an earlier controller of the cluster."""
    action = LoadModel(
        1,
        1,
        name=name,
        model_id=model_id,
        copies=1,
        max_batch=16,
        max_exec_ns=25 * MS,
        earliest_ns=0,
        latest_ns=0,
    )
    return Prepared(
        name=name,
        runs=((model_id, 1),),
        max_batch=16,
        max_exec_ns=25 * MS,
        result=prepared(action, 1, 0, info),
    )


class CallRig(Rig):
    """Each worker offers `functions` beside the model "net", on one host of `slots` and `gpus` GPUs."""

    def __init__(
        self,
        functions: dict[str, FunctionInfo],
        *,
        workers: int = 1,
        slots: int = 1,
        gpus: int = 0,
        config: SchedulerConfig | None = None,
        **more: Any,
    ) -> None:
        super().__init__(config, workers=workers, **more)
        self.functions, self.slots, self.gpus = functions, slots, gpus
        self.hello()

    # --------------------------------------------------------------------------- workers

    def enter(
        self,
        worker_id: int = 0,
        *,
        resident: bool = True,
        prepares: tuple[str, ...] | None = None,
        brings: int = -1,
    ) -> None:
        """The worker joins, its functions (those of `prepares`) are prepared, and ready if `resident`.

        It has the function "f" ready as instance `brings` (-1: it has none). Paths are 0.5 and 0.25 ms.
        """
        session = 50 + worker_id
        self._sessions[worker_id] = session
        gpus = [GpuInfo(g, "gpu", 100, 2**24) for g in range(self.gpus)]
        there = (brings,) if brings >= 0 else ()
        host = GpuInfo(self.gpus, "host", 100, 2**24, there, slots=self.slots, host=True)
        names = tuple(sorted(self.functions))
        inventory = (brought("f", brings, self.functions["f"]),) if there else ()
        welcome = a_welcome(
            session,
            (*gpus, host),
            loadable=(*names, "net"),
            functions=names,
            inventory=inventory,
        )
        self.from_worker(welcome, worker_id)
        self.steps()
        for name in names if prepares is None else prepares:
            self.prepare(name, worker_id)
        worker = self.scheduler.cluster.workers[worker_id]
        for _ in range(100):
            worker.transit.add(MS // 2)
            worker.returns.add(MS // 4)
        if resident:
            self.weights_loaded(worker_id)
        self.steps()

    def prepare(self, name: str, worker_id: int = 0) -> None:
        """The worker answers each LoadModel of `name`."""
        for action in self.to_worker(LoadModel, worker_id):
            if action.name == name:
                info, session = self.functions[name], self._sessions[worker_id]
                self.from_worker(prepared(action, session, self.now_ns, info), worker_id)
        self.steps()

    @classmethod
    def serving(cls, *functions: str, **more: Any) -> CallRig:
        """Its workers have joined, and have their functions ready."""
        info = FunctionInfo(**more.pop("info", {}))
        infos = dict.fromkeys(functions or ("f",), info)
        rig = cls(infos, **more)
        for worker_id in range(more.get("workers", 1)):
            rig.enter(worker_id)
        rig.effects.clear()
        return rig

    def load_beside(self) -> tuple[ModelInfo, ...]:
        """Load the model "net", which the workers offer beside their functions."""
        self._request_id += 1
        self.handle(FromClient(b"c", LoadModelRequest(self._request_id, "net", 1)))
        self.steps()
        for worker_id in self._sessions:
            self.prepared(worker_id)
        self.steps()
        for worker_id in self._sessions:
            self.weights_loaded(worker_id)
        self.steps()
        (reply,) = self.to_client(LoadModelReply)
        return reply.models

    def outstanding_calls(self, worker_id: int | None = None) -> list[Call]:
        """Calls that were sent and not reported, in the order sent."""
        known = self.scheduler.cluster.actions
        return [call for call in self.to_worker(Call, worker_id) if call.action_id in known]

    def one(self, worker_id: int | None = None) -> Call:
        (call,) = self.outstanding_calls(worker_id)
        return call

    def worker_of(self, call: Call) -> int:
        sent = [e for e in self.effects if isinstance(e, ToWorker) and e.message is call]
        return sent[0].worker_id

    def tell(self, message: WorkerToController, worker_id: int, size: int = 0) -> None:
        """A worker's message, with a frame of `size` bytes behind it (0: none)."""
        self.handle(FromWorker(worker_id, message, (self.value(size),) if size else ()))

    def value(self, size: int) -> Value:
        self._values_made += 1
        return Value(self._values_made, size)

    # ---------------------------------------------------------------- what a running call says

    def result(self, call: Call, *, ran_ms: float = 1.0, size: int = 8, children: int = 0) -> None:
        """It ran for `ran_ms` until 0.25 ms ago."""
        end_ns = self.now_ns - MS // 4
        begin_ns = end_ns - round(ran_ms * MS)
        message = CallResult(
            call.session,
            call.action_id,
            gpu_id=call.gpu_id,
            exec=Span(begin_ns, end_ns, end_ns - begin_ns),
            output_sizes=(size,),
            children=children,
            received_ns=call.earliest_ns + MS // 2,
            sent_ns=end_ns,
        )
        self.tell(message, self.worker_of(call), size)

    def error(self, call: Call, code: int, reason: str = "why", *, ran_ms: float = 0) -> None:
        """It came to nothing, after it had run for `ran_ms` until 0.25 ms ago (0: that is not told)."""
        end_ns, ran_ns = self.now_ns - MS // 4, round(ran_ms * MS)
        more = {"received_ns": call.earliest_ns + MS // 2, "sent_ns": end_ns, "action_type": 7}
        part = Span(end_ns - ran_ns, end_ns, ran_ns) if ran_ns else NO_SPAN
        message = an_error(call.session, call.action_id, code, reason, part=part, **more)
        self.tell(message, self.worker_of(call))

    def suspend(self, call: Call, *children: int, ran_ms: float = 0.5) -> None:
        end_ns = self.now_ns - MS // 4
        part = Span(end_ns - round(ran_ms * MS), end_ns, round(ran_ms * MS))
        said = CallSuspended(call.session, call.action_id, part.duration_ns, part, children)
        self.tell(said, self.worker_of(call))

    def resume(self, call: Call) -> None:
        self.tell(CallResumed(call.session, call.action_id), self.worker_of(call))

    def chain(
        self, call: Call, child: int, function: str = "f", size: int = 0, **more: Any
    ) -> None:
        said = ChildRequest(
            call.session, call.action_id, child=child, function=function, input_size=size, **more
        )
        self.tell(said, self.worker_of(call), size)

    def child_request(self, call: Call, child: int, **more: Any) -> ChildRequest:
        """As `chain` sends it, and without what follows it."""
        return ChildRequest(call.session, call.action_id, child=child, function="f", **more)

    def returned(self, call: Call, *, began_ms: float, ran_ms: float, size: int = 8) -> None:
        """It returned 0.25 ms ago, began at `began_ms` and ran for `ran_ms` of that."""
        end_ns = self.now_ns - MS // 4
        message = CallResult(
            call.session,
            call.action_id,
            gpu_id=call.gpu_id,
            exec=Span(self.at(began_ms), end_ns, round(ran_ms * MS)),
            output_sizes=(size,),
            received_ns=call.earliest_ns + MS // 2,
            sent_ns=end_ns,
        )
        self.tell(message, self.worker_of(call), size)

    def take_back(self, call: Call, child: int) -> None:
        self.tell(ChildCancel(call.session, call.action_id, child), self.worker_of(call))

    def child_replies(self) -> list[ChildReply]:
        return self.to_worker(ChildReply)

    def cancels(self) -> list[int]:
        """The action ids of CancelCalls."""
        return [each.action_id for each in self.to_worker(CancelCall)]

    def wait(self, ms: float, *known: Call, preparing: int = 0) -> None:
        """`ms` pass in which client and worker 0 are there; that holds the calls `known`, and prepares some."""
        for _ in range(round(ms / 100)):
            self.handle(FromClient(b"c", ClientHeartbeat(0)))
            self.beat(calls=tuple(call.action_id for call in known), preparing=preparing)
            self.later(100)

    def beat(self, worker_id: int = 0, **more: Any) -> None:
        session = self._sessions[worker_id]
        self.from_worker(a_heartbeat(session, self.now_ns, **more), worker_id)

    # --------------------------------------------------------------------------- clients

    def id_of(self, function: str) -> int:
        models = self.scheduler.cluster.models.values()
        return next(model.model_id for model in models if model.name == function)

    def call(
        self, function: str = "f", *, slo_ms: float = 1000.0, size: int = 4, **more: Any
    ) -> int:
        """A client calls; returns its request id. Decided by the next step."""
        self._request_id += 1
        message = InferRequest(
            request_id=self._request_id,
            model_id=self.id_of(function),
            slo_ns=round(slo_ms * MS),
            **more,
        )
        self.handle(FromClient(b"c", message, self.value(size) if size else None))
        return self._request_id

    def cancel(self, request_id: int) -> None:
        self.handle(FromClient(b"c", CancelRequest(request_id)))

    # -------------------------------------------------------------------------- what came out

    def calls_done(self) -> list[CallRecord]:
        return [e.record for e in self.effects if isinstance(e, CallDone)]

    def parts_done(self) -> list[CallPart]:
        return [e.record for e in self.effects if isinstance(e, CallPartDone)]

    def output_of(self, request_id: int) -> Value | None:
        replies = [e for e in self.effects if isinstance(e, ToClient)]
        found = [e for e in replies if getattr(e.message, "request_id", -1) == request_id]
        return found[0].output

    def later(self, ms: float) -> None:
        """Let time pass, and decide."""
        self.now_ns += round(ms * MS)
        self.steps()

    def at(self, ms: float) -> int:
        return T0 + round(ms * MS)


def with_parent(*functions: str, **more: Any) -> tuple[CallRig, Call, int]:
    """A rig, a running call of "f" of a client, and its request id. Time is 1 ms."""
    rig = CallRig.serving(*functions, **more)
    request_id = rig.call()
    rig.step(0)
    call = rig.one()
    rig.now_ns += MS
    return rig, call, request_id


def others(rig: CallRig, *known: Call) -> list[Call]:
    """The calls that are outstanding, but for `known`."""
    return [each for each in rig.outstanding_calls() if each not in known]
