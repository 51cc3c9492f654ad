"""The worker's brain: what each GPU does, when, with the actions that the controller sent.

Every GPU has four executors (Clockwork §4.2, worker.h): weights, inputs, exec, outputs. Each runs one
op at a time and keeps the others in a queue by (earliest, arrival). An action is never begun before its
`earliest` and never after its `latest`; nothing is checked against its end.

    LoadWeights    weights
    EvictWeights   weights (instant, but behind the loads that were queued before it)
    Infer          inputs, from 5 ms before `earliest`  ->  exec, at `earliest`  ->  outputs

Each accepted action is answered exactly once. An action of another session is dropped and counted.
The class is pure: it is told the time, and a shell (daemon/worker.py live, sim/ in virtual time) carries
its effects out. Times inside are on the worker's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from slosched.codes import Code
from slosched.config import HEARTBEAT_NS, canonical_model
from slosched.core.worker import results
from slosched.core.worker.checks import infer_fault, load_model_fault, window_fault
from slosched.core.worker.emulated import tensor_bytes
from slosched.core.worker.interface import (
    DropInputs,
    Effect,
    Event,
    EvictPages,
    FromController,
    Launch,
    ModelPrepared,
    Note,
    Op,
    OpDone,
    OpKind,
    PrepareModel,
    ReleaseModel,
    ToController,
)
from slosched.core.worker.link import HelloOutcome, Identity, Link
from slosched.core.worker.state import Executor, GpuState, Instance, PendingAction
from slosched.messages import (
    PROTOCOL_VERSION,
    Action,
    ClearCache,
    ControllerHello,
    EvictWeights,
    GetWorkerState,
    GpuInfo,
    Heartbeat,
    HeartbeatAck,
    Infer,
    LoadModel,
    LoadWeights,
    Result,
    Span,
    UnloadModel,
    WorkerRefused,
    WorkerWelcome,
)
from slosched.units import NS_PER_MS, format_duration

#: Inputs may be copied this long before the exec may start (Clockwork, worker_api: 5 ms).
COPY_INPUT_LEAD_NS = 5 * NS_PER_MS


class WorkerBrain:
    """Decides for `gpus`; `loadable` are the canonical names of models that can be prepared.

    `incarnation` is random, one per process start. `dropped` counts stale actions, `errors` the
    ErrorResults sent; a shell adds what it could not decode through `note_bad_message`.
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
    ) -> None:
        self._identity = Identity(incarnation, version, host, pid, device, tuple(sorted(loadable)))
        self._link = Link(incarnation, heartbeat_ns=heartbeat_ns)
        self._gpus = {info.gpu_id: GpuState(info) for info in gpus}
        self._instances: dict[int, Instance] = {}
        self._preparation = Executor(None, None)
        self._allow_zero_size_inputs = allow_zero_size_inputs
        self._effects: list[Effect] = []
        self._dirty: list[Executor] = []
        self._wake: list[tuple[int, int, Executor]] = []  # (time, seq, executor)
        self._ops: dict[int, tuple[Executor, PendingAction]] = {}  # launched, by op id
        self._unanswered: dict[int, PendingAction] = {}  # by key
        self._seq = 0
        self._closing = False
        self.errors = 0
        self.dropped = 0

    # ------------------------------------------------------------------------- three verbs

    def handle(self, event: Event, *, now_ns: int) -> int | None:
        """Take in a fact. For an action that now waits or runs, returns its key.

        Effects and ops name the action by that key (`action_id` there); the shell keeps the frames
        that came behind the message under it until DropInputs, or until they were copied. None:
        nothing will ask for the frames.
        """
        if isinstance(event, OpDone):
            self._op_done(event, now_ns)
            return None
        if isinstance(event, ModelPrepared):
            self._prepared(event, now_ns)
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
        if self._link.handing_over and self.idle:
            self._open_session(now_ns)
        while self._wake and self._wake[0][0] <= now_ns:
            time_ns, _, executor = heappop(self._wake)
            if executor.armed_ns == time_ns:
                executor.armed_ns = None
            self._touch(executor)
        # An executor can make another one ready (never itself), so the list may grow under us.
        for executor in self._dirty:
            executor.dirty = False
            self._run(executor, now_ns)
        self._dirty.clear()
        due_ns = self._link.next_heartbeat_ns()
        if due_ns is not None and due_ns <= now_ns:
            self._heartbeat(now_ns)
        effects, self._effects = self._effects, []
        return effects

    def next_wakeup_ns(self) -> int | None:
        """When `schedule` has something to do next, if no event comes before."""
        heartbeat_ns = self._link.next_heartbeat_ns()
        if not self._wake:
            return heartbeat_ns
        wake_ns = self._wake[0][0]
        return wake_ns if heartbeat_ns is None else min(wake_ns, heartbeat_ns)

    # ------------------------------------------------------------------------------ the end

    def shutdown(self, *, now_ns: int) -> None:
        """Cancel what is queued (code 1), refuse what still comes (code 3); what runs may end."""
        self._closing = True
        self._cancel_queued("the worker is shutting down", now_ns)

    @property
    def idle(self) -> bool:
        """True if every action was answered and no device works."""
        return not self._unanswered and not self._ops

    @property
    def pending(self) -> int:
        """Actions that wait for their result."""
        return len(self._unanswered)

    def gpu_reports(self) -> tuple[GpuInfo, ...]:
        return tuple(gpu.report() for gpu in self._gpus.values())

    def free_pages(self, gpu_id: int) -> int:
        return self._gpus[gpu_id].cache.free_pages

    def note_bad_message(self) -> None:
        """A message was malformed or oversized; heartbeats tell the controller how many."""
        self.dropped += 1

    # ----------------------------------------------------------------------------- sessions

    def _hello(self, peer: bytes, message: ControllerHello, now_ns: int) -> None:
        previous = self._link.peer if self._link.session is not None else None
        outcome = self._link.hello(peer, message, version=self._identity.version, now_ns=now_ns)
        if isinstance(outcome, WorkerRefused):
            self._effects.append(ToController(peer, outcome))
            self._effects.append(Note("warning", f"controller refused: {outcome.reason}"))
        elif outcome is HelloOutcome.RENEWED:
            assert self._link.session is not None
            self._welcome(self._link.session)
        elif previous is not None:
            self._cancel_queued("another controller took this worker over", now_ns)

    def _open_session(self, now_ns: int) -> None:
        # Model ids are the controller's, and a new one starts at 0: nothing of the old may stay.
        for gpu in self._gpus.values():
            for model_id in gpu.cache.model_ids():
                self._evict(gpu, model_id)
        for model_id in list(self._instances):
            self._forget(model_id)
        self._welcome(self._link.open(now_ns=now_ns))

    def _welcome(self, session: int) -> None:
        identity = self._identity
        message = WorkerWelcome(
            protocol=PROTOCOL_VERSION,
            incarnation=session,
            version=identity.version,
            host=identity.host,
            pid=identity.pid,
            device=identity.device,
            gpus=self.gpu_reports(),
            loadable=identity.loadable,
        )
        self._effects.append(ToController(self._link.peer, message))

    def _heartbeat(self, now_ns: int) -> None:
        link = self._link
        assert link.session is not None
        beat = Heartbeat(
            session=link.session,
            sent_ns=now_ns,
            clock_offset_ns=link.clock.offset_ns,
            clock_error_ns=link.clock.error_ns,
            activity=self._activity(),
            pending=len(self._unanswered),
            errors=self.errors,
            dropped=self.dropped,
        )
        self._effects.append(ToController(link.peer, beat))
        link.heartbeat_sent(now_ns=now_ns)

    def _activity(self) -> str:
        running = self._preparation.running
        if running is None or not isinstance(running.message, LoadModel):
            return ""
        waiting = len(self._preparation.queue)
        more = f" ({waiting} more waiting)" if waiting else ""
        return f"preparing {running.message.name}{more}"

    # ------------------------------------------------------------------------------ arrival

    def _accept(self, event: FromController, message: Action, now_ns: int) -> int | None:
        if self._link.session is None or message.session != self._link.session:
            self.dropped += 1
            return None
        self._link.heard(now_ns)
        self._seq += 1
        action = PendingAction(self._seq, message, event.peer, message.session, now_ns)
        self._unanswered[action.key] = action
        if self._closing:
            self._fail(action, Code.SHUTTING_DOWN, "the worker is shutting down", now_ns)
        elif isinstance(message, Infer):
            self._accept_infer(action, message, event.input_sizes, now_ns)
        elif isinstance(message, LoadWeights | EvictWeights):
            self._accept_weights(action, message, now_ns)
        elif isinstance(message, LoadModel):
            self._accept_model(action, message, now_ns)
        else:
            self._answer_at_once(action, now_ns)
        return action.key if action.key in self._unanswered else None

    def _set_window(
        self,
        action: PendingAction,
        message: LoadModel | LoadWeights | EvictWeights | Infer,
        now_ns: int,
    ) -> bool:
        """Convert the window to our clock. False, and the action has failed, if it is none."""
        fault = window_fault(message.earliest_ns, message.latest_ns)
        if fault is not None:
            self._fail(action, *fault, now_ns)
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
        gpu = self._gpus.get(message.gpu_id)
        if gpu is None:
            known = ", ".join(str(gpu_id) for gpu_id in self._gpus)
            self._fail(
                action,
                Code.INVALID_GPU,
                f"no GPU {message.gpu_id}; this worker has {known}",
                now_ns,
            )
            return None
        instance = self._instances.get(message.model_id)
        if instance is None:
            self._fail(action, code, f"model id {message.model_id} was not loaded", now_ns)
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
            self._fail(action, *fault, now_ns)
            return
        action.uses = gpu
        gpu.use(instance.model_id)
        self._enqueue(gpu.inputs, action.earliest_ns - COPY_INPUT_LEAD_NS, action)

    def _accept_weights(
        self, action: PendingAction, message: LoadWeights | EvictWeights, now_ns: int
    ) -> None:
        load = isinstance(message, LoadWeights)
        unknown = Code.LOAD_WEIGHTS_UNKNOWN_MODEL if load else Code.EVICT_WEIGHTS_UNKNOWN_MODEL
        located = self._locate(action, message, unknown, now_ns)
        if located is not None and self._set_window(action, message, now_ns):
            self._enqueue(located[0].weights, action.earliest_ns, action)

    def _accept_model(self, action: PendingAction, message: LoadModel, now_ns: int) -> None:
        name = canonical_model(message.name)
        fault = load_model_fault(message, name, self._identity.loadable, self._instances)
        if fault is not None:
            self._fail(action, *fault, now_ns)
        elif self._set_window(action, message, now_ns):
            self._enqueue(self._preparation, action.earliest_ns, action)

    def _answer_at_once(self, action: PendingAction, now_ns: int) -> None:
        message = action.message
        clock = self._link.clock
        if isinstance(message, UnloadModel):
            self._unload(action, message.model_id, now_ns)
        elif isinstance(message, ClearCache):
            for gpu in self._gpus.values():
                for model_id in gpu.cache.model_ids():
                    if gpu.cache.resident(model_id) and not gpu.in_use(model_id):
                        self._evict(gpu, model_id)
            self._answer(action, results.cache_cleared(action, clock, now_ns=now_ns))
        elif isinstance(message, GetWorkerState):
            models = tuple((i.model_id, i.name) for i in self._instances.values())
            gpus = self.gpu_reports()
            self._answer(action, results.worker_state(action, clock, gpus, models, now_ns=now_ns))

    def _unload(self, action: PendingAction, model_id: int, now_ns: int) -> None:
        instance = self._instances.get(model_id)
        if instance is None:
            self._fail(action, Code.UNKNOWN_MODEL, f"model id {model_id} was not loaded", now_ns)
            return
        if any(other.instance is instance for other in self._unanswered.values()):
            reason = f"model id {model_id} has work queued or running"
            self._fail(action, Code.WEIGHTS_IN_USE, reason, now_ns)
            return
        for gpu in self._gpus.values():
            if gpu.cache.holds(model_id):
                self._evict(gpu, model_id)
        self._forget(model_id)
        self._answer(action, results.unloaded(action, self._link.clock, now_ns=now_ns))

    # ---------------------------------------------------------------------------- executors

    def _enqueue(self, executor: Executor, earliest_ns: int, action: PendingAction) -> None:
        self._seq += 1
        executor.push(earliest_ns, self._seq, action)
        self._touch(executor)

    def _touch(self, executor: Executor) -> None:
        if not executor.dirty:
            executor.dirty = True
            self._dirty.append(executor)

    def _run(self, executor: Executor, now_ns: int) -> None:
        """Start what may start; arm a wake-up for what may not yet."""
        while (action := executor.pop_due(now_ns)) is not None:
            if executor.gpu is None:
                self._start_preparation(action, now_ns)
            elif executor.kind is OpKind.LOAD_WEIGHTS:
                self._start_weights(executor, executor.gpu, action, now_ns)
            elif executor.kind is OpKind.COPY_INPUT:
                self._start_copy_input(executor, action, now_ns)
            elif executor.kind is OpKind.EXEC:
                self._start_exec(executor, executor.gpu, action, now_ns)
            else:
                self._launch(executor, action)
        if executor.running is None and executor.queue:
            earliest_ns = executor.queue[0][0]
            if executor.armed_ns is None or earliest_ns < executor.armed_ns:
                executor.armed_ns = earliest_ns
                self._seq += 1
                heappush(self._wake, (earliest_ns, self._seq, executor))

    def _late(self, action: PendingAction, code: Code, now_ns: int) -> bool:
        """True, and the action has failed, if its window is over."""
        if now_ns <= action.latest_ns:
            return False
        late = format_duration(now_ns - action.latest_ns)
        self._fail(action, code, f"it could only start {late} after latest", now_ns)
        return True

    def _start_preparation(self, action: PendingAction, now_ns: int) -> None:
        message = action.message
        assert isinstance(message, LoadModel)
        # Before the first clock exchange a window in the controller's time means nothing to us.
        if self._link.clock.synchronised and self._late(action, Code.LOAD_MODEL_TOO_LATE, now_ns):
            return
        name = canonical_model(message.name)
        fault = load_model_fault(message, name, self._identity.loadable, self._instances)
        if fault is not None:  # an earlier LoadModel took the id while this one waited
            self._fail(action, *fault, now_ns)
            return
        ids = range(message.model_id, message.model_id + message.copies)
        known = [self._instances[i] for i in ids if i in self._instances]
        if len(known) == message.copies:
            self._answer_loaded(action, known[0], Span(now_ns, now_ns, 0), now_ns)
            return
        self._preparation.running = action
        self._effects.append(
            PrepareModel(
                action.key, name, message.model_id, message.copies, message.max_batch,
                message.max_exec_ns,
            )
        )  # fmt: skip

    def _start_weights(
        self, executor: Executor, gpu: GpuState, action: PendingAction, now_ns: int
    ) -> None:
        instance = action.instance
        assert instance is not None
        model_id = instance.model_id
        if isinstance(action.message, EvictWeights):
            if self._late(action, Code.EVICT_WEIGHTS_TOO_LATE, now_ns):
                return
            if gpu.in_use(model_id):
                reason = f"model id {model_id} has inferences queued or running on GPU {gpu.gpu_id}"
                self._fail(action, Code.WEIGHTS_IN_USE, reason, now_ns)
            elif not gpu.cache.holds(model_id):
                reason = f"model id {model_id} has no weights on GPU {gpu.gpu_id}"
                self._fail(action, Code.EVICT_WEIGHTS_NOT_IN_CACHE, reason, now_ns)
            else:
                self._evict(gpu, model_id)
                self._answer(action, results.evicted(action, self._link.clock, now_ns=now_ns))
            return
        if self._late(action, Code.LOAD_WEIGHTS_TOO_LATE, now_ns):
            return
        if gpu.cache.holds(model_id):  # a reload: the old pages go first (Clockwork)
            self._evict(gpu, model_id)
        pages = instance.pages[gpu.gpu_id]
        version = gpu.cache.begin_load(model_id, pages)
        if version is None:
            reason = (
                f"the weights take {pages} page(s), {gpu.cache.free_pages} of {gpu.cache.pages} are "
                f"free on GPU {gpu.gpu_id}: evict first"
            )
            self._fail(action, Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE, reason, now_ns)
            return
        action.weights_version = version
        self._launch(executor, action)

    def _start_copy_input(self, executor: Executor, action: PendingAction, now_ns: int) -> None:
        if not self._late(action, Code.COPY_INPUT_TOO_LATE, now_ns):
            self._launch(executor, action)

    def _start_exec(
        self, executor: Executor, gpu: GpuState, action: PendingAction, now_ns: int
    ) -> None:
        if self._late(action, Code.EXEC_TOO_LATE, now_ns):
            return
        assert action.instance is not None
        model_id = action.instance.model_id
        if not gpu.cache.resident(model_id):
            reason = f"the weights of model id {model_id} are not on GPU {gpu.gpu_id}"
            self._fail(action, Code.EXEC_WEIGHTS_MISSING, reason, now_ns)
            return
        action.weights_version = gpu.cache.version(model_id)
        self._launch(executor, action)

    def _launch(self, executor: Executor, action: PendingAction) -> None:
        assert executor.kind is not None and executor.gpu is not None
        assert action.instance is not None
        executor.running = action
        self._seq += 1
        message = action.message
        batch = message if isinstance(message, Infer) else None
        op = Op(
            op_id=self._seq,
            kind=executor.kind,
            gpu_id=executor.gpu.gpu_id,
            model_id=action.instance.model_id,
            action_id=action.key,
            batch_size=batch.batch_size if batch else 0,
            request_count=batch.request_count if batch else 0,
            input_sizes=batch.input_sizes if batch else (),
            model_name=action.instance.name,
        )
        self._ops[op.op_id] = (executor, action)
        self._effects.append(Launch(op))

    # ------------------------------------------------------------------------- completions

    def _op_done(self, done: OpDone, now_ns: int) -> None:
        entry = self._ops.pop(done.op_id, None)
        if entry is None:
            raise KeyError(f"the device reports op {done.op_id}, which does not run")
        executor, action = entry
        executor.running = None
        self._touch(executor)
        gpu = executor.gpu
        assert gpu is not None and action.instance is not None
        if executor.kind is OpKind.LOAD_WEIGHTS:
            self._loaded(gpu, action, action.instance.model_id, done, now_ns)
        elif done.code:
            self._fail(action, done.code, done.reason, now_ns)
        elif executor.kind is OpKind.COPY_INPUT:
            action.copy_input = done.span
            if self._closing or action.session != self._link.session:
                self._fail(action, Code.CANCELLED, "cancelled before it could start", now_ns)
            else:
                self._enqueue(gpu.exec, action.earliest_ns, action)
        elif executor.kind is OpKind.EXEC:
            self._executed(gpu, action, action.instance.model_id, done, now_ns)
        else:
            message = results.inferred(
                action, self._link.clock, gpu.gpu_id, done.span, done.output_sizes, now_ns=now_ns
            )
            self._answer(action, message, action.key if done.output_sizes else None)

    def _loaded(
        self, gpu: GpuState, action: PendingAction, model_id: int, done: OpDone, now_ns: int
    ) -> None:
        if done.code:
            gpu.cache.fail_load(model_id, action.weights_version)
            self._effects.append(EvictPages(gpu.gpu_id, model_id))
            self._fail(action, done.code, done.reason, now_ns)
        elif gpu.cache.finish_load(model_id, action.weights_version):
            self._answer(
                action, results.weights_loaded(action, self._link.clock, done.span, now_ns=now_ns)
            )
        else:
            reason = f"the weights of model id {model_id} were changed while they were loading"
            self._fail(action, Code.LOAD_WEIGHTS_CONCURRENT_MODIFICATION, reason, now_ns)

    def _executed(
        self, gpu: GpuState, action: PendingAction, model_id: int, done: OpDone, now_ns: int
    ) -> None:
        self._release_use(action)
        if gpu.cache.version(model_id) != action.weights_version:
            reason = f"the weights of model id {model_id} were changed while it ran"
            self._fail(action, Code.EXEC_CONCURRENT_WEIGHTS_MODIFICATION, reason, now_ns)
            return
        action.exec = done.span
        action.clock_before_mhz, action.clock_mhz = done.clock_before_mhz, done.clock_mhz
        self._enqueue(gpu.outputs, 0, action)

    def _prepared(self, event: ModelPrepared, now_ns: int) -> None:
        action = self._preparation.running
        if action is None or action.key != event.action_id:
            raise KeyError(f"model preparation {event.action_id} ended, but does not run")
        self._preparation.running = None
        self._touch(self._preparation)
        message = action.message
        assert isinstance(message, LoadModel)
        name = canonical_model(message.name)
        if action.key not in self._unanswered:  # cancelled meanwhile
            if not self._name_in_use(name):
                self._effects.append(ReleaseModel(message.model_id, name, last=True))
            return
        profile = event.profile
        if event.code or profile is None:
            code = event.code or Code.RUNTIME_ERROR
            self._fail(action, code, event.reason or f"cannot prepare {name!r}", now_ns)
            return
        offered = results.offered_batches(profile, message.max_batch, message.max_exec_ns)
        pages = {g.gpu_id: profile.pages(g.info.page_bytes) for g in self._gpus.values()}
        input_bytes = tensor_bytes(profile.input_shape, profile.input_dtype)
        for model_id in range(message.model_id, message.model_id + message.copies):
            self._instances[model_id] = Instance(
                model_id, name, profile, max(offered), input_bytes, pages,
                event.random_weights, event.labels,
            )  # fmt: skip
        self._answer_loaded(action, self._instances[message.model_id], event.span, now_ns)

    # ------------------------------------------------------------------------------ answers

    def _answer_loaded(
        self, action: PendingAction, instance: Instance, span: Span, now_ns: int
    ) -> None:
        self._answer(
            action, results.model_loaded(action, self._link.clock, instance, span, now_ns=now_ns)
        )

    def _answer(self, action: PendingAction, message: Result, output_of: int | None = None) -> None:
        del self._unanswered[action.key]
        self._effects.append(ToController(action.peer, message, output_of))

    def _fail(self, action: PendingAction, code: int, reason: str, now_ns: int) -> None:
        self.errors += 1
        self._release_use(action)
        if isinstance(action.message, Infer):
            self._effects.append(DropInputs(action.key))
        self._answer(action, results.failed(action, self._link.clock, code, reason, now_ns=now_ns))

    def _cancel_queued(self, reason: str, now_ns: int) -> None:
        executors = [self._preparation]
        for gpu in self._gpus.values():
            executors.extend(gpu.executors)
        for executor in executors:
            if executor.kind is OpKind.COPY_OUTPUT:
                continue  # it ran; only its answer is missing
            for action in executor.drain():
                self._fail(action, Code.CANCELLED, f"cancelled: {reason}", now_ns)
        preparing = self._preparation.running
        if preparing is not None and preparing.key in self._unanswered:
            self._fail(preparing, Code.CANCELLED, f"cancelled: {reason}", now_ns)

    # -------------------------------------------------------------------------------- state

    def _release_use(self, action: PendingAction) -> None:
        if action.uses is not None and action.instance is not None:
            action.uses.release(action.instance.model_id)
            action.uses = None

    def _evict(self, gpu: GpuState, model_id: int) -> None:
        gpu.cache.evict(model_id)
        self._effects.append(EvictPages(gpu.gpu_id, model_id))

    def _forget(self, model_id: int) -> None:
        name = self._instances.pop(model_id).name
        self._effects.append(ReleaseModel(model_id, name, last=not self._name_in_use(name)))

    def _name_in_use(self, name: str) -> bool:
        waiting = [entry[2] for entry in self._preparation.queue]
        if self._preparation.running is not None:
            waiting.append(self._preparation.running)
        messages = [a.message for a in waiting]
        return any(i.name == name for i in self._instances.values()) or any(
            isinstance(m, LoadModel) and canonical_model(m.name) == name for m in messages
        )
