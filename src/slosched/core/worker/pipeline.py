"""Executors: what runs where and when, from the queue to the answer.

Every GPU has four (Clockwork §4.2): weights, inputs, exec, outputs. Each runs one op at a time and keeps
the others in a queue by (earliest, arrival). The preparation of models has one of its own.

    LoadWeights    weights
    EvictWeights   weights (instant, but behind the loads that were queued before it)
    Infer          inputs, from 5 ms before `earliest`  ->  exec, at `earliest`  ->  outputs

An action never begins before its `earliest` nor after its `latest`; nothing is checked against its end.
A device that arms is handed each exec a moment ahead and starts it on the dot, without waiting for a
decision; one that arrives within that moment of another's start goes behind it.
"""

from __future__ import annotations

from heapq import heappop, heappush

from slosched.codes import Code
from slosched.config import canonical_model
from slosched.core.worker import results
from slosched.core.worker.checks import load_model_fault
from slosched.core.worker.interface import (
    EvictPages,
    Launch,
    ModelPrepared,
    Op,
    OpDone,
    OpKind,
    PrepareModel,
    ReleaseModel,
    Withdraw,
)
from slosched.core.worker.ledger import Ledger
from slosched.core.worker.state import Executor, GpuState, Instance, PendingAction
from slosched.messages import EvictWeights, Infer, LoadModel, Span
from slosched.units import format_duration, tensor_bytes


class Pipeline:
    """Carries out the actions on the ledger. `loadable` are canonical names."""

    def __init__(self, ledger: Ledger, loadable: tuple[str, ...]) -> None:
        self._ledger = ledger
        self._loadable = loadable
        self._preparation = Executor(None, None)
        self._dirty: list[Executor] = []  # may have something to start
        self._wake: list[tuple[int, int, Executor]] = []  # (time, seq, executor)
        self._ops: dict[int, tuple[Executor, PendingAction]] = {}  # launched, by op id
        self._closing = False

    # ------------------------------------------------------------------------------- verbs

    @property
    def idle(self) -> bool:
        """True if no device works."""
        return not self._ops

    def next_wakeup_ns(self) -> int | None:
        return self._wake[0][0] if self._wake else None

    def run_due(self, now_ns: int) -> None:
        """Start everything whose time has come."""
        if not self._dirty and (not self._wake or self._wake[0][0] > now_ns):
            return
        wake, dirty = self._wake, self._dirty
        while wake and wake[0][0] <= now_ns:
            time_ns, _, executor = heappop(wake)
            if executor.armed_ns == time_ns:
                executor.armed_ns = None
            self._touch(executor)
        # An executor can make another one ready (never itself), so the list may grow under us.
        for executor in dirty:
            executor.dirty = False
            self._run(executor, now_ns)
        dirty.clear()

    def close(self) -> None:
        """Begin no exec any more."""
        self._closing = True

    def prepare_model(self, action: PendingAction) -> None:
        """Queue a LoadModel that was found sound."""
        self.enqueue(self._preparation, action.earliest_ns, action)

    @property
    def preparing(self) -> int:
        """LoadModels that were taken and are not answered."""
        preparation = self._preparation
        return len(preparation.queue) + (preparation.running is not None)

    def activity(self) -> str:
        """Which model is being prepared, in words; empty if none is."""
        running = self._preparation.running
        if running is None or not isinstance(running.message, LoadModel):
            return ""
        waiting = len(self._preparation.queue)
        more = f" ({waiting} more waiting)" if waiting else ""
        return f"preparing {running.message.name}{more}"

    def enqueue(self, executor: Executor, earliest_ns: int, action: PendingAction) -> None:
        heappush(executor.queue, (earliest_ns, self._ledger.next_seq(), action))
        if not executor.dirty:
            executor.dirty = True
            self._dirty.append(executor)

    def _touch(self, executor: Executor) -> None:
        if not executor.dirty:
            executor.dirty = True
            self._dirty.append(executor)

    def _run(self, executor: Executor, now_ns: int) -> None:
        """Start what may start; arm a wake-up for what may not yet."""
        queue, kind, gpu = executor.queue, executor.kind, executor.gpu
        due_ns = now_ns + executor.ahead_ns
        while queue and queue[0][0] <= due_ns and executor.has_room:
            action = heappop(queue)[2]
            if gpu is None:
                self._start_preparation(action, now_ns)
            elif kind is OpKind.COPY_INPUT:
                if now_ns > action.latest_ns:
                    self._late(action, Code.COPY_INPUT_TOO_LATE, now_ns)
                elif gpu.free_copies and _brings_nothing(action):
                    self._copied_input(gpu, action, Span(now_ns, now_ns, 0), now_ns)
                else:
                    self._launch(executor, action)
            elif kind is OpKind.EXEC:
                self._start_exec(executor, gpu, action, now_ns)
            elif kind is OpKind.COPY_OUTPUT:
                self._launch(executor, action)
            else:
                self._start_weights(executor, gpu, action, now_ns)
        if queue and executor.has_room:
            earliest_ns = queue[0][0] - executor.ahead_ns
            if executor.armed_ns is None or earliest_ns < executor.armed_ns:
                executor.armed_ns = earliest_ns
                heappush(self._wake, (earliest_ns, self._ledger.next_seq(), executor))

    def _late(self, action: PendingAction, code: Code, now_ns: int) -> bool:
        """True, and the action has failed, if its window is over."""
        if now_ns <= action.latest_ns:
            return False
        late = format_duration(now_ns - action.latest_ns)
        self._ledger.fail(action, code, f"it could only start {late} after latest", now_ns)
        return True

    def _start_preparation(self, action: PendingAction, now_ns: int) -> None:
        message = action.message
        assert isinstance(message, LoadModel)
        # Before the first clock exchange a window in the controller's time means nothing to us.
        if self._ledger.link.clock.synchronised and self._late(
            action, Code.LOAD_MODEL_TOO_LATE, now_ns
        ):
            return
        name = canonical_model(message.name)
        fault = load_model_fault(message, name, self._loadable, self._ledger.instances)
        if fault is not None:  # an earlier LoadModel took the id while this one waited
            self._ledger.fail(action, *fault, now_ns)
            return
        ids = range(message.model_id, message.model_id + message.copies)
        known = [self._ledger.instances[i] for i in ids if i in self._ledger.instances]
        if len(known) == message.copies:
            self._answer_loaded(action, known[0], Span(now_ns, now_ns, 0), now_ns)
            return
        self._preparation.running = action
        self._ledger.effects.append(
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
                self._ledger.fail(action, Code.WEIGHTS_IN_USE, reason, now_ns)
            elif not gpu.cache.holds(model_id):
                reason = f"model id {model_id} has no weights on GPU {gpu.gpu_id}"
                self._ledger.fail(action, Code.EVICT_WEIGHTS_NOT_IN_CACHE, reason, now_ns)
            else:
                self._ledger.evict(gpu, model_id)
                self._ledger.answer(
                    action, results.evicted(action, self._ledger.link.clock, now_ns=now_ns)
                )
            return
        if self._late(action, Code.LOAD_WEIGHTS_TOO_LATE, now_ns):
            return
        if gpu.cache.holds(model_id):  # a reload: the old pages go first (Clockwork)
            self._ledger.evict(gpu, model_id)
        pages = instance.pages[gpu.gpu_id]
        version = gpu.cache.begin_load(model_id, pages)
        if version is None:
            reason = (
                f"the weights take {pages} page(s), {gpu.cache.free_pages} of {gpu.cache.pages} are "
                f"free on GPU {gpu.gpu_id}: evict first"
            )
            self._ledger.fail(action, Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE, reason, now_ns)
            return
        action.weights_version = version
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
            self._ledger.fail(action, Code.EXEC_WEIGHTS_MISSING, reason, now_ns)
            return
        action.weights_version = gpu.cache.version(model_id)
        self._launch(executor, action)

    def _launch(self, executor: Executor, action: PendingAction) -> None:
        assert executor.kind is not None and executor.gpu is not None
        assert action.instance is not None
        if executor.running is None:
            executor.running = action
        else:
            executor.ahead = action
        message, instance = action.message, action.instance
        batch_size, request_count = 0, 0
        input_sizes: tuple[int, ...] = ()
        if isinstance(message, Infer):
            batch_size, request_count = message.batch_size, message.request_count
            input_sizes = message.input_sizes
        op = Op(
            self._ledger.next_seq(), executor.kind, executor.gpu.gpu_id, instance.model_id,
            action.key, batch_size, request_count, input_sizes, instance.name,
            action.earliest_ns, action.latest_ns,
        )  # fmt: skip
        self._ops[op.op_id] = (executor, action)
        self._ledger.effects.append(Launch(op))

    def op_done(self, done: OpDone, now_ns: int) -> None:
        entry = self._ops.pop(done.op_id, None)
        if entry is None:
            raise KeyError(f"the device reports op {done.op_id}, which does not run")
        executor, action = entry
        if executor.running is action:
            executor.running, executor.ahead = executor.ahead, None
        else:  # armed, and withdrawn or too late before its turn came
            executor.ahead = None
        self._touch(executor)
        gpu = executor.gpu
        assert gpu is not None and action.instance is not None
        if executor.kind is OpKind.LOAD_WEIGHTS:
            self._loaded(gpu, action, action.instance.model_id, done, now_ns)
        elif done.code:
            self._ledger.fail(action, done.code, done.reason, now_ns)
        elif executor.kind is OpKind.COPY_INPUT:
            self._copied_input(gpu, action, done.span, now_ns)
        elif executor.kind is OpKind.EXEC:
            self._executed(gpu, action, action.instance.model_id, done, now_ns)
        else:
            self._copied_output(gpu, action, done.span, done.output_sizes, now_ns)

    def _copied_input(self, gpu: GpuState, action: PendingAction, span: Span, now_ns: int) -> None:
        action.copy_input = span
        if self._closing or action.session != self._ledger.link.session:
            self._ledger.fail(action, Code.CANCELLED, "cancelled before it could start", now_ns)
        else:
            self.enqueue(gpu.exec, action.earliest_ns, action)

    def _copied_output(
        self,
        gpu: GpuState,
        action: PendingAction,
        span: Span,
        output_sizes: tuple[int, ...],
        now_ns: int,
    ) -> None:
        clock = self._ledger.link.clock
        message = results.inferred(action, clock, gpu.gpu_id, span, output_sizes, now_ns=now_ns)
        self._ledger.answer(action, message, action.key if output_sizes else None)

    def _loaded(
        self, gpu: GpuState, action: PendingAction, model_id: int, done: OpDone, now_ns: int
    ) -> None:
        if done.code:
            gpu.cache.fail_load(model_id, action.weights_version)
            self._ledger.effects.append(EvictPages(gpu.gpu_id, model_id))
            self._ledger.fail(action, done.code, done.reason, now_ns)
        elif gpu.cache.finish_load(model_id, action.weights_version):
            self._ledger.answer(
                action,
                results.weights_loaded(action, self._ledger.link.clock, done.span, now_ns=now_ns),
            )
        else:
            reason = f"the weights of model id {model_id} were changed while they were loading"
            self._ledger.fail(action, Code.LOAD_WEIGHTS_CONCURRENT_MODIFICATION, reason, now_ns)

    def _executed(
        self, gpu: GpuState, action: PendingAction, model_id: int, done: OpDone, now_ns: int
    ) -> None:
        self._ledger.release_use(action)
        if gpu.cache.version(model_id) != action.weights_version:
            reason = f"the weights of model id {model_id} were changed while it ran"
            self._ledger.fail(action, Code.EXEC_CONCURRENT_WEIGHTS_MODIFICATION, reason, now_ns)
            return
        action.exec = done.span
        action.clock_before_mhz, action.clock_mhz = done.clock_before_mhz, done.clock_mhz
        if gpu.free_copies and gpu.outputs.running is None and _brings_nothing(action):
            self._copied_output(gpu, action, Span(now_ns, now_ns, 0), (), now_ns)
        else:
            self.enqueue(gpu.outputs, 0, action)

    def prepared(self, event: ModelPrepared, now_ns: int) -> None:
        action = self._preparation.running
        if action is None or action.key != event.action_id:
            raise KeyError(f"model preparation {event.action_id} ended, but does not run")
        self._preparation.running = None
        self._touch(self._preparation)
        message = action.message
        assert isinstance(message, LoadModel)
        name = canonical_model(message.name)
        if action.key not in self._ledger.unanswered:  # cancelled meanwhile
            if not self._name_in_use(name):
                self._ledger.effects.append(ReleaseModel(message.model_id, name, last=True))
            return
        profile = event.profile
        if event.code or profile is None:
            code = event.code or Code.RUNTIME_ERROR
            self._ledger.fail(action, code, event.reason or f"cannot prepare {name!r}", now_ns)
            return
        offered = results.offered_batches(profile, message.max_batch, message.max_exec_ns)
        pages = {g.gpu_id: profile.pages(g.info.page_bytes) for g in self._ledger.gpus.values()}
        input_bytes = tensor_bytes(profile.input_shape, profile.input_dtype)
        for model_id in range(message.model_id, message.model_id + message.copies):
            self._ledger.instances[model_id] = Instance(
                model_id, name, profile, max(offered), input_bytes, pages,
                event.random_weights, event.labels,
            )  # fmt: skip
        self._answer_loaded(action, self._ledger.instances[message.model_id], event.span, now_ns)

    def _answer_loaded(
        self, action: PendingAction, instance: Instance, span: Span, now_ns: int
    ) -> None:
        self._ledger.answer(
            action,
            results.model_loaded(action, self._ledger.link.clock, instance, span, now_ns=now_ns),
        )

    def cancel_queued(self, reason: str, now_ns: int) -> None:
        executors = [self._preparation]
        for gpu in self._ledger.gpus.values():
            executors.extend(gpu.executors)
        for executor in executors:
            if executor.kind is OpKind.COPY_OUTPUT:
                continue  # it ran; only its answer is missing
            for action in executor.drain():
                self._ledger.fail(action, Code.CANCELLED, f"cancelled: {reason}", now_ns)
            if executor.ahead_ns:
                self._withdraw(executor)
        preparing = self._preparation.running
        if preparing is not None and preparing.key in self._ledger.unanswered:
            self._ledger.fail(preparing, Code.CANCELLED, f"cancelled: {reason}", now_ns)

    def _withdraw(self, executor: Executor) -> None:
        """Ask the device for what it has not begun; what it gives back fails like the queue did."""
        assert executor.gpu is not None
        for op_id, (owner, _) in self._ops.items():
            if owner is executor:
                self._ledger.effects.append(Withdraw(op_id, executor.gpu.gpu_id))

    def forget(self, model_id: int) -> None:
        name = self._ledger.instances.pop(model_id).name
        self._ledger.effects.append(ReleaseModel(model_id, name, last=not self._name_in_use(name)))

    def _name_in_use(self, name: str) -> bool:
        waiting = [entry[2] for entry in self._preparation.queue]
        if self._preparation.running is not None:
            waiting.append(self._preparation.running)
        messages = [a.message for a in waiting]
        return any(i.name == name for i in self._ledger.instances.values()) or any(
            isinstance(m, LoadModel) and canonical_model(m.name) == name for m in messages
        )


def _brings_nothing(action: PendingAction) -> bool:
    return isinstance(action.message, Infer) and not any(action.message.input_sizes)
