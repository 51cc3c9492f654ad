"""The worker's brain: what each GPU does, when, with the actions that the controller sent.

It takes in what arrives, checks it and puts it on the ledger; the pipeline (pipeline.py) carries it out.
Each accepted action is answered exactly once; an action of another session is dropped and counted.
The class is pure: it is told the time, and a shell (daemon/worker.py live, sim/ in virtual time) carries
its effects out. Times inside are on the worker's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from slosched.codes import Code
from slosched.config import HEARTBEAT_NS, canonical_model
from slosched.core.worker import results
from slosched.core.worker.checks import infer_fault, load_model_fault, window_fault
from slosched.core.worker.interface import (
    Effect,
    Event,
    FromController,
    ModelPrepared,
    Note,
    OpDone,
    ToController,
    WeightsLost,
)
from slosched.core.worker.ledger import Ledger
from slosched.core.worker.link import HelloOutcome, Identity, Link
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import GpuState, Instance, PendingAction
from slosched.messages import (
    PROTOCOL_VERSION,
    Action,
    ClearCache,
    ControllerHello,
    EvictWeights,
    GetWorkerState,
    GpuInfo,
    GpuStats,
    Heartbeat,
    HeartbeatAck,
    Infer,
    LoadModel,
    LoadWeights,
    UnloadModel,
    WorkerGoodbye,
    WorkerRefused,
    WorkerWelcome,
)
from slosched.units import NS_PER_MS, NS_PER_S

#: Inputs may be copied this long before the exec may start (Clockwork, worker_api: 5 ms).
COPY_INPUT_LEAD_NS = 5 * NS_PER_MS
#: A controller that is refused is told of this often.
_REFUSAL_EVERY_NS = 60 * NS_PER_S


class WorkerBrain:
    """Decides for `gpus`; `loadable` are the canonical names of models that can be prepared, less those of
    `put_aside` (name, reason), which are refused with the reason.

    `incarnation` is random, one per process start. A shell counts what it could not decode through
    `note_bad_message`.
    """

    def __init__(
        self,
        gpus: Sequence[GpuInfo],
        loadable: Sequence[str],
        *,
        incarnation: int,
        version: str,
        host: str,
        pid: int,
        device: str,
        allow_zero_size_inputs: bool = True,
        heartbeat_ns: int = HEARTBEAT_NS,
        put_aside: Sequence[tuple[str, str]] = (),
    ) -> None:
        names = tuple(sorted(set(loadable) - {name for name, _ in put_aside}))
        self._identity = Identity(incarnation, version, host, pid, device, names, tuple(put_aside))
        self._link = Link(incarnation, heartbeat_ns=heartbeat_ns)
        self._ledger = Ledger(gpus, self._link)
        self._pipeline = Pipeline(self._ledger, names)
        self._allow_zero_size_inputs = allow_zero_size_inputs
        self._closing = False
        self._refusal_due_ns = 0
        self._lost = ""
        self._gpu_stats: tuple[GpuStats, ...] = ()
        self._stats_are_new = False
        self.dropped = 0  # stale, malformed and oversized messages

    def arm_ahead(self, gpu_id: int, ahead_ns: int) -> None:
        """The device of this GPU takes each EXEC `ahead_ns` before its time and starts it itself."""
        self._ledger.gpus[gpu_id].exec.ahead_ns = ahead_ns

    def skip_empty_copies(self, gpu_ids: Collection[int]) -> None:
        """The devices of these GPUs need not be asked for copies of nothing."""
        for gpu_id, gpu in self._ledger.gpus.items():
            gpu.free_copies = gpu_id in gpu_ids

    # ------------------------------------------------------------------------- three verbs

    def handle(self, event: Event, *, now_ns: int) -> int | None:
        """Take in a fact. For an action that now waits or runs, returns its key.

        Effects and ops name the action by that key (`action_id` there); the shell keeps the frames
        that came behind the message under it until DropInputs, or until they were copied. None:
        nothing will ask for the frames.
        """
        if self._lost and not isinstance(event, FromController):
            return None  # of a device whose work was given up
        if isinstance(event, OpDone):
            self._pipeline.op_done(event, now_ns)
            return None
        if isinstance(event, ModelPrepared):
            self._pipeline.prepared(event, now_ns)
            return None
        if isinstance(event, WeightsLost):
            self._weights_lost(event)
            return None
        message = event.message
        if isinstance(message, HeartbeatAck):
            if not self._link.acknowledge(event.peer, message, now_ns=now_ns):
                self.dropped += 1
            return None
        if isinstance(message, ControllerHello):
            self._hello(event.peer, message, now_ns)
            return None
        return self._accept(event, message, now_ns)

    def schedule(self, *, now_ns: int) -> list[Effect]:
        """Start everything whose time has come; returns what the shell must do, in order."""
        if self._lost:
            return self._ledger.take_effects()
        if self._link.handing_over and self.idle:
            self._open_session(now_ns)
        self._pipeline.run_due(now_ns)
        if self._link.session is not None and self._link.due_ns <= now_ns:
            self._heartbeat(now_ns)
        return self._ledger.take_effects()

    def next_wakeup_ns(self) -> int | None:
        """When `schedule` has something to do next, if no event comes before."""
        wake_ns = self._pipeline.next_wakeup_ns()
        if self._link.session is None:
            return wake_ns
        heartbeat_ns = self._link.due_ns
        return heartbeat_ns if wake_ns is None or heartbeat_ns < wake_ns else wake_ns

    # ------------------------------------------------------------------------------ the end

    def shutdown(self, *, now_ns: int) -> None:
        """Say goodbye, hand back what is queued (code 1), refuse what still comes (3); what runs may end."""
        self._closing = True
        if self._link.session is not None:
            goodbye = WorkerGoodbye(self._link.session)
            self._ledger.effects.append(ToController(self._link.peer, goodbye))
        self._pipeline.close()
        self._pipeline.cancel_queued("the worker is shutting down", now_ns)

    def devices_lost(self, reason: str, *, now_ns: int) -> int:
        """The devices are gone: fail everything unanswered (code 100), also what runs; returns how many.

        Nothing is launched any more, no end of an op is waited for, and what still comes fails too.
        """
        self._lost = reason
        waiting = list(self._ledger.unanswered.values())
        for action in waiting:
            self._ledger.fail(action, Code.PROCESS_ENDED, reason, now_ns)
        return len(waiting)

    # ---------------------------------------------------------------------------- questions

    @property
    def idle(self) -> bool:
        """True if every action was answered and no device works."""
        return not self._ledger.unanswered and self._pipeline.idle

    @property
    def unused(self) -> bool:
        """True if it is idle and knows no model."""
        return not self._ledger.instances and self.idle

    @property
    def pending(self) -> int:
        """Actions that wait for their result."""
        return len(self._ledger.unanswered)

    @property
    def waiting_since_ns(self) -> int | None:
        """When the oldest action arrived that waits for its result. None: none does."""
        return next((action.received_ns for action in self._ledger.unanswered.values()), None)

    @property
    def errors(self) -> int:
        """ErrorResults sent."""
        return self._ledger.errors

    @property
    def clock_error_ns(self) -> int:
        """How far the controller's times, once converted, are off at most."""
        return self._link.clock.error_ns

    def gpu_reports(self) -> tuple[GpuInfo, ...]:
        return tuple(gpu.report() for gpu in self._ledger.gpus.values())

    def free_pages(self, gpu_id: int) -> int:
        return self._ledger.gpus[gpu_id].cache.free_pages

    @property
    def model_ids(self) -> Collection[int]:
        """The instances that it has prepared."""
        return self._ledger.instances.keys()

    def note_gpu_stats(self, stats: tuple[GpuStats, ...]) -> None:
        """The driver was asked again: the next heartbeat says what it answered."""
        self._gpu_stats = stats
        self._stats_are_new = True

    def note_bad_message(self) -> None:
        """A message was malformed or oversized; heartbeats tell the controller how many."""
        self.dropped += 1

    # ----------------------------------------------------------------------------- sessions

    def _hello(self, peer: bytes, message: ControllerHello, now_ns: int) -> None:
        if self._closing:
            refused = WorkerRefused(Code.SHUTTING_DOWN, "this worker is shutting down")
            self._ledger.effects.append(ToController(peer, refused))
            return
        serving = self._link.session is not None
        outcome = self._link.hello(peer, message, version=self._identity.version, now_ns=now_ns)
        if isinstance(outcome, WorkerRefused):
            self._ledger.effects.append(ToController(peer, outcome))
            if now_ns >= self._refusal_due_ns:  # it says hello twice a second
                self._refusal_due_ns = now_ns + _REFUSAL_EVERY_NS
                self._ledger.effects.append(
                    Note("warning", f"controller refused: {outcome.reason}")
                )
        elif outcome is HelloOutcome.REPEATED:
            if self._link.session is not None:  # its Welcome may have been lost
                self._welcome(self._link.session)
        elif serving:
            self._pipeline.cancel_queued("its session has ended", now_ns)

    def _open_session(self, now_ns: int) -> None:
        # The controller counts pages from nothing; loading again costs milliseconds, a wrong count
        # costs failed loads for ever.
        for gpu in self._ledger.gpus.values():
            for model_id in gpu.cache.model_ids():
                self._ledger.evict(gpu, model_id)
        if self._link.forgetting:
            # Model ids are the controller's, and a new one starts at 0: no model of the old may stay.
            for model_id in list(self._ledger.instances):
                self._pipeline.forget(model_id)
        self._stats_are_new = True  # to this controller
        self._welcome(self._link.open(now_ns=now_ns))

    def _welcome(self, session: int) -> None:
        identity = self._identity
        message = WorkerWelcome(
            protocol=PROTOCOL_VERSION,
            session=session,
            version=identity.version,
            host=identity.host,
            pid=identity.pid,
            device=identity.device,
            gpus=self.gpu_reports(),
            loadable=identity.loadable,
            put_aside=identity.put_aside,
        )
        self._ledger.effects.append(ToController(self._link.peer, message))

    def _heartbeat(self, now_ns: int) -> None:
        link = self._link
        assert link.session is not None
        beat = Heartbeat(
            session=link.session,
            sent_ns=now_ns,
            clock_offset_ns=link.clock.offset_ns,
            clock_error_ns=link.clock.error_ns,
            activity=self._pipeline.activity(),
            pending=self.pending,
            errors=self.errors,
            dropped=self.dropped,
            preparing=self._pipeline.preparing,
            gpus=self._gpu_stats if self._stats_are_new else (),
        )
        self._stats_are_new = False
        self._ledger.effects.append(ToController(link.peer, beat))
        link.heartbeat_sent(now_ns=now_ns)

    # ------------------------------------------------------------------------------ arrival

    def _accept(self, event: FromController, message: Action, now_ns: int) -> int | None:
        if self._link.session is None or message.session != self._link.session:
            self.dropped += 1
            return None
        self._link.heard(now_ns)
        key = self._ledger.next_seq()
        action = PendingAction(key, message, event.peer, message.session, now_ns)
        self._ledger.unanswered[key] = action
        if self._lost:
            self._ledger.fail(action, Code.PROCESS_ENDED, self._lost, now_ns)
        elif self._closing:
            self._ledger.fail(action, Code.SHUTTING_DOWN, "the worker is shutting down", now_ns)
        elif isinstance(message, Infer):
            self._accept_infer(action, message, event.input_sizes, now_ns)
        elif isinstance(message, LoadWeights | EvictWeights):
            self._accept_weights(action, message, now_ns)
        elif isinstance(message, LoadModel):
            self._accept_model(action, message, now_ns)
        else:
            self._answer_at_once(action, now_ns)
        return key if key in self._ledger.unanswered else None

    def _set_window(
        self,
        action: PendingAction,
        message: LoadModel | LoadWeights | EvictWeights | Infer,
        now_ns: int,
    ) -> bool:
        """Convert the window to our clock. False, and the action has failed, if it is none."""
        fault = window_fault(message.earliest_ns, message.latest_ns)
        if fault is not None:
            self._ledger.fail(action, *fault, now_ns)
            return False
        clock = self._link.clock
        action.earliest_ns = clock.to_local_ns(message.earliest_ns)
        action.latest_ns = clock.to_local_ns(message.latest_ns)
        return True

    def _locate(
        self,
        action: PendingAction,
        message: LoadWeights | EvictWeights | Infer,
        code: Code,
        now_ns: int,
    ) -> tuple[GpuState, Instance] | None:
        """The GPU and the instance that the action names; None, and it has failed, if one is wrong."""
        gpu = self._ledger.gpus.get(message.gpu_id)
        if gpu is None:
            known = ", ".join(str(gpu_id) for gpu_id in self._ledger.gpus)
            self._ledger.fail(
                action,
                Code.INVALID_GPU,
                f"no GPU {message.gpu_id}; this worker has {known}",
                now_ns,
            )
            return None
        instance = self._ledger.instances.get(message.model_id)
        if instance is None:
            self._ledger.fail(action, code, f"model id {message.model_id} was not loaded", now_ns)
            return None
        action.instance = instance
        return gpu, instance

    def _accept_infer(
        self, action: PendingAction, message: Infer, frames: tuple[int, ...], now_ns: int
    ) -> None:
        located = self._locate(action, message, Code.COPY_INPUT_UNKNOWN_MODEL, now_ns)
        if located is None or not self._set_window(action, message, now_ns):
            return
        gpu, instance = located
        fault = infer_fault(
            message, instance, frames, allow_zero_size_inputs=self._allow_zero_size_inputs
        )
        if fault is not None:
            self._ledger.fail(action, *fault, now_ns)
            return
        action.uses = gpu
        gpu.use(instance.model_id)
        self._pipeline.enqueue(gpu.inputs, action.earliest_ns - COPY_INPUT_LEAD_NS, action)

    def _accept_weights(
        self, action: PendingAction, message: LoadWeights | EvictWeights, now_ns: int
    ) -> None:
        load = isinstance(message, LoadWeights)
        unknown = Code.LOAD_WEIGHTS_UNKNOWN_MODEL if load else Code.EVICT_WEIGHTS_UNKNOWN_MODEL
        located = self._locate(action, message, unknown, now_ns)
        if located is not None and self._set_window(action, message, now_ns):
            self._pipeline.enqueue(located[0].weights, action.earliest_ns, action)

    def _accept_model(self, action: PendingAction, message: LoadModel, now_ns: int) -> None:
        name = canonical_model(message.name)
        identity = self._identity
        fault = load_model_fault(
            message, name, identity.loadable, self._ledger.instances, identity.put_aside
        )
        if fault is not None:
            self._ledger.fail(action, *fault, now_ns)
        elif self._set_window(action, message, now_ns):
            self._pipeline.prepare_model(action)

    def _answer_at_once(self, action: PendingAction, now_ns: int) -> None:
        message = action.message
        clock = self._link.clock
        if isinstance(message, UnloadModel):
            self._unload(action, message.model_id, now_ns)
        elif isinstance(message, ClearCache):
            for gpu in self._ledger.gpus.values():
                for model_id in gpu.cache.model_ids():
                    if gpu.cache.resident(model_id) and not gpu.in_use(model_id):
                        self._ledger.evict(gpu, model_id)
            self._ledger.answer(action, results.cache_cleared(action, clock, now_ns=now_ns))
        elif isinstance(message, GetWorkerState):
            models = tuple((i.model_id, i.name) for i in self._ledger.instances.values())
            gpus = self.gpu_reports()
            self._ledger.answer(
                action, results.worker_state(action, clock, gpus, models, now_ns=now_ns)
            )

    def _weights_lost(self, event: WeightsLost) -> None:
        """Their pages are free. The controller hears of it from the next Infer (code 82), and loads again."""
        gpu = self._ledger.gpus[event.gpu_id]
        for model_id in event.model_ids:
            if gpu.cache.resident(model_id):
                self._ledger.evict(gpu, model_id)

    def _unload(self, action: PendingAction, model_id: int, now_ns: int) -> None:
        instance = self._ledger.instances.get(model_id)
        if instance is None:
            self._ledger.fail(
                action, Code.UNKNOWN_MODEL, f"model id {model_id} was not loaded", now_ns
            )
            return
        if any(other.instance is instance for other in self._ledger.unanswered.values()):
            reason = f"model id {model_id} has work queued or running"
            self._ledger.fail(action, Code.WEIGHTS_IN_USE, reason, now_ns)
            return
        for gpu in self._ledger.gpus.values():
            if gpu.cache.holds(model_id):
                self._ledger.evict(gpu, model_id)
        self._pipeline.forget(model_id)
        self._ledger.answer(action, results.unloaded(action, self._link.clock, now_ns=now_ns))
